"""The reward stage: gradients of one long loop over pairs, a run from data to report, and resuming it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from nano_runs import differences, keep_checkpoints, killed_runs, metric_rows, run_state, train, write_config
from tiny_models import enliven, grads, noise, tiny_config, tiny_model

from mmgpt.config import OptimizerConfig, PartRates, RunConfig
from mmgpt.data.branching import collate_answers
from mmgpt.data.letters import rank_letters
from mmgpt.data.messages import user
from mmgpt.data.ranked import Preference, RankedItem, rank_item, ranked_pairs
from mmgpt.model.heads import RewardModel
from mmgpt.rl.losses import reward_loss
from mmgpt.stages.reward import Reward

TEXT = {
    "stage": "reward",
    "model__vision": None,
    "model__language__architecture": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "data__train": [{"path": "letters", "split": "train", "limit": 64}],
    "data__validation": [{"path": "letters", "split": "val", "limit": 16}],
    "data__batch_size": 8,
    "optimizer__lr__language": 3e-3,
}  # fmt: skip


def write_reward_config(path: Path, **changes: object) -> Path:
    """`write_config` without the parts of a model with eyes."""
    import yaml

    write_config(path, **{**TEXT, **changes})
    settings = yaml.safe_load(path.read_text())
    settings["model"]["vision"] = None
    path.write_text(yaml.safe_dump(settings))
    return path


def item(model: RewardModel, preference: Preference) -> RankedItem:
    found = rank_item(preference, model.model.encode, 400)
    assert isinstance(found, RankedItem)
    return found


def test_gradients_equal_those_of_each_pair_on_its_own():
    """One pass over shared prompts against K (K - 1) separate passes, each pair its own two rows."""
    torch.manual_seed(0)
    config = RunConfig(stage="reward", model=tiny_config(), optimizer=OptimizerConfig(lr=PartRates(1e-3, 1e-3, 1e-3)))
    model = enliven(RewardModel(tiny_model()))
    Reward(model, config, None, 1)
    rankings = [([noise(1)], ["a", "bb", "abc", "d"], [2, 1, 3, 3]), ([], ["yes", "no"], [1, 2])]
    preferences = [
        Preference([user("q", images)], answers, ranked_pairs(ranks), math.comb(len(answers), 2), f"row {number}")
        for number, (images, answers, ranks) in enumerate(rankings)
    ]
    batch = collate_answers([[item(model, preference) for preference in preferences]], 0)
    batch.images = model.model.pixels(batch.images)
    loss = reward_loss(model(batch), batch.better, batch.worse, batch.weights, 2)
    loss.backward()
    ours = grads(model)
    model.zero_grad()
    total = 0.0
    for preference in preferences:
        for better, worse in preference.pairs:
            pair = Preference(preference.prompt, [preference.answers[better], preference.answers[worse]], [(0, 1)], 1, "pair")
            rows = collate_answers([[item(model, pair)]], 0, share=False)
            rows.images = model.model.pixels(rows.images) if rows.images else None
            scores = model(rows)
            part = -torch.nn.functional.logsigmoid(scores[0] - scores[1]) / preference.compared / 2
            part.backward()
            total += float(part)
    assert float(loss) == pytest.approx(total, rel=1e-5)
    theirs = grads(model)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], atol=2e-5 * max(1.0, float(theirs[name].abs().max()))), name


def test_there_is_no_dropout_and_the_unembedding_rests():
    torch.manual_seed(0)
    settings = tiny_config(vision=False)
    settings.language.lora.rank, settings.language.lora.dropout = 2, 0.5
    config = RunConfig(stage="reward", model=settings, optimizer=OptimizerConfig(lr=PartRates(language=1e-3)))
    whole = RunConfig(stage="reward", optimizer=OptimizerConfig(lr=PartRates(language=1e-3)))
    model = RewardModel(type(tiny_model(vision=False)).from_config(settings))
    stage = Reward(model, config, None, 1)
    model.train()
    stage.on_train_epoch_start()
    assert not any(module.training for module in model.modules())
    assert model.head.weight.requires_grad
    learnt = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name.startswith("head.") for name in learnt)
    untied = RewardModel(tiny_model(vision=False))
    Reward(untied, whole, None, 1)
    assert not untied.language.lm_head.weight.requires_grad and untied.model.embedding.weight.requires_grad
    tied = RewardModel(tiny_model("tied", vision=False))
    Reward(tied, whole, None, 1)
    assert tied.model.embedding.weight.requires_grad


def test_a_run_learns_to_rank_and_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The exported model ranks prompts that it never saw; its demonstrations score 0."""
    folder = tmp_path / "run"
    config = write_reward_config(
        tmp_path / "config.yaml",
        data__train=[{"path": "letters", "split": "train", "limit": 384}],
        trainer__epochs=8,
        reward__demonstration_limit=32,
    )
    assert train(config, "--run_dir", str(folder)) == 0
    told = capsys.readouterr().err
    assert " prompts with " in told and " ties" in told and "32 demonstrations score 0" in told
    left = {path.name for path in folder.iterdir()}
    assert {"report.md", "calibration.png", "loss.png", "accuracy.png", "metrics.csv", "model"} <= left
    model = RewardModel.from_pretrained(folder)
    wins = total = 0
    for preference in rank_letters("val", 64):
        scores = model.score([preference.prompt] * len(preference.answers), preference.answers)
        wins += sum(bool(scores[better] > scores[worse]) for better, worse in preference.pairs)
        total += len(preference.pairs)
    assert wins / total > 0.75
    assert json.loads((folder / "model" / "config.json").read_text())["vision"] is None


def test_pictures_show_batch_and_a_second_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(6):
        noise(number).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "prompt": "What is it?", "answers": ["x", "y", "zz"], "ranks": [1, 2, 3]} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "ranks": [1, 1, 1]}])))
    source = {"path": str(tmp_path / "rows.jsonl")}
    config = write_config(
        tmp_path / "config.yaml", stage="reward", data__train=[source], data__validation=[], data__holdout=0.34,
        data__max_bad=0.2, data__feature_cache=False,
        evaluate__source={"path": "letters", "split": "val", "limit": 4}, trainer__max_steps=2,
    )  # fmt: skip
    assert train(config, "--run_dir", str(tmp_path / "run"), "--show_batch", "true") == 0
    shown = capsys.readouterr().out
    assert "What is it?" in shown and "1 > 2, 1 > 3, 2 > 3" in shown and not (tmp_path / "run").exists()
    assert train(config, "--run_dir", str(tmp_path / "run")) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| prompts of the same source | 6 |" in report and "| letters |" in report
    bad = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in bad] == ["only_ties"]


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed after every checkpoint in turn, bit for bit."""
    config = write_reward_config(
        tmp_path / "config.yaml", trainer__accumulate=2, trainer__epochs=2, trainer__checkpoint_every=3,
        model__language__lora={"rank": 2, "dropout": 0.5},
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
        ours, theirs = (RewardModel.from_pretrained(folder).state_dict() for folder in (run, tmp_path / "whole"))
        assert not differences(ours, theirs)


@pytest.mark.parametrize(("changes", "message"), [
    ({"data__stream": True, "trainer__max_steps": 2}, "grouped by prompt"),
    ({"data__train": []}, "names no source"),
    ({"data__train": [{"path": "shapes"}]}, "shapes"),
])  # fmt: skip
def test_what_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes, message):
    config = write_reward_config(tmp_path / "config.yaml", **changes)
    assert train(config, "--run_dir", str(tmp_path / "run")) in (1, 2)
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
