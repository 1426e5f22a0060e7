"""Training on generated prompts with a tiny encoder: from files to weights that the filter loads."""

import dataclasses
import itertools
import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmgpt.errors import UsageError, UserError
from safety import calibrate, dataset, fitting, sources, train
from safety.calibrate import Bounds
from safety.classifier import Linear, Transformer
from safety.sources import Row
from safety.taxonomy import KEYS

pytestmark = pytest.mark.filterwarnings("ignore:.*(Checkpoint directory|in eval mode|treespec)")  # as `train.main` does

BAD, GOOD = ("bomb", "poison", "malware"), ("bread", "garden", "music")


def tiny_encoder(folder: Path) -> Path:
    """A BERT of two layers of width 16 that knows the letters and a few words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    letters = "abcdefghijklmnopqrstuvwxyz0123456789?.,:'"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{c}" for c in letters),
        *BAD,
        *GOOD,
        "how",
        "make",
        "write",
        "unused",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def rows(count: int, seed: int) -> list[dict[str, object]]:
    rng = random.Random(seed)
    out: list[dict[str, object]] = []
    for n in range(count):
        word = rng.choice(BAD if n % 2 else GOOD)
        text = f"{rng.choice(('how do i make', 'write about', 'tell me of'))} {word} number {rng.randrange(10**6)}"
        out.append({"text": text, "label": n % 2, **({"categories": ["code_abuse"]} if word == "malware" else {})})
    return out


def config(folder: Path, **changes: object) -> train.Config:
    own = folder / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows(400, 0)))
    pairs, requests, documents = folder / "pairs", folder / "requests.yaml", folder / "documents"
    pairs.mkdir()
    documents.mkdir()
    lines = [{"category": "code_abuse", "sensitive": f"make malware {n}", "harmless": f"make music {n}"} for n in range(60)]
    (pairs / "code_abuse.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    requests.write_text("words: {}\nframings: {}\nsensitive: {}\nharmless: {}\nattacks: {}\neveryday: []\n")
    data = dataset.Data(own=[str(own)], pairs=str(pairs), requests=str(requests), documents=str(documents), tests=[], holdout=0.3)
    settings = {
        "data": data,
        "linear": fitting.LinearConfig(bits=12, epochs=6, lr=0.2),
        "encoder": fitting.EncoderConfig(
            name=str(tiny_encoder(folder / "encoder")),
            vocabulary=95,
            length=32,
            train_length=32,
            frozen_layers=0,
            runs=2,
            epochs=12,
            batch_tokens=512,
            lr=1e-2,
        ),
        "points": {"strict": Bounds(0.05, 0.1), "balanced": Bounds(0.02, 0.05), "loose": Bounds(0.0, 0.0)},
        "output": str(folder / "weights"),
        "run_dir": str(folder / "run"),
    }
    return train.Config(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train.execute(config(tmp_path_factory.mktemp("run")))


def test_trained_weights_tell_the_words_apart_and_load(trained: Path) -> None:
    from safety import weights

    files, calibration = weights.read(trained)
    texts = ["how do i make malware number 7", "how do i make bread number 7", "write about poison", "write about a garden"]
    linear = Linear.load(files["linear.npz"]).logits(texts)[:, 0]
    transformer = Transformer(files["encoder.int8.onnx"], files["tokenizer.json"], length=32, overlap=8)
    second = transformer.logits(texts)
    for scores in (linear, second[:, 0]):
        assert min(scores[0], scores[2]) > max(scores[1], scores[3])
    assert second.shape == (4, 1 + len(KEYS))
    column = 1 + KEYS.index("code_abuse")
    assert second[0, column] > max(second[1, column], second[3, column])
    points = calibration["thresholds"]
    assert points["strict"]["threshold"] <= points["balanced"]["threshold"] <= points["loose"]["threshold"]
    assert points["balanced"]["recall"] > 0.9 and calibration["parity"]["mean_dp"] <= 0.02
    assert calibration["linear"]["clear_below"] <= points["strict"]["threshold"]
    assert len(calibration["runs"]) == 2 and min(calibration["runs"]) > 0.9


def test_training_leaves_its_runs_and_no_checkpoint_or_other_files(trained: Path) -> None:
    left = sorted(path.name for path in (trained.parent / "run").rglob("*") if path.is_file())
    assert [name[:6] + Path(name).suffix for name in left] == ["run-0-.safetensors", "run-1-.safetensors"]
    assert sorted(path.name for path in trained.iterdir()) == [
        "calibration.json",
        "encoder.int8.onnx",
        "linear.npz",
        "tokenizer.json",
    ]


def drawn(count: int, seed: int) -> list[Row]:
    return [Row(str(row["text"]), int(row["label"]), ()) for row in rows(count, seed)]  # type: ignore[call-overload]


def encoder_config(folder: Path, **changes: Any) -> fitting.EncoderConfig:
    settings = {"name": str(folder), "vocabulary": 95, "length": 32, "train_length": 32, "frozen_layers": 0, "batch_tokens": 256}
    return fitting.EncoderConfig(**{**settings, **changes})


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


def test_long_harmless_texts_are_read_in_windows_and_sensitive_ones_in_blocks() -> None:
    text = " ".join(f"This is sentence number {n} of a long text about gardens." for n in range(40))
    made = dataset.as_read([Row(text, 0), Row(text, 1, None), Row("short", 1, None)], random.Random(0))
    assert [row.text for row in made if row.text == "short"] == ["short"]
    assert all(row.text in text for row in made[:-1]) and len([row for row in made if row.label == 0]) >= 2
    assert all(len(row.text) > 160 for row in made[:-1] if row.label == 1)


def test_a_short_everyday_text_is_also_read_sentence_by_sentence() -> None:
    text = "My grandmother made pickled lemons every winter. How would I do that at home?"
    kinds = (Row(text, 0, ()), Row(text, 1, None), Row(text, 0, (), "requests"), Row(text, 0, (), "pairs+noise"))
    made = [dataset.as_read([row], random.Random(seed)) for row in kinds for seed in range(20)]
    everyday, *others = ({row.text for rows in made[at : at + 20] for row in rows} for at in range(0, 80, 20))
    assert everyday == {text, *text.split(". ")[1:], text.split(". ")[0] + "."} and others == [{text}] * 3
    assert all(len(rows) == 2 and any(row.text == text for row in rows) for rows in made[:20])


def test_of_a_document_more_is_read_than_of_another_harmless_text() -> None:
    text = " ".join(f"This is sentence number {n} of a long text about gardens." for n in range(40))
    kinds = ("documents", "instructlab", "documents+padding")
    assert [len(dataset.as_read([Row(text, 0, (), kind)], random.Random(0))) for kind in kinds] == [5, 2, 2]


def test_peaks_are_the_windows_with_the_highest_sum() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, 50).tolist()
    first, second = rng.normal(size=(2, sum(sizes)))
    found = train.peaks(sizes, first, second, 0.3)
    at = 0
    for n, size in enumerate(sizes):
        inside = max(zip(first[at : at + size], second[at : at + size]), key=lambda pair: 0.3 * pair[0] + pair[1])
        assert (found.first[n], found.second[n], found.loudest[n]) == (*inside, max(first[at : at + size]))
        at += size


class Spoken:
    """A stage that gives each text the logit that a function gives it."""

    def __init__(self, say: Callable[[str], float]) -> None:
        self.say = say

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[self.say(text)] * (1 + len(KEYS)) for text in texts], np.float32)


def test_stages_are_weighted_and_thresholds_fixed_by_what_the_filter_reads(tmp_path: Path) -> None:
    """Texts of two sentences, of which stage 2 finds the second suspicious by itself: the filter judges by that one."""
    rng = random.Random(0)
    made = [
        Row(f"Here is a sentence about gardens and {n}. Then comes one of {'war' if n % 2 else 'tea'} {n} as it is told.", n % 2)
        for n in range(600)
    ]
    noise = {row.text: rng.gauss(0, 1.5) for row in made}
    of = {word: text for text in noise for word in re.findall(r"\d+", text)}

    def second(text: str) -> float:
        value = noise[of[re.findall(r"\d+", text)[0]]] + (2 if "war" in text else -2)
        return value + 3 * (text.startswith("Then"))

    split, settings = dataset.Split([], made, {}), config(tmp_path)

    def fit(first: Callable[[str], float], second: Callable[[str], float]) -> dict[str, Any]:
        stages: Any = {"linear": Spoken(first), "transformer": Spoken(second)}
        return train.fit_calibration(split, stages, {name: stage.logits(list(noise)) for name, stage in stages.items()}, settings)

    found = fit(lambda text: 0.1 * ("war" in text), second)
    with pytest.raises(UserError, match="look at the labels"):
        # Right on whole texts, wrong on the sentences that the filter would judge by.
        fit(lambda text: 0.0, lambda text: 9 - 2 * second(text) if text.startswith("Then") else second(text))
    assert 0 < found["together"]["weight"] <= 1  # what tells the classes apart is heard
    label = np.array([row.label for row in made])
    a, b, both = found["transformer"]["a"][0], found["transformer"]["b"][0], found["together"]
    first = np.array([found["linear"]["a"][0] * 0.1 * row.label + found["linear"]["b"][0] for row in made])
    read = np.array([a * second(row.text.split(". ")[1]) + b for row in made])
    z = both["weight"] * first + read
    p = calibrate.sigmoid(both["slope"] * z + both["cube"] * z**3 + both["bias"])
    for point in found["thresholds"].values():
        assert point["recall"] == pytest.approx((p[label == 1] >= point["threshold"]).mean(), abs=0.02)
        assert point["fpr"] == pytest.approx((p[label == 0] >= point["threshold"]).mean(), abs=0.02)
    assert abs(p.mean() - label.mean()) < 0.03  # calibrated as it is read, though every window's own reading is higher


def test_what_smoothed_labels_press_together_is_scored_by_a_cube(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(0, 3, 4000)
    made = [Row(f"how do I mend clock number {n}?", int(rng.random() < calibrate.sigmoid(z))) for n, z in enumerate(true)]
    pressed = 0.02 + 0.96 * calibrate.sigmoid(true)
    said = {row.text: z for row, z in zip(made, np.log(pressed / (1 - pressed)))}
    stages: Any = {"linear": Spoken(lambda text: 0.0), "transformer": Spoken(said.__getitem__)}
    whole = {name: stage.logits(list(said)) for name, stage in stages.items()}
    found = train.fit_calibration(dataset.Split([], made, {}), stages, whole, config(tmp_path))
    both, (a, b) = found["together"], (found["transformer"][part][0] for part in "ab")
    label, half = np.array([row.label for row in made]), np.array([sources.held_out(row, 0.5, 1) for row in made])
    z = a * np.array(list(said.values())) + b + both["weight"] * found["linear"]["b"][0]
    assert (both["slope"], both["cube"], both["bias"]) == pytest.approx(calibrate.bent(z[half], label[half]), abs=1e-3)
    assert both["cube"] > 0.02


def test_points_that_no_threshold_can_hold_are_an_error(tmp_path: Path) -> None:
    rng = random.Random(0)
    made = [Row(f"how do I mend clock number {n}?", n % 2) for n in range(400)]
    said = {row.text: rng.gauss(2 * row.label, 1) for row in made}
    apart = next(row.text for row in made if not row.label and not sources.held_out(row, 0.5, 1))
    said[apart] = 1e4  # the fit does not see it, and nothing can be above it
    stages: Any = {name: Spoken(said.__getitem__) for name in ("linear", "transformer")}
    whole = {name: stage.logits(list(said)) for name, stage in stages.items()}
    with pytest.raises(UserError, match="no threshold blocks as few as `loose` allows"):
        train.fit_calibration(dataset.Split([], made, {}), stages, whole, config(tmp_path))


def test_documents_are_counted_and_move_no_operating_point(tmp_path: Path) -> None:
    rng = random.Random(1)
    verbs = ("feed", "harm")
    asked = [Row(f"how do I {verbs[n % 2]} cat number {n}?", n % 2, (), "" if n % 3 else "pairs") for n in range(400)]
    papers = [Row(f"Chapter {n} of the handbook.", 0, (), sources.DOCUMENTS[n % len(sources.DOCUMENTS)]) for n in range(100)]
    said = {row.text: rng.gauss(2 * row.label, 1.2) for row in asked} | {row.text: -4.0 for row in papers[:90]}
    said |= {row.text: 9.0 for row in papers[90:]}
    settings = config(tmp_path)

    def fit(rows: list[Row]) -> dict[str, Any]:
        stages: Any = {name: Spoken(said.__getitem__) for name in ("linear", "transformer")}
        whole = {name: stage.logits([row.text for row in rows]) for name, stage in stages.items()}
        return train.fit_calibration(dataset.Split([], rows, {}), stages, whole, settings)

    mixed = [row for pair in itertools.zip_longest(asked, papers) for row in pair if row]
    alone, found = fit(sorted(asked, key=lambda row: mixed.index(row))), fit(mixed)
    assert found.pop("documents") == {"strict": 0.1, "balanced": 0.1, "loose": 0.1}
    assert found["development"].pop("documents") == 100 and alone["development"].pop("documents") == 0
    assert found == alone


def test_parity_is_enforced() -> None:
    label, logits = np.array([0, 1, 0, 1]), np.array([[-2.0], [2.0], [-1.0], [1.0]])
    assert train.check_parity(label, logits, logits + 0.001)["mean_dp"] < 0.001
    with pytest.raises(UserError, match="too far"):
        train.check_parity(label, logits, -logits)


def test_rows_of_a_test_set_are_removed_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    test = Row(sources.read_jsonl(Path(settings.data.own[0]))[1].text, 1, None, "test")
    settings.data.tests = ["some-test"]
    monkeypatch.setattr(sources, "named", lambda name: [test])
    split = dataset.build(settings.data, settings.seed)
    assert sum(split.counts["overlaps"].values()) >= 1
    [train] = split.draws
    assert test.text not in {row.text for row in (*train, *split.dev)}
    assert not {sources.key(row.text) for row in train} & {sources.key(row.text) for row in split.dev}


def test_a_part_of_a_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    listed = [Row(f"read {kind} {n}", 0, (), kind) for n in range(30) for kind in ("prose", "code", "letters")]
    monkeypatch.setattr(sources, "named", lambda name: listed)

    def found(*parts: dataset.Collection) -> dict[str, int]:
        counts = dataset.build(dataclasses.replace(settings.data, collections=list(parts)), settings.seed).counts
        parts_of = [counts[f"{part} sources"] for part in ("train", "dev")]
        return {kind: sum(part.get(kind, 0) for part in parts_of) for kind in ("prose", "code", "letters")}

    settings.data.augment = 0.0
    assert found(dataset.Collection("texts")) == {"prose": 30, "code": 30, "letters": 30}
    part = dataset.Collection("texts", sources=["prose", "code"], cap=40)
    assert sum(found(part).values()) == 40 and found(part)["letters"] == 0
    assert found(part, dataset.Collection("texts", sources=["letters"], cap=7))["letters"] == 7
    with pytest.raises(UserError, match="texts has no source verse; there are code, letters, prose"):
        found(dataset.Collection("texts", sources=["prose", "verse"]))
    with pytest.raises(UserError, match=r"texts has no source .*; there are code, letters, prose"):
        found(dataset.Collection("texts", sources=[]))


def test_an_optional_collection_that_cannot_be_had_is_left_out_with_its_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path)

    def named(name: str) -> list[Row]:
        if name.startswith("far"):
            raise UserError("the hub cannot be reached")
        return [Row(f"{name} {n}", 0, (), name) for n in range(30)]

    monkeypatch.setattr(sources, "named", named)
    settings.data.tests = ["near:test", "far:test"]
    settings.data.collections = [dataset.Collection("far:train", optional=True), dataset.Collection("near:train", optional=True)]
    counts = dataset.build(settings.data, settings.seed).counts
    assert counts["tests"] == ["near:test"] and counts["missing"] == ["far"]
    assert counts["train sources"]["near:train"] > 15
    assert "far:train is left out: the hub cannot be reached" in capsys.readouterr().err
    settings.data.collections = [dataset.Collection("far:train")]
    with pytest.raises(UserError, match="the hub cannot be reached"):
        dataset.build(settings.data, settings.seed)


def test_draws_differ_and_hold_nothing_that_is_held_out_or_in_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    requests = Path(str(settings.data.requests))
    framings = ", ".join(f"'the way number {n} to {{act}}'" for n in range(9))
    acts = ", ".join(f"bake {n} loaves" for n in range(40))
    # `topic` says as a whole what `do` says with a framing: of some, one is held out and the other is not.
    same = ", ".join(f"the way number {n} to bake {m} loaves" for n in range(9) for m in range(40))
    forms, sensitive = f"{{do: [{framings}], topic: ['{{act}}']}}", "{do: {hate: [insult him]}}"
    requests.write_text(f"framings: {forms}\nharmless: {{do: [{acts}], topic: [{same}]}}\nsensitive: {sensitive}\n")
    test = Row("the way number 8 to bake 39 loaves", 0, (), "test")
    settings.data.tests = ["some-test"]
    monkeypatch.setattr(sources, "named", lambda name: [test])
    monkeypatch.setattr(sources, "overlaps", lambda rows, tests: [row.text.lower() == test.text for row in rows])
    seed = 1  # 0 would make the same first draws by any rule
    split, fewer = (dataset.build(settings.data, seed, draws) for draws in (3, 2))
    assert len(split.draws) == 3 and split.draws[:2] == fewer.draws and split.dev == fewer.dev
    texts = [{row.text for row in draw} for draw in split.draws]
    framed = [{row.text for row in draw if row.group.startswith("bake")} for draw in split.draws]
    copies = [{row.text for row in draw if row.source == "own+noise"} for draw in split.draws]
    for parts, least in ((framed, 10), (copies, 5)):
        assert all(len(a - b) > least for a in parts for b in parts if a is not b)
    groups = {row.group for row in split.dev if row.group}
    assert len(groups) > 4 and not groups & {row.group for draw in split.draws for row in draw}
    assert not {sources.key(row.text) for row in split.dev} & {sources.key(row.text) for draw in split.draws for row in draw}
    assert not [text for part in texts for text in part if text.lower() == test.text]


def test_the_shipped_configuration_is_read_and_wrong_ones_are_explained(tmp_path: Path) -> None:
    settings = train.parse(["--config", "configs/safety.yaml", "--encoder.epochs", "1", "--data.own", "[mine.jsonl]"])
    assert settings.encoder.epochs == 1 and settings.data.own == ["mine.jsonl"]
    bounds = [settings.points[name].everyday for name in ("loose", "balanced", "strict")]
    assert bounds == sorted(bounds) and 0 < bounds[0] < bounds[1] < bounds[2] < 0.05
    with pytest.raises(UsageError, match="epoch"):
        train.parse(["--config", "configs/safety.yaml", "--encoder.epoch", "1"])
    for runs in ("0", "1001"):
        with pytest.raises(UsageError, match=rf"encoder\.runs is {runs}; it may be 1 to 1000"):
            train.parse(["--config", "configs/safety.yaml", "--encoder.runs", runs])
    empty = tmp_path / "empty.yaml"
    empty.write_text("data: {}\n")
    with pytest.raises(UsageError, match="points"):
        train.parse(["--config", str(empty)])
