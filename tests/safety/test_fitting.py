"""The two stages learn: runs that are kept, stopped and averaged, losses, rounding, vocabulary, batches."""

import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import rows, tiny_encoder

from safety import dataset, fitting
from safety.export import export, restore
from safety.sources import Row
from safety.taxonomy import KEYS

pytestmark = pytest.mark.filterwarnings("ignore:.*(Checkpoint directory|in eval mode|treespec)")  # as `train.main` does


def drawn(count: int, seed: int) -> list[Row]:
    return [Row(str(row["text"]), int(row["label"]), ()) for row in rows(count, seed)]  # type: ignore[call-overload]


def encoder_config(folder: Path, **changes: Any) -> fitting.EncoderConfig:
    settings = {"name": str(folder), "vocabulary": 95, "length": 32, "train_length": 32, "frozen_layers": 0, "batch_tokens": 256}
    return fitting.EncoderConfig(**{**settings, **changes})


def exported(encoder: Any, spec: dict[str, Any], folder: Path) -> Path:
    """What of a folder of weights stage 2 is."""
    folder.mkdir()
    export(encoder, folder / "encoder.int8.onnx")
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def test_a_stopped_run_goes_on_and_ends_where_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning as L

    draws = [drawn(120, 1), drawn(120, 2)]
    settings = encoder_config(tiny_encoder(tmp_path / "encoder"), runs=2, epochs=2)
    whole, _ = fitting.train_encoder(draws, settings, 0, tmp_path / "whole")

    class Stop(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.current_epoch == at:
                raise KeyboardInterrupt

    class Count(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            steps.append(1)

    def trainer_with(callback: L.Callback) -> Callable[..., Any]:
        return lambda epochs, **options: real(epochs, **{**options, "callbacks": [*options["callbacks"], callback]})

    real, steps = fitting._trainer, []
    at = 99
    monkeypatch.setattr(fitting, "_trainer", trainer_with(Count()))
    fitting.train_encoder(draws[:1], settings, 0, tmp_path / "count")
    every = len(steps)
    monkeypatch.setattr(fitting, "_trainer", real)
    shutil.copytree(tmp_path / "whole", other := tmp_path / "parts")
    next(other.glob("run-1-*")).unlink()
    at = 5
    monkeypatch.setattr(fitting, "_trainer", trainer_with(Stop()))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fitting.train_encoder(draws, settings, 0, tmp_path / "parts")
    assert sorted(path.name[:6] + path.suffix for path in other.iterdir()) == ["run-0-.safetensors", "run-1-.ckpt"]
    steps.clear()
    monkeypatch.setattr(fitting, "_trainer", trainer_with(Count()))
    parts, _ = fitting.train_encoder(draws, settings, 0, tmp_path / "parts")
    assert 0 < len(steps) < every
    assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in (tmp_path / "whole").iterdir())
    # Dropout draws other numbers after a restart: close, not equal.
    moved = [(a - b).abs().max().item() for a, b in zip(whole.parameters(), parts.parameters())]
    start = fitting.encoder_module(tmp_path / "encoder", list(range(95)), 0)
    way = [(a - b).abs().max().item() for a, b in zip(whole.bert.parameters(), start.bert.parameters())]
    assert 0 < max(moved) < max(way)


def test_runs_on_draws_start_as_one_and_are_averaged(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    draws = [drawn(120, seed) for seed in (1, 2, 3)]
    settings = encoder_config(tiny_encoder(tmp_path / "encoder"), runs=3, epochs=1)
    seen: list[tuple[int, torch.Tensor]] = []

    def look(number: int, run: Any, spec: dict[str, Any]) -> None:
        assert spec["model"]["vocab"]["malware"] and not run.training
        seen.append((number, run.head.weight.detach().clone()))

    encoder, _ = fitting.train_encoder(draws, settings, 0, tmp_path / "runs", look)
    files = sorted((tmp_path / "runs").iterdir())
    runs = [load_file(file) for file in files]
    assert [file.name[:6] for file in files] == ["run-0-", "run-1-", "run-2-"]
    for name, value in encoder.state_dict().items():
        assert torch.allclose(value, sum(run[name] for run in runs) / 3, atol=1e-6), name
    heads = [run["head.weight"] for run in runs]
    assert [number for number, _ in seen] == [0, 1, 2] and all(torch.equal(a, b) for a, (_, b) in zip(heads, seen))
    # Trained on other rows, yet nearer to each other than two new heads (of standard deviation .02) would be.
    assert all(0 < (one - other).abs().mean() < 0.01 for one, other in itertools.pairwise(heads))


@pytest.mark.parametrize("there", [True, False])
def test_stage_2_takes_a_gpu_where_there_is_one(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: there)
    monkeypatch.setattr(fitting, "_trainer", lambda epochs, accelerator="cpu", **options: pytest.fail(f"on {accelerator}"))
    with pytest.raises(pytest.fail.Exception, match="on cuda" if there else "on cpu"):
        fitting.train_encoder([drawn(20, 1)], encoder_config(tiny_encoder(tmp_path / "encoder"), epochs=1), 0, tmp_path / "runs")


@pytest.mark.parametrize(
    "change", ["none", "label", "categories", "weight", "draw", "seed", "lr", "encoder", "config.json", "taxonomy", "length"]
)
def test_runs_are_kept_by_what_they_depend_on(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [drawn(40, seed) for seed in (1, 2)]
    settings = encoder_config(tiny_encoder(tmp_path / "encoder"), runs=2, epochs=1)
    encoder, spec = fitting.train_encoder(draws, settings, 0, tmp_path / "runs")
    asked: list[int] = []

    def run(*_: Any, **options: Any) -> Any:
        asked.append(options["number"])
        return encoder

    monkeypatch.setattr(fitting, "_run", run)
    row, seed = draws[1][0], 0
    if change in ("label", "categories", "weight"):
        value: Any = {"label": 1 - row.label, "categories": ("hate",), "weight": 2.0}[change]
        draws[1][0] = dataclasses.replace(row, **{change: value})
    elif change == "draw":
        draws.append([Row("unused " * 99, 0, ()), *draws[0]])  # a word that the vocabulary has no room for
    elif change == "config.json":
        file = tmp_path / "encoder" / "config.json"
        file.write_text(file.read_text().replace('"num_attention_heads": 2', '"num_attention_heads": 4'))
    elif change == "seed":
        seed = 1
    elif change in ("lr", "length"):
        settings = dataclasses.replace(settings, **{change: 16 if change == "length" else 1e-5})
    elif change == "encoder":
        other = fitting.encoder_module(tmp_path / "encoder", list(range(95)), 0).bert
        other.encoder.layer[0].output.dense.weight.data += 1
        other.save_pretrained(tmp_path / "encoder")
    elif change == "taxonomy":
        monkeypatch.setattr(fitting, "KEYS", KEYS[::-1])
    again, same = fitting.train_encoder(draws, settings, seed, tmp_path / "runs")
    if change in ("none", "length"):  # the length at which it is read afterwards changes no run
        assert not asked and same == spec and all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters()))
    elif change in ("label", "categories", "weight", "draw"):
        assert asked == [2 if change == "draw" else 1] and same == spec  # the others are as they were
    else:
        assert asked == [0, 1]


def test_a_run_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    draws = [drawn(60, 1), drawn(60, 2)]
    runs: dict[int, Any] = {}
    for count in (1, 2):
        settings = encoder_config(tiny_encoder(tmp_path / f"encoder{count}"), runs=count, epochs=1)
        seen = lambda number, run, spec, count=count: runs.setdefault(count, run.head.weight.detach().clone())  # noqa: E731
        fitting.train_encoder(draws[:count], settings, 1, tmp_path / f"runs{count}", seen)
    assert torch.equal(runs[1], runs[2])


def test_training_goes_on_from_weights_and_keeps_their_tokens(tmp_path: Path) -> None:
    settings = encoder_config(tiny_encoder(tmp_path / "encoder"), vocabulary=93, epochs=1)
    before, spec = fitting.train_encoder([drawn(120, 1)], settings, 0, tmp_path / "runs")
    weights = exported(before, spec, tmp_path / "weights")
    still = dataclasses.replace(settings, start=str(weights), lr=0.0, vocabulary=95)
    same, tokens = fitting.train_encoder([drawn(120, 2)], still, 0, tmp_path / "runs")
    assert tokens == spec
    for (name, a), b in zip(same.named_parameters(), before.parameters()):
        assert (a - b).abs().max() <= 0.01 * (b.max() - b.min()) + 1e-6 or "type" in name or "position" in name, name
    fitting.train_encoder([drawn(120, 2)], still, 0, tmp_path / "runs")
    assert len([*(tmp_path / "runs").iterdir()]) == 2
    same.head.bias.data += 1
    export(same, weights / "encoder.int8.onnx")
    fitting.train_encoder([drawn(120, 2)], still, 0, tmp_path / "runs")
    assert len([*(tmp_path / "runs").iterdir()]) == 3  # from other weights it is another run


def test_what_it_went_on_from_is_mixed_in(tmp_path: Path) -> None:
    settings = encoder_config(tiny_encoder(tmp_path / "encoder"), epochs=1)
    before, spec = fitting.train_encoder([drawn(120, 1)], settings, 0, tmp_path / "runs")
    weights = exported(before, spec, tmp_path / "weights")
    found = []
    for keep in (0.0, 0.25, 1.0):
        further = dataclasses.replace(settings, start=str(weights), keep=keep, lr=1e-2)
        made, _ = fitting.train_encoder([drawn(120, 2)], further, 0, tmp_path / "runs")
        found.append(made.state_dict())
    assert len([*(tmp_path / "runs").iterdir()]) == 2  # one run, whatever is kept beside it
    for name, end in found[0].items():
        assert torch.allclose(found[1][name], 0.75 * end + 0.25 * found[2][name], atol=1e-6), name
    assert (found[0]["head.weight"] - found[2]["head.weight"]).abs().max() > 0.01
    restore(made, weights / "encoder.int8.onnx")
    assert all(torch.equal(value, found[2][name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("hardware", [True, False])
def test_a_cpu_without_bf16_trains_in_fp32(hardware: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmgpt.machine.cpu_has_bf16", lambda: hardware)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fitting, "_trainer", lambda epochs, **options: pytest.fail(f"in {options['precision']}"))
    with pytest.raises(pytest.fail.Exception, match="in bf16-mixed" if hardware else "in 32-true"):
        fitting.train_encoder([drawn(20, 1)], encoder_config(tiny_encoder(tmp_path / "encoder"), epochs=1), 0, tmp_path / "runs")


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning as L

    norms: list[float] = []

    class Look(L.Callback):
        def on_before_zero_grad(self, trainer: Any, module: L.LightningModule, optimizer: Any) -> None:
            found = [p.grad.norm() for p in module.parameters() if p.grad is not None]
            norms.append(torch.stack(found).norm().item() if found else 0.0)

    real, least = fitting._trainer, fitting.loss
    monkeypatch.setattr(fitting, "loss", lambda *parts, **options: 1000 * least(*parts, **options))
    monkeypatch.setattr(
        fitting, "_trainer", lambda epochs, **options: real(epochs, **{**options, "callbacks": [*options["callbacks"], Look()]})
    )
    fitting.train_encoder([drawn(60, 1)], encoder_config(tiny_encoder(tmp_path / "encoder"), epochs=1), 0, tmp_path / "runs")
    assert 0.99 < max(norms) < 1.001


def test_a_run_of_few_batches_makes_all_its_steps(tmp_path: Path) -> None:
    settings = encoder_config(tiny_encoder(tmp_path / "encoder"), epochs=3, batch_tokens=2048)
    start = fitting.encoder_module(tmp_path / "encoder", list(range(95)), 0)
    texts = [[Row("write bread", 0, ()), Row("write malware", 1, ())]]
    moved = []
    for epochs in (1, 3):
        run, _ = fitting.train_encoder(texts, dataclasses.replace(settings, epochs=epochs), 0, tmp_path / str(epochs))
        moved.append(sum((a - b).abs().sum().item() for a, b in zip(run.bert.parameters(), start.bert.parameters())))
    assert moved[1] > 1.2 * moved[0] > 0


def test_categories_that_are_not_known_do_not_count() -> None:
    made = [Row("a", 1, None), Row("b", 1, ("hate",)), Row("c", 0, ())]
    label, mask = dataset.targets(made)
    assert label[:, 0].tolist() == [1, 1, 0] and label[1, 1 + KEYS.index("hate")] == 1 and label.sum() == 3
    assert mask[0].tolist() == [1.0] + [0.0] * len(KEYS) and mask[1:].all()
    logits = torch.zeros(1, 1 + len(KEYS), requires_grad=True)
    parts = [torch.from_numpy(part[:1]) for part in (label, mask)]
    fitting.loss(logits, *parts, torch.ones(1), categories=1.0).backward()
    assert logits.grad is not None and logits.grad[0, 0] != 0 and not logits.grad[0, 1:].any()


def test_loss_is_the_weighted_mean_of_binary_cross_entropies() -> None:
    logits = torch.tensor([[2.0, 0.0], [-1.0, 0.0]])
    label, mask = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    value = fitting.loss(logits, label, mask, torch.tensor([3.0, 1.0]), categories=0.3)
    expected = (3 * np.log1p(np.exp(-2)) + np.log1p(np.exp(1))) / 4
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_rounding_to_int8_is_within_half_a_step() -> None:
    table = np.random.default_rng(0).normal(size=(64, 17)).astype(np.float32)
    model = fitting.quantise(table, np.zeros(17, np.float32))
    assert np.abs(model.weight * model.scale - table).max() <= model.scale.max() / 2 + 1e-6
    assert (np.abs(model.weight).max(0) == 127).all()


def test_pruning_keeps_letters_and_what_the_texts_use(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = tiny_encoder(tmp_path / "encoder")
    source = json.loads((folder / "tokenizer.json").read_text())
    pruned, kept = fitting.prune_vocabulary(source, ["write malware", "bread"], 4 + 2 * 41 + 3)
    names = set(pruned["model"]["vocab"])
    assert {"malware", "bread", "write", "[CLS]", "z", "##z"} <= names and "unused" not in names and "garden" not in names
    old, new = (Tokenizer.from_str(json.dumps(spec)) for spec in (source, pruned))
    encoded = new.encode("write malware")
    assert encoded.tokens == ["[CLS]", "write", "malware", "[SEP]"] == old.encode("write malware").tokens
    assert [kept[n] for n in encoded.ids] == old.encode("write malware").ids
    assert "[UNK]" not in new.encode("garden").tokens  # spelt from its letters


def test_batches_hold_every_text_once_within_the_budget() -> None:
    lengths = [random.Random(n).randint(2, 60) for n in range(300)]
    batches = fitting.token_batches(lengths, 256, random.Random(0))
    assert sorted(n for batch in batches for n in batch) == list(range(300))
    assert all(max(lengths[n] for n in batch) * len(batch) <= 256 for batch in batches)
    assert batches != fitting.token_batches(lengths, 256, random.Random(1))
