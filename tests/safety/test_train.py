"""Training on generated prompts with a tiny encoder: from files to weights that the filter loads."""

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_training import config

from mmgpt.errors import UsageError, UserError
from safety import calibrate, dataset, sources, train, weights
from safety.classifier import Linear, Transformer
from safety.sources import Row
from safety.taxonomy import KEYS

pytestmark = pytest.mark.filterwarnings("ignore:.*(Checkpoint directory|in eval mode|treespec)")  # as `train.main` does


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train.execute(config(tmp_path_factory.mktemp("run")))


def test_trained_weights_tell_the_words_apart_and_load(trained: Path) -> None:
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


def test_weights_to_go_on_from_that_are_not_whole_are_named_before_anything_is_done(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings.encoder.start = str(tmp_path / "none")
    with pytest.raises(UserError, match=r"encoder\.start: there is no .*none"):
        train.execute(settings)
    assert not Path(settings.run_dir).exists()


def test_training_goes_on_from_weights_and_ships_what_it_calibrates(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path)
    settings.encoder = dataclasses.replace(settings.encoder, start=str(trained), keep=0.5, runs=1, epochs=1)
    seen: dict[str, Any] = {}
    real = train.fit_calibration

    def spied(split: Any, stages: Any, whole: Any, config: Any) -> dict[str, Any]:
        seen.update(texts=[row.text for row in split.dev], logits=whole["transformer"])
        return real(split, stages, whole, config)

    monkeypatch.setattr(train, "fit_calibration", spied)
    files, calibration = weights.read(train.execute(settings))
    before = weights.read(trained)[1]
    assert calibration["start"] == {"weights": before["seal"][:12], "keep": 0.5} and before["start"] is None
    shipped = Transformer(files["encoder.int8.onnx"], files["tokenizer.json"], length=32, overlap=8)
    assert np.array_equal(shipped.logits(seen["texts"]), seen["logits"])
    settings.data.holdout = 0.5
    with pytest.raises(UserError, match="has learnt what would be held out"):
        train.execute(settings)


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
    for asked in (["--encoder.keep", "0.5"], ["--encoder.keep", "1.5", "--encoder.start", "safety/weights"]):
        with pytest.raises(UsageError, match=r"encoder\.keep is [01]\.5; with encoder\.start it may be 0 to 1, and without it 0"):
            train.parse(["--config", "configs/safety.yaml", *asked])
    empty = tmp_path / "empty.yaml"
    empty.write_text("data: {}\n")
    with pytest.raises(UsageError, match="points"):
        train.parse(["--config", str(empty)])
