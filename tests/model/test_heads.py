"""Scores: read at the end token, the same alone, in a batch and from disk."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import enliven, noise, tiny_model

from mmgpt.data.branching import collate_answers
from mmgpt.data.messages import assistant, user
from mmgpt.data.ranked import Preference, rank_item
from mmgpt.errors import UserError
from mmgpt.model.heads import HEAD_FILE, RewardModel, ScalarHead
from mmgpt.model.multimodal import MultimodalGPT


def reward_model(family: str = "llama", **changes: object) -> RewardModel:
    model = RewardModel(tiny_model(family, **changes))  # type: ignore[arg-type]
    with torch.no_grad():
        model.head.bias.fill_(0.5)
    return model.eval()


def test_the_head_begins_as_the_paper_says():
    torch.manual_seed(0)
    head = ScalarHead(20_000)
    assert head.weight.detach().std().item() == pytest.approx(1 / math.sqrt(20_001), rel=0.03)
    assert head.bias.item() == 0
    hidden = torch.randn(3, 2, 20_000)
    assert torch.allclose(head(hidden), hidden @ head.weight[0], atol=1e-5) and head(hidden).shape == (3, 2)


def test_the_head_is_computed_in_single_precision():
    head, hidden = ScalarHead(8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(hidden), head(hidden.clone())) and head(hidden).dtype == torch.float32
    assert torch.allclose(head(hidden.bfloat16()), head(hidden.bfloat16().float()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_a_score_is_the_head_at_the_end_token(family):
    model = reward_model(family)
    question = [noise(1), "What is it?"]
    encoded = model.model.encode([*_prompt(question), assistant("a pear")])
    ids = torch.tensor([encoded.ids])
    with torch.inference_mode():
        hidden = model.model.language.base_model(
            inputs_embeds=model.model.embed(ids, model.model.pixels(encoded.images)), use_cache=False
        ).last_hidden_state[0]
    last = max(place for place, token in enumerate(encoded.ids) if token == model.model.tokenizer.eos_id)
    expected = float(hidden[last] @ model.head.weight[0].detach() + 0.5)
    assert float(model.score([_prompt(question)], ["a pear"])) == pytest.approx(expected, abs=1e-5)


def _prompt(question):
    return [user("".join(p for p in question if isinstance(p, str)), [p for p in question if not isinstance(p, str)])]


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_batched_scores_equal_single_ones_in_their_order(family):
    model = reward_model(family)
    prompts = [_prompt([noise(i), f"question {i}" * i]) if i % 2 else _prompt([f"q{i}"]) for i in range(5)]
    answers = ["yes", "no" * 9, "maybe", "", "z"]
    together = model.score(prompts, answers, batch_size=3)
    alone = torch.cat([model.score([prompt], [answer]) for prompt, answer in zip(prompts, answers)])
    assert torch.allclose(together, alone, atol=1e-5) and len(set(together.tolist())) == 5


def test_shared_prompts_score_the_same():
    model = reward_model()
    answers = ["yes", "no", "yes and no"]
    item = rank_item(Preference(_prompt([noise(1), "q"]), answers, [(0, 1)], 3, "here"), model.model.encode, 200)
    batch = collate_answers([[item]], 0)  # type: ignore[list-item]
    batch.images = model.model.pixels(batch.images)
    with torch.inference_mode():
        scores = model(batch)
    assert torch.allclose(scores, model.score([_prompt([noise(1), "q"])] * 3, answers), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_from_disk_it_scores_the_same_its_shift_included(tmp_path, rank):
    model = reward_model()
    if rank:
        model.model.config.language.lora.rank = rank
        model.model.add_adapters()
        enliven(model, seed=3, scale=0.05)
    model.save_pretrained(tmp_path / "model", full=False)
    assert (tmp_path / "model" / HEAD_FILE).is_file()
    prompts, answers = [_prompt([noise(1), "q"]), _prompt(["r"])], ["a", "bc"]
    expected = model.score(prompts, answers)
    assert torch.allclose(RewardModel.from_pretrained(tmp_path).score(prompts, answers), expected, atol=1e-5)


def test_a_model_without_a_head_is_refused(tmp_path):
    model = tiny_model(vision=False)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="is no reward model"):
        RewardModel.from_pretrained(tmp_path)
    assert isinstance(MultimodalGPT.from_pretrained(tmp_path), MultimodalGPT)
    other = RewardModel(tiny_model(vision=False))
    other.head = ScalarHead(7)
    other.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="does not fit"):
        RewardModel.from_pretrained(tmp_path)


def test_an_answer_longer_than_the_window():
    model = reward_model("tied", vision=False)
    with pytest.raises(UserError, match=r"answer 1 cannot be scored.* tokens, the window is 512"):
        model.score([_prompt(["a"]), _prompt(["b"])], ["short", "x" * 600])
