"""Rollouts: drawn from the right distribution, whatever the batch, and seen alike by decoder and training forward."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_models import enliven, noise, tiny_model

from mmgpt.data.messages import user
from mmgpt.errors import UsageError, UserError
from mmgpt.generate import Sampling, generate
from mmgpt.rl.rollout import Rollout, choose, draw, replay

PROMPTS = [[user("a")], [user("a much longer question than the first")], [user("third one")]]


def again(model: Any, rollout: Rollout, temperature: float) -> Any:
    """The whole rollout through the training forward."""
    batch, places = rollout.minibatch(range(len(rollout)), model.tokenizer.pad_id)
    batch.images = model.pixels(batch.images) if batch.images else None
    return replay(model, batch, places, rollout.tokens, rollout.mask, temperature=temperature)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_decoder_and_training_forward_see_the_same_probabilities(family, temperature):
    """With pictures and prompts of other lengths side by side."""
    model = tiny_model(family)
    prompts = [*PROMPTS, [user("what is it?", [noise(1)])], [user("and these?", [noise(2), noise(3)])]]
    rollout = draw(model, prompts, samples=2, max_new_tokens=12, temperature=temperature, seed=0)
    with torch.no_grad():
        found = again(model, rollout, temperature)
    assert torch.allclose(found.log_probs, rollout.log_probs, atol=1e-4)
    assert (rollout.log_probs[rollout.mask] < 0).all() and (rollout.log_probs[~rollout.mask] == 0).all()
    assert (found.entropy[rollout.mask] > 0).all() and (found.entropy[~rollout.mask] == 0).all()


def test_adapters_are_part_of_the_policy():
    model = tiny_model(vision=False)
    model.config.language.lora.rank = 2
    model.add_adapters()
    enliven(model, seed=1, scale=0.1)
    rollout = draw(model, PROMPTS, max_new_tokens=8, seed=0)
    with torch.no_grad():
        assert torch.allclose(again(model, rollout, 1.0).log_probs, rollout.log_probs, atol=1e-4)


def test_neither_batch_nor_neighbours_change_an_answer():
    model = tiny_model()
    settings: dict[str, Any] = dict(samples=3, max_new_tokens=10, seed="run/0")
    whole = draw(model, PROMPTS, **settings)
    for batch_size in (1, 2, 4):
        assert draw(model, PROMPTS, batch_size=batch_size, **settings).texts == whole.texts
    assert draw(model, PROMPTS[:1], **settings).texts == whole.texts[:3]
    assert len(set(whole.texts)) == 9
    assert draw(model, PROMPTS, **{**settings, "seed": "run/1"}).texts != whole.texts


def test_almost_no_temperature_is_greedy():
    model = tiny_model()
    drawn = draw(model, PROMPTS, max_new_tokens=10, temperature=1e-4, seed=0)
    eos = model.tokenizer.eos_id
    found = [[token for token in row[real].tolist() if token != eos] for row, real in zip(drawn.tokens, drawn.mask)]
    assert found == [answer.token_ids for answer in generate(model, PROMPTS, Sampling(max_new_tokens=10))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_distribution_says(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(12, generator=generator)
    count = 20_000
    ids, log_probs = choose(logits.expand(count, -1), torch.rand(count, generator=generator), temperature)
    wanted = (logits / temperature).softmax(-1)
    assert torch.allclose(log_probs.exp(), wanted[ids], atol=1e-6)
    found = torch.bincount(ids, minlength=12) / count
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt() + 1e-9).all()


def test_draws_at_the_edges_stay_possible():
    """The first and the last number that can be drawn never hit a token without probability."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 3)
    ids, log_probs = choose(logits, torch.tensor([0.0, 1 - 2**-53, 0.5], dtype=torch.float64), 1.0)
    assert ids.tolist() == [1, 2, 2] and torch.isfinite(log_probs).all()


def test_an_answer_ends_at_its_first_end_token_or_at_a_limit():
    model = tiny_model(vision=False)
    eos, pad = model.tokenizer.eos_id, model.tokenizer.pad_id
    assert eos != pad
    rollout = draw(model, [[user(str(i))] for i in range(40)], samples=2, max_new_tokens=60, seed=0)
    assert 0 < int(rollout.ended.sum()) < 80
    for tokens, mask, ended, text in zip(rollout.tokens, rollout.mask, rollout.ended, rollout.texts):
        real = tokens[mask].tolist()
        assert (real[-1] == eos) == bool(ended) and eos not in real[:-1]
        assert (tokens[~mask] == pad).all()
        assert ended or len(real) == 60
        assert text == model.tokenizer.decode(real[: len(real) - int(ended)])


def test_the_window_ends_an_answer():
    model = tiny_model(vision=False)
    room = model.context - len(model.prompt([user("")])[0])
    prompt = [user("x" * (room - 3))]
    rollout = draw(model, [prompt], samples=20, max_new_tokens=30, seed=0)
    assert int(rollout.lengths.max()) == 3
    with pytest.raises(UserError, match=r"conversation 1: .*shorten"):
        draw(model, [PROMPTS[0], [user("x" * room)]], max_new_tokens=3, seed=0)


def test_a_picture_is_never_drawn():
    """A vocabulary padded to a round number has a row for the image token."""
    from mmgpt.config import LanguageConfig, ModelConfig
    from mmgpt.model.multimodal import MultimodalGPT

    settings = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 264,
                "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
    torch.manual_seed(0)
    model = MultimodalGPT.from_config(ModelConfig(vision=None, language=LanguageConfig(architecture=settings)))
    image = model.tokenizer.image_id
    with torch.no_grad():
        model.language.lm_head.weight.zero_()
    rollout = draw(model, PROMPTS, samples=40, max_new_tokens=10, seed=0)
    counts = Counter(rollout.tokens[rollout.mask].tolist())
    assert image < 264 and image not in counts and len(counts) > 200
    assert torch.allclose(rollout.log_probs[rollout.mask], torch.tensor(1 / 263).log())
    found = again(model, rollout, 1.0)
    assert torch.allclose(found.log_probs.detach(), rollout.log_probs)
    assert torch.allclose(found.entropy[rollout.mask], torch.tensor(263.0).log())
    found.log_probs.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_policy_that_trains_draws_without_dropout_and_goes_on_training():
    model = tiny_model("gpt2", vision=False)
    model.language.train()
    first, second = (draw(model, PROMPTS, max_new_tokens=10, seed=0) for _ in range(2))
    assert torch.equal(first.log_probs, second.log_probs)
    assert model.language.training


@pytest.mark.parametrize(("settings", "message"), [
    ({"temperature": 0.0}, "above 0"), ({"samples": 0}, "samples"), ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"batch_size": 0}, "batch_size"),
])  # fmt: skip
def test_numbers_that_make_no_sense(settings, message):
    with pytest.raises(UsageError, match=message):
        draw(tiny_model(vision=False), PROMPTS, **{"max_new_tokens": 4, "seed": 0, **settings})
