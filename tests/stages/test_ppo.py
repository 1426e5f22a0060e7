"""PPO: what an iteration learns from, its gradient, a run from prompts to policy, its rules, and resuming it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nano_runs import differences, keep_checkpoints, killed_runs, metric_rows, run_state, start, train, write_config
from tiny_models import grads, noise, tiny_config, tiny_model

from mmgpt.config import LoraConfig, OptimizerConfig, PartRates, PpoConfig, PtxConfig, RunConfig, SourceConfig
from mmgpt.data.letters import LetterReward
from mmgpt.data.messages import user
from mmgpt.data.prompts import Prompt
from mmgpt.loop.metrics import read_metrics
from mmgpt.model.heads import RewardModel
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.rl.experience import Experience
from mmgpt.rl.rewards import WeightedReward
from mmgpt.stages.ppo import Ppo
from mmgpt.train import parse, runs_before

LETTERS = {"class_path": "mmgpt.data.letters.LetterReward"}
RUN: dict[str, Any] = {
    "stage": "ppo",
    "model__vision": None,
    "model__language__architecture": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    },
    "model__language__lora": {"rank": 2, "alpha": 8.0, "dropout": 0.5},
    "data__train": [{"path": "letters", "split": "train", "limit": 64}],
    "data__validation": [{"path": "letters", "split": "val", "limit": 32}],
    "optimizer__lr__language": 1e-2,
    "ppo__iterations": 5,
    "ppo__batch_size": 6,
    "ppo__samples": 2,
    "ppo__minibatch_size": 5,
    "ppo__epochs": 2,
    "ppo__max_new_tokens": 6,
    "ppo__evaluate_every": 2,
    "ppo__kl": "adaptive",
    "ppo__rewards": [LETTERS],
}  # fmt: skip


def write_ppo_config(path: Path, **changes: Any) -> Path:
    """`write_config` without the parts of a model with eyes."""
    import yaml

    write_config(path, **{**RUN, **changes})
    settings = yaml.safe_load(path.read_text())
    if "model__vision" not in changes:
        settings["model"]["vision"] = None
    path.write_text(yaml.safe_dump(settings))
    return path


def halves(prompts: Any, answers: Any, images: Any) -> list[float]:
    """A reward that fails on some answers."""
    return [float("nan") if sum(map(ord, answer)) % 2 else 1.0 for answer in answers]


def never(prompts: Any, answers: Any, images: Any) -> list[float]:
    raise RuntimeError("the judge is on holiday")


# One iteration


class _Trainer:
    """As much of a trainer as an iteration asks for."""

    global_rank, world_size, precision, should_stop = 0, 1, "32-true", False


def make_stage(*, lora: int = 0, value: str = "head", vision: bool = False, **ppo: Any) -> Ppo:
    """A stage whose parts can be asked one by one; gradients are added up by plain `backward`."""
    rates = PartRates(0.0, 1e-3, 0.0)
    config = RunConfig(
        stage="ppo",
        model=tiny_config(vision=vision),
        optimizer=OptimizerConfig(lr=rates, clip=0.0),
        ppo=PpoConfig(**{"max_new_tokens": 6, "batch_size": 4, "samples": 2, "minibatch_size": 8, **ppo}),
    )
    model = tiny_model(vision=vision)
    if lora:
        config.model.language.lora = LoraConfig(rank=lora, dropout=0.5)
        model.restart(config.model)
    reference = None if lora else copy.deepcopy(model).requires_grad_(False)
    network = RewardModel(tiny_model(seed=1, vision=vision)) if value == "network" else None
    stage = Ppo(model, config, WeightedReward([("letters", 1.0, LetterReward())]), reference=reference, value=network)
    stage._trainer = _Trainer()  # type: ignore[assignment]
    stage.manual_backward = lambda loss, *args, **kwargs: loss.backward()  # type: ignore[method-assign]
    torch.nn.init.normal_(stage.value.head.weight, std=0.3)
    return stage


def prompts(images: bool = False) -> list[list[Any]]:
    return [[user(f"say {letter} 2", [noise(n)] if images else [])] for n, letter in enumerate("abcd")]


CASES = [("head", 0, False), ("head", 2, False), ("network", 0, False), ("network", 2, True), ("head", 0, True)]


@pytest.mark.parametrize(("value", "lora", "vision"), CASES)
def test_before_anything_is_learnt_policy_and_reference_are_one(value: str, lora: int, vision: bool):
    stage = make_stage(value=value, lora=lora, vision=vision)
    experience = stage._gather(prompts(vision))
    assert torch.equal(experience.old, experience.reference)
    assert float((experience.old - experience.rollout.log_probs).abs().max()) < 1e-4
    _, deviation = stage._backward(experience, list(range(8)), 8.0)
    assert deviation <= 1e-5  # 0, but for what other kernels round where gradients are kept


@pytest.mark.parametrize("lora", [0, 2])
def test_the_reference_stays_what_the_policy_was(lora: int):
    stage = make_stage(lora=lora)
    first = stage._gather(prompts())
    learnt = {name: p.requires_grad for name, p in stage.named_parameters()}
    with torch.no_grad():
        for p in stage._learnt().values():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    part = stage._minibatch(first.rollout, list(range(8)))
    assert torch.equal(stage._reference(part).log_probs, first.reference)
    assert not torch.equal(stage._replay(stage.model, part).log_probs, first.reference)
    # What is told at the end as "before" is the reference, in the decoder too.
    stage.held_out = [Prompt(prompt, "") for prompt in prompts()]
    assert stage.answer_as_reference().texts != stage.answer_held_out().texts
    part = stage._minibatch(stage.answer_as_reference(), [0, 1, 2, 3])
    gap = stage._reference(part).log_probs - stage.answer_as_reference().log_probs
    assert float(gap.abs().max()) < 1e-4
    assert {name: p.requires_grad for name, p in stage.named_parameters()} == learnt


def by_hand(stage: Ppo, experience: Experience) -> torch.Tensor:
    """The objective of the whole batch as one formula, answer by answer, in the model's own forward."""
    total = torch.zeros((), dtype=torch.float64)
    settings, rollout = stage.settings, experience.rollout
    tokens = int(rollout.mask.sum())
    for row in range(len(rollout)):
        answer = rollout.tokens[row][rollout.mask[row]]
        ids = torch.tensor([rollout.encoded[row].ids + answer.tolist()])
        states = stage.model.language.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        start = len(rollout.encoded[row].ids) - 1
        states = states[start : start + len(answer)]
        logits = stage.model.language.get_output_embeddings()(states)  # type: ignore[operator]
        log_probs = logits.log_softmax(-1)[range(len(answer)), answer]
        values = stage.value.head(states)
        for t in range(len(answer)):
            ratio = (log_probs[t] - experience.old[row, t]).exp()
            advantage, target, before = (x[row, t] for x in (experience.advantages, experience.returns, experience.values))
            surrogate = torch.min(ratio * advantage, ratio.clamp(1 - settings.clip, 1 + settings.clip) * advantage)
            bounded = before + (values[t] - before).clamp(-settings.value_clip, settings.value_clip)
            error = torch.max((values[t] - target) ** 2, (bounded - target) ** 2) / 2
            total = total + (-surrogate + settings.value_coefficient * error) / tokens
    return total


