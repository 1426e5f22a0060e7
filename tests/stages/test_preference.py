"""DPO: log-probabilities and gradients of one long loop over answers, two kinds of reference, a run, and resuming it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nano_runs import differences, keep_checkpoints, killed_runs, metric_rows, run_state, train, write_config
from test_reward import write_reward_config
from tiny_models import enliven, grads, noise, tiny_config, tiny_model

import mmgpt
from mmgpt.config import OptimizerConfig, PartRates, RunConfig
from mmgpt.data.branching import collate_answers
from mmgpt.data.letters import letter_prompts, letter_reward
from mmgpt.data.messages import user
from mmgpt.data.packing import collate
from mmgpt.data.ranked import Preference, RankedItem, rank_item, ranked_pairs
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.rl.rollout import draw
from mmgpt.stages.preference import DirectPreference, answer_log_probs


def preferences() -> list[Preference]:
    rankings: list[Any] = [([noise(1)], ["yes", "no", "yesterday"], [2, 1, 3]), ([], ["a", "bb"], [1, 2])]
    return [
        Preference([user("q", images)], answers, ranked_pairs(ranks), len(answers) * (len(answers) - 1) // 2, f"row {number}")
        for number, (images, answers, ranks) in enumerate(rankings)
    ]


def items(model: MultimodalGPT) -> list[RankedItem]:
    found = [rank_item(preference, model.encode, 400) for preference in preferences()]
    assert all(isinstance(item, RankedItem) for item in found)
    return found  # type: ignore[return-value]


def slow_log_probs(model: MultimodalGPT) -> list[torch.Tensor]:
    """Each answer on its own, through the forward of the supervised stages."""
    found = []
    for preference in preferences():
        for conversation in preference.conversations():
            batch = collate([[model.encode(conversation)]], 0)
            batch.images = model.pixels(batch.images) if batch.images else None
            last = max(i for i, message in enumerate(conversation) if message["role"] == "assistant")
            assert last == len(conversation) - 1
            found.append(-model.loss(batch).loss)
    return found


def batch_of(model: MultimodalGPT, share: bool = True) -> Any:
    batch = collate_answers([items(model)], 0, share=share)
    batch.images = model.pixels(batch.images)
    return batch


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probabilities_are_those_of_each_answer_alone(family):
    """But for what the answers of one prompt share, which no difference between them sees."""
    model = tiny_model(family)
    with torch.no_grad():
        alone = torch.stack(slow_log_probs(model))
        shared, copied = (answer_log_probs(model, batch_of(model, share)) for share in (True, False))
    for found in (shared, copied):
        assert torch.allclose(found[:3] - found[0], alone[:3] - alone[0], atol=1e-4)
        assert torch.allclose(found[3:], alone[3:], atol=1e-4)


def test_chunks_change_neither_sums_nor_gradients(monkeypatch):
    model = tiny_model()
    batch = batch_of(model)
    answer_log_probs(model, batch).sum().backward()
    whole, sums = grads(model), answer_log_probs(model, batch).detach()
    model.zero_grad()
    monkeypatch.setattr("mmgpt.stages.preference.LOSS_CHUNK", 3)
    answer_log_probs(model, batch).sum().backward()
    assert torch.allclose(answer_log_probs(model, batch), sums, atol=1e-5)
    for name, gradient in grads(model).items():
        assert torch.allclose(gradient, whole[name], atol=1e-4), name


def stage_of(model: MultimodalGPT, config: Any) -> DirectPreference:
    rates = PartRates(projector=0.0 if config.language.lora.rank else 1e-3, language=1e-3)
    return DirectPreference(model, RunConfig(stage="preference", model=config, optimizer=OptimizerConfig(lr=rates)), None, 1)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_stays_where_the_policy_began(rank):
    """A copy where weights learn, adapters off where they do; both begin with the loss log 2 and a margin of 0."""
    torch.manual_seed(0)
    config = tiny_config()
    config.language.lora.rank = rank
    model = enliven(MultimodalGPT.from_config(tiny_config()))
    model.config = config
    model.add_adapters()
    model.eval()
    stage = stage_of(model, config)
    assert bool(stage._copy) == (rank == 0)
    batch = batch_of(model)
    begun = stage.reference(batch)
    total, margins = stage._losses(batch)
    assert margins.abs().max() < 1e-5 and total.item() == pytest.approx(2 * 0.6931, abs=1e-3)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert torch.equal(stage.reference(batch), begun)
    assert not torch.allclose(answer_log_probs(model, batch), begun, atol=1e-3)
    assert learns == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any("_copy" in name for name, _ in stage.named_parameters())


def test_the_gradient_is_that_of_equation_7_pair_by_pair():
    torch.manual_seed(0)
    model = enliven(MultimodalGPT.from_config(tiny_config())).eval()
    stage = stage_of(model, tiny_config())
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.02 * torch.randn_like(parameter))
    total, _ = stage._losses(batch_of(model))
    total.backward()
    ours = grads(model)
    model.zero_grad()
    with torch.no_grad():
        reference = slow_log_probs(stage._copy[0])
    policy, first = slow_log_probs(model), 0
    expected: Any = 0.0
    for preference in preferences():
        for better, worse in preference.pairs:
            gaps = [policy[first + place] - reference[first + place] for place in (better, worse)]
            expected = expected - torch.nn.functional.logsigmoid(0.1 * (gaps[0] - gaps[1])) / preference.compared
        first += len(preference.answers)
    assert total.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    theirs = grads(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], atol=1e-4 * max(1.0, float(theirs[name].abs().max()))), name


def test_the_supervised_term_is_the_mean_loss_of_the_preferred_answer():
    """Of "a" against "bb", which begin with nothing in common."""
    model = tiny_model()
    stage = stage_of(model, tiny_config())
    batch = collate_answers([items(model)[1:]], 0)
    batch.images = None
    encoded = model.encode(preferences()[1].conversations()[0])
    with torch.no_grad():
        alone = slow_log_probs(model)[3].item()
        plain = stage._losses(batch)[0].item()
        stage.config.preference.supervised = 2.0
        both = stage._losses(batch)[0].item()
    assert both - plain == pytest.approx(-2.0 * alone / sum(encoded.supervised), rel=1e-4)


def reward_of(model: MultimodalGPT, seed: int) -> float:
    """Mean worth of drawn answers to prompts that were held out."""
    prompts = [[user(f"say {letter} {count}")] for letter, count in letter_prompts("val")]
    answers = draw(model, prompts, samples=16, max_new_tokens=12, seed=seed)
    return sum(letter_reward(prompt, text) for prompt, text in zip(answers.prompts, answers.texts)) / len(answers)


def test_a_policy_gets_better_at_what_was_preferred(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Supervised, then DPO: the drawn answers to unseen prompts are worth more."""
    shared: dict[str, Any] = {"data__train": [{"path": "letters", "split": "train", "limit": 384}], "data__batch_size": 16}
    config = write_reward_config(tmp_path / "sft.yaml", stage="instruct", trainer__epochs=6, **shared)
    assert train(config, "--run_dir", str(tmp_path / "sft")) == 0
    config = write_reward_config(
        tmp_path / "dpo.yaml", stage="preference", trainer__epochs=3, model__init_from=str(tmp_path / "sft"),
        optimizer__lr__language=1e-3, preference__supervised=1.0, **shared,
    )  # fmt: skip
    assert train(config, "--run_dir", str(tmp_path / "dpo")) == 0
    told = capsys.readouterr().err
    assert "ranked as people did" in told and "(margin.png)" in (tmp_path / "dpo" / "report.md").read_text()
    assert (tmp_path / "dpo" / "margin.png").is_file()
    # Above 0 on prompts that were held out: the policy has moved to what was preferred.
    assert [float(row["val/margin"]) for row in metric_rows(tmp_path / "dpo") if row.get("val/margin")][-1] > 0
    before, after = (reward_of(mmgpt.load(tmp_path / name, device="cpu"), 0) for name in ("sft", "dpo"))
    assert after > before + 0.1, (before, after)


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The reference is made again: were it that of the resumed weights, the rest would differ."""
    config = write_reward_config(
        tmp_path / "config.yaml", stage="preference", trainer__accumulate=2, trainer__epochs=2, trainer__checkpoint_every=2,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        keep_checkpoints(patch, tmp_path / "killed")
        assert train(config, "--run_dir", str(tmp_path / "whole")) == 0
    killed = killed_runs(tmp_path / "killed")
    assert len(killed) >= 2
    for run in killed:
        assert train(config, "--run_dir", str(run), "--resume", "true") == 0
        assert not differences(run_state(tmp_path / "whole"), run_state(run)), run.name
        assert metric_rows(run) == metric_rows(tmp_path / "whole"), run.name


def test_with_pictures_and_adapters(tmp_path: Path):
    for number in range(4):
        noise(number).save(tmp_path / f"{number}.png")
    import json

    rows = [{"image": f"{n}.png", "prompt": "What is it?", "answers": ["x", "yy", "z"], "ranks": [1, 2, 2]} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = write_config(
        tmp_path / "config.yaml", stage="preference", data__train=[{"path": str(tmp_path / "rows.jsonl")}], data__validation=[],
        data__holdout=0.25, data__feature_cache=False, optimizer__lr__vision=0.0, optimizer__lr__projector=0.0,
        model__language__lora={"rank": 2},
    )  # fmt: skip
    assert train(config, "--run_dir", str(tmp_path / "run")) == 0
    assert "| prompts of the same source | 2 |" in (tmp_path / "run" / "report.md").read_text()
    assert isinstance(mmgpt.load(tmp_path / "run", device="cpu"), MultimodalGPT)


def test_a_copy_with_an_untrained_projector_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The reference would be made before the projector is fitted to its first images."""
    noise(0).save(tmp_path / "0.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "0.png", "prompt": "What is it?", "chosen": "x", "rejected": "y"}\n' * 2)
    rows = [{"path": str(tmp_path / "rows.jsonl")}]
    config = write_config(tmp_path / "config.yaml", stage="preference", data__train=rows, data__validation=[])
    assert train(config, "--run_dir", str(tmp_path / "run")) == 2
    assert "whose projector is untrained: set model.init_from" in capsys.readouterr().err