def test_the_gradient_is_that_of_the_objective():
    stage = make_stage(value_coefficient=0.5)
    experience = stage._gather(prompts())
    with torch.no_grad():  # the policy has moved since it drew
        for p in stage._learnt().values():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    stage._backward(experience, list(range(8)), float(experience.rollout.mask.sum()))
    ours = grads(stage)
    stage.zero_grad()
    by_hand(stage, experience).backward()
    for name, gradient in grads(stage).items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


def test_small_forwards_add_up_to_a_large_one():
    stage = make_stage()
    experience = stage._gather(prompts())
    count = float(experience.rollout.mask.sum())
    stage._backward(experience, list(range(8)), count)
    whole = grads(stage)
    stage.zero_grad()
    stage.settings.microbatch_size = 3
    found = [stage._backward(experience, part, count)[0] for part in stage._chunks(list(range(8)))]
    assert len(found) == 3
    for name, gradient in grads(stage).items():
        torch.testing.assert_close(whole[name], gradient, atol=1e-6, rtol=1e-4)


def test_pretraining_text_shares_the_gradient():
    """PPO-ptx: the gradient before the one optimizer step is that of the reward plus gamma times that of the text."""
    from mmgpt.config import DataConfig
    from mmgpt.data.loader import BatchLoader, Item
    from mmgpt.data.messages import Sample
    from mmgpt.data.rejections import RejectionReport
    from mmgpt.data.template import Encoded

    stage = make_stage(ptx=PtxConfig(coefficient=3.0))
    texts = [Item(Sample([], ""), Encoded(ids, [True] * len(ids), [])) for ids in ([5, 6, 7, 8], [9, 3, 4])]
    packing = DataConfig(max_length=8, batch_size=2)
    stage.ptx = BatchLoader(
        texts, packing, pad_id=stage.model.tokenizer.pad_id, images=None, report=RejectionReport(None), seed=0
    )
    experience = stage._gather(prompts())
    count = float(experience.rollout.mask.sum())
    stage._backward(experience, list(range(8)), count)
    alone = grads(stage)
    stage._backward_ptx()
    both = grads(stage)
    stage.zero_grad()
    for ids in ([5, 6, 7, 8], [9, 3, 4]):
        logits = stage.model.language(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        (3.0 * torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum") / 5).backward()
    text = grads(stage)
    for name, gradient in both.items():
        expected = alone[name] + text.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-4, msg=name)
    assert any(float(text[name].abs().max()) > 0 for name in text)


def test_an_answer_without_an_end_gets_the_penalty():
    stage = make_stage(max_new_tokens=2, no_eos_score=-7.0)
    experience = stage._gather(prompts())
    ended = experience.rollout.ended
    assert not ended.all()
    assert (experience.scores[~ended] == -7.0).all() and (experience.scores[ended] != -7.0).all()
    stage.settings.no_eos_score = None
    assert (stage._gather(prompts()).scores != -7.0).all()


def test_an_answer_without_text_gets_a_score_of_its_own(monkeypatch):
    stage = make_stage(no_eos_score=None, empty_score=-7.0)
    drawn = stage._draw

    def silent(*parts, **more):
        rollout = drawn(*parts, **more)
        rollout.texts[1], rollout.texts[4] = "", " \n"
        return rollout

    monkeypatch.setattr(stage, "_draw", silent)
    scores = stage._gather(prompts()).scores
    assert (scores == -7.0).nonzero().flatten().tolist() == [1, 4]
    stage.settings.empty_score = None
    assert (stage._gather(prompts()).scores != -7.0).all()


def test_the_score_is_earned_at_the_last_token_and_the_divergence_everywhere():
    stage = make_stage(lam=1.0, beta=0.5)
    with torch.no_grad():
        stage.value.head.weight.zero_()
        for p in stage._learnt().values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    experience = stage._gather(prompts())
    kl = (experience.old - experience.reference).masked_fill(~experience.rollout.mask, 0.0)
    # With lambda 1 and no value, the return at a token is all that is paid from there on.
    torch.testing.assert_close(experience.returns[:, 0], experience.scores - 0.5 * kl.sum(1), atol=1e-5, rtol=1e-4)


def test_answers_that_cannot_be_judged_are_dropped_and_counted():
    stage = make_stage()
    stage.reward = WeightedReward([("halves", 1.0, halves)])
    experience = stage._gather(prompts())
    kept = [text for text in experience.rollout.texts]
    assert all(sum(map(ord, text)) % 2 == 0 for text in kept) and stage.unjudged == 8 - len(kept) > 0
    assert len(experience.scores) == len(kept) == len(experience.advantages)
    # As many steps as on a process that lost none.
    assert len(stage._minibatches(len(kept), 0)) == len(stage._minibatches(8, 0))


# Whole runs


def test_a_run_ends_with_a_better_policy_and_its_health(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = write_ppo_config(
        tmp_path / "config.yaml",
        model__language__lora={"rank": 0},
        optimizer__lr__language=3e-3,
        ppo__iterations=24,
        ppo__batch_size=24,
        ppo__samples=4,
        ppo__minibatch_size=24,
        ppo__beta=0.01,
        ppo__kl="fixed",
        ppo__warmup=2,
        ppo__ema=0.8,
        ppo__evaluate_every=6,
        ppo__ptx={"sources": [{"path": "letters", "split": "train", "limit": 32}], "coefficient": 0.01, "batch_size": 8},
    )
    run = tmp_path / "run"
    assert train(config, "--run_dir", str(run)) == 0, capsys.readouterr().err
    for name in ("health.png", "samples.md", "metrics.csv", "config.yaml", "model/model.safetensors", "checkpoints/last.ckpt"):
        assert (run / name).stat().st_size > 0, name
    series = read_metrics(run / "metrics.csv")
    assert max(value for _, value in series["train/ratio_deviation"]) <= 1e-5
    assert series["train/kl"][0][1] == pytest.approx(0, abs=1e-6)
    scores = [value for _, value in series["train/score"]]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.15
    assert [step for step, _ in series["val/score"]] == [5, 11, 17, 23]
    # What was exported is what scored best on the held-out prompts.
    best = max(value for name in ("val/score", "start/score") for _, value in series[name])
    assert f"| after | {best:.3f} |" in (run / "samples.md").read_text()
    assert "best held-out reward" in capsys.readouterr().err
    assert MultimodalGPT.from_pretrained(run).ask(None, "say a 1") is not None


def test_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed after any iteration, with adapters that have dropout, two epochs, EMA, an adaptive penalty and pretraining text."""
    config = write_ppo_config(
        tmp_path / "config.yaml",
        trainer__checkpoint_every=1,
        ppo__ptx={"sources": [{"path": "letters", "split": "train", "limit": 9}], "coefficient": 1.0, "batch_size": 2},
    )
    with monkeypatch.context() as patch:
        keep_checkpoints(patch, tmp_path / "killed")
        assert train(config, "--run_dir", str(tmp_path / "whole")) == 0
    expected, rows = _state(tmp_path / "whole"), _rows(tmp_path / "whole")
    killed = killed_runs(tmp_path / "killed")
    assert [path.name for path in killed] == [f"step{n}" for n in range(1, 6)]
    for run in killed:
        assert train(config, "--run_dir", str(run), "--resume", "true") == 0
        assert not differences(expected, _state(run)), run.name
        assert _rows(run) == rows, run.name


def _state(run: Path) -> dict[str, Any]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    return {**run_state(run), "ppo": checkpoint["ppo"]}


def _rows(run: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if not key.endswith("_per_s")} for row in metric_rows(run)]


def test_dropout_between_drawing_and_learning_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The mistake that the test of the ratio exists for."""
    learn = Ppo._learn

    def careless(self: Ppo, experience: Any) -> Any:
        for module in self.model.modules():
            module.training = True
        return learn(self, experience)

    monkeypatch.setattr(Ppo, "_learn", careless)
    # Adapters that begin at 0 hide their dropout: the second iteration has learnt something.
    config = write_ppo_config(tmp_path / "config.yaml")
    assert train(config, "--run_dir", str(tmp_path / "run")) == 1
    said = capsys.readouterr().err
    assert "before its first step the policy gives its own answers a probability" in said and "Traceback" not in said


def test_a_policy_that_runs_away_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, said = write_ppo_config(tmp_path / "config.yaml", ppo__iterations=30, ppo__max_kl=1e-9), "ppo.max_kl is 1e-09"
    assert train(config, "--run_dir", str(tmp_path / "run")) == 0
    err = capsys.readouterr().err
    assert "stopped by rule after iteration" in err and said in err
    assert len(metric_rows(tmp_path / "run")) < 30
    assert said in (tmp_path / "run" / "samples.md").read_text()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(("lengths", "stops"), [([4.0, 9.0, 11.9], False), ([4.0, 9.0, 12.1], True)])
def test_answers_that_grow_without_end_stop_a_run(lengths: list[float], stops: bool):
    stage = make_stage(max_growth=3.0)
    for length in lengths:
        stage._watch({"length": length, "kl": 1.0})
    assert ("3.0 times as long as at first" in stage.stopped) == stops == stage.trainer.should_stop


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"ppo__rewards": []}, 2, "ppo.rewards names no reward"),
        ({"ppo__rewards": [{"class_path": f"{__name__}.never"}]}, 1, "could judge none of the 12 answers"),
        ({"ppo__minibatch_size": 13}, 2, "ppo.minibatch_size 13 is larger than an iteration's answers (6 prompts with 2 each)"),
        ({"ppo__microbatch_size": 9}, 2, "ppo.microbatch_size 9 is larger"),
        ({"ppo__temperature": 0.0}, 2, "ppo.temperature is 0.0, but must be above 0"),
        ({"ppo__max_new_tokens": 128}, 2, "no room for a prompt"),
        ({"trainer__epochs": 2}, 2, "counts in iterations"),
        ({"trainer__precision": "fp16"}, 2, "no loss scaler"),
        ({"ppo__value_from": "nowhere"}, 1, "nowhere"),
        ({"data__train": [{"path": "nothing.jsonl"}]}, 2, "no such file or folder: nothing.jsonl"),
    ],
)
def test_what_cannot_be_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], code: int, said: str
):
    config = write_ppo_config(tmp_path / "config.yaml", **changes)
    assert train(config, "--run_dir", str(tmp_path / "run")) == code
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_a_policy_with_eyes_learns_from_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Adapters in encoder and decoder, a critic of its own, and the reference that sees with the encoder of the beginning."""
    shapes = [{"path": "shapes", "split": "train", "limit": 12}]
    eyes = {"name": "timm:vit_tiny_patch16_224", "layer": -1, "lora": {"rank": 2}, "options": {
        "pretrained": False, "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2,
    }}  # fmt: skip
    reward = write_ppo_config(
        tmp_path / "reward.yaml", stage="reward", model__vision=eyes, ppo__rewards=[], model__language__lora={"rank": 0},
        data__train=[{"path": str(_ranked_pictures(tmp_path))}], data__validation=[], optimizer__lr__vision=0.0,
    )  # fmt: skip
    assert train(reward, "--run_dir", str(tmp_path / "reward")) == 0, capsys.readouterr().err
    config = write_ppo_config(
        tmp_path / "config.yaml", model__vision=eyes, data__train=shapes, data__validation=[], data__holdout=0.2,
        model__init_from=str(tmp_path / "reward"), ppo__value_from=str(tmp_path / "reward"), ppo__iterations=3,
        ppo__rewards=[{"class_path": "mmgpt.rl.rewards.LearnedReward", "init_args": {"path": str(tmp_path / "reward")}}],
        optimizer__lr__projector=0.0,
    )  # fmt: skip
    assert train(config, "--run_dir", str(tmp_path / "run")) == 0, capsys.readouterr().err
    series = read_metrics(tmp_path / "run" / "metrics.csv")
    assert max(value for _, value in series["train/ratio_deviation"]) <= 1e-5
    assert series["train/kl"][0][1] == pytest.approx(0, abs=1e-5)
    assert MultimodalGPT.from_pretrained(tmp_path / "run").accepts_images


def _ranked_pictures(folder: Path) -> Path:
    import json

    rows = []
    for number in range(6):
        noise(number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": "what is it?", "chosen": f"noise {number}", "rejected": "a cat"})
    path = folder / "ranked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_two_processes_learn_together(tmp_path: Path):
    config = write_ppo_config(
        tmp_path / "config.yaml",
        ppo__iterations=2,
        ppo__rewards=[{"class_path": "mmgpt.data.letters.LetterReward"}],
        trainer__devices=2,
        trainer__strategy="ddp",
        ppo__ptx={"sources": [{"path": "letters", "limit": 9}], "coefficient": 1.0, "batch_size": 2},
    )
    process = start("--config", str(config), "--run_dir", str(tmp_path / "run"))
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert len(metric_rows(tmp_path / "run")) == 2


def test_a_run_takes_the_runs_before_it_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = write_ppo_config(
        tmp_path / "first.yaml", stage="instruct", run_dir=str(tmp_path / "a"), model__language__lora={"rank": 0}
    )
    config = write_ppo_config(
        tmp_path / "config.yaml",
        first=[str(first)],
        run_dir=str(tmp_path / "b"),
        model__init_from=str(tmp_path / "a"),
        ppo__iterations=1,
    )
    (before,) = runs_before(parse(["--config", str(config), "--trainer.threads", "3", "--trainer.accelerator", "cpu"]))
    assert before.stage == "instruct" and (before.trainer.threads, before.trainer.accelerator) == (3, "cpu")
    assert train(config) == 0
    assert f"first: {tmp_path / 'a'} (instruct)" in capsys.readouterr().err
    assert train(config, "--overwrite", "true") == 0
    assert "first:" not in capsys.readouterr().err
    circle = write_ppo_config(tmp_path / "circle.yaml", first=[str(tmp_path / "circle.yaml")], run_dir=str(tmp_path / "c"))
    assert train(circle) == 2
    assert "goes in a circle" in capsys.readouterr().err


def test_a_book_can_be_the_pretraining_mix(tmp_path: Path):
    (tmp_path / "book.txt").write_text("once upon a time there was a letter. " * 20)
    prompts = [{"prompt": f"say c {count % 5 + 1}"} for count in range(20)] + [{"prompt": "say c 1" * 100}] * 3
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    config = write_ppo_config(
        tmp_path / "config.yaml",
        ppo__iterations=2,
        # Prompts that are too long are no bad texts: a book is one text.
        data__train=[vars(SourceConfig(path=str(tmp_path / "prompts.jsonl")))],
        data__max_bad=0.2,
        ppo__ptx={
            "sources": [vars(SourceConfig(path=str(tmp_path / "book.txt")))],
            "coefficient": 1.0,
            "batch_size": 2,
            "length": 32,
        },
    )
    assert train(config, "--run_dir", str(tmp_path / "run")) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.csv")["train/ptx_loss"]) == 2
