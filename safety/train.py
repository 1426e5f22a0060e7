"""`python -m safety.train [--config FILE] [--key value ...]`: data, both stages, calibration, export, card.

    1  data        named collections, contrast pairs, composed requests, own files -> rows (`collection`, `sources`, `dataset`)
    2  linear      stage 1 (`fitting`)
    3  encoder     stage 2, the mean of several runs and of what they went on from (`fitting`), in int8 ONNX (`export`)
    4  calibrate   scores to probabilities on one half of the development split, operating points on all of it (`calibrate`)
    5  check       int8 against fp32; the weights' sizes; calibration.json with every file's sha256
    6  evaluate    the development tests, and the card (`evaluate`)

Exit codes: 0 done, 1 failure, 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.errors import UsageError, UserError, run_cli
from safety import calibrate, card, sources, weights
from safety.classifier import Linear, Transformer
from safety.dataset import DRAWS, OUTPUTS, Data, Split, build, targets
from safety.evaluate import auroc, ece
from safety.export import export, full_precision
from safety.filter import CANARIES, Together
from safety.fitting import EncoderConfig, LinearConfig, train_encoder, train_linear
from safety.sources import Row
from safety.taxonomy import KEYS
from safety.windows import windows

LIMIT = 30_000_000  # bytes that are shipped
MAX_SHIFT, MAX_AUROC_LOSS = 0.02, 0.005  # int8 against fp32
PARITY = 800  # texts of the development split that both are compared on
WEIGHTS = tuple(n / 10 for n in range(11))  # of stage 1 beside stage 2 that are tried


@dataclass
class Config:
    """A training run."""

    data: Data
    linear: LinearConfig = field(default_factory=LinearConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    points: dict[str, calibrate.Bounds] = field(default_factory=dict)
    clear_loss: float = 0.0025
    output: str = "safety/weights"
    run_dir: str = "runs/safety"
    seed: int = 0


def parse(arguments: list[str] | None = None) -> Config:
    """Read the command line; YAML first, later arguments override it."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="python -m safety.train", exit_on_error=False, allow_abbrev=False, description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    parser.add_class_arguments(Config)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not any(argument.startswith(("--config", "-h", "--help")) for argument in arguments):
        arguments = ["--config", "configs/safety.yaml", *arguments]
    try:
        settings = parser.parse_args(arguments)
        settings.pop("config", None)
        config = Config(**parser.instantiate(settings).as_dict())
    except Exception as error:
        raise UsageError(" ".join(str(error).split())) from error
    if not 1 <= config.encoder.runs <= DRAWS:
        raise UsageError(f"encoder.runs is {config.encoder.runs}; it may be 1 to {DRAWS}")
    if not 0 <= config.encoder.keep <= (config.encoder.start is not None):
        raise UsageError(f"encoder.keep is {config.encoder.keep}; with encoder.start it may be 0 to 1, and without it 0")
    if missing := [name for name in calibrate.POINTS if name not in config.points]:
        raise UsageError(f"points: {', '.join(missing)} missing; give `everyday` and `lookalikes` for each")
    return config


@dataclass(frozen=True)
class Peaks:
    """What the filter would judge each text by: the window that both stages together find the most sensitive.

    Args:
        first, second: Calibrated logits of the stages on that window, [N].
        loudest: The highest calibrated logit of stage 1 on any window of the text, [N].
    """

    first: np.ndarray
    second: np.ndarray
    loudest: np.ndarray


def peaks(sizes: Sequence[int], first: np.ndarray, second: np.ndarray, weight: float) -> Peaks:
    """The peaks of texts.

    Args:
        sizes: Number of windows of each text, [N], at least one.
        first, second: Calibrated logits of the stages on all windows, one text's after the other's, [M].
        weight: Of the first stage; the second counts one.
    """
    ends = np.cumsum(sizes)
    starts = ends - np.asarray(sizes)
    both = weight * first + second
    best = np.array([start + int(np.argmax(both[start:end])) for start, end in zip(starts, ends)])
    return Peaks(first[best], second[best], np.maximum.reduceat(first, starts))


def fit_calibration(
    split: Split, stages: Mapping[str, Linear | Transformer], whole: Mapping[str, np.ndarray], config: Config
) -> dict[str, Any]:
    """Everything in calibration.json but the hashes.

    The stages are calibrated on whole texts, what both say together on what the filter reads: the highest of a text's
    windows, which is higher than the whole. The operating points hold for that. Documents are left out of all this and only
    counted: most are easier than prompts, and would loosen what holds for these.

    Args:
        stages: `linear` and `transformer`.
        whole: Their logits on the whole texts of the development split, [N, 1 + K].

    Raises:
        UserError: the stages rank the development split backwards.
    """
    asked = np.array([row.source not in sources.DOCUMENTS for row in split.dev])
    prompts, documents = ([row for row, prompt in zip(split.dev, asked) if prompt == wanted] for wanted in (True, False))
    label, mask = targets(prompts)
    half = np.array([sources.held_out(row, 0.5, config.seed + 1) for row in prompts])
    result: dict[str, Any] = {"version": 3, "categories": list(KEYS)}
    unseen = ~half

    def unseen_figures(p: np.ndarray) -> dict[str, float]:
        return {"dev_auroc": round(auroc(label[unseen, 0], p[unseen]), 4), "dev_ece": round(ece(label[unseen, 0], p[unseen]), 4)}

    def scaled(name: str, logits: np.ndarray) -> np.ndarray:
        return logits[:, 0] * result[name]["a"][0] + result[name]["b"][0]

    for name, logits in ((name, every[asked]) for name, every in whole.items()):
        ab = [calibrate.platt(logits[half, 0], label[half, 0])]
        for column in range(1, OUTPUTS):
            known = half & (mask[:, column] == 1)
            enough = label[known, column].sum() >= 5
            ab.append(calibrate.platt(logits[known, column], label[known, column]) if enough else ab[0])
        result[name] = {"a": [round(a, 6) for a, _ in ab], "b": [round(b, 6) for _, b in ab]}
        result[name] |= unseen_figures(calibrate.sigmoid(scaled(name, logits)))

    def read(rows: list[Row]) -> tuple[list[int], np.ndarray, np.ndarray]:
        """The number of windows of each row, and what the stages say of all of them."""
        parts = [[part.read(row.text) for part in windows(row.text)] for row in rows]
        flat = [part for inside in parts for part in inside]
        first, second = (scaled(name, stages[name].logits(flat)) for name in ("linear", "transformer"))
        return [len(inside) for inside in parts], first, second

    sizes, first, second = read(prompts)
    # By rank, not by likelihood: that overrates stage 1, which knows much of a development split's words from training.
    found = [(weight, peaks(sizes, first, second, weight)) for weight in WEIGHTS]
    weight, peak = max(found, key=lambda pair: auroc(label[half, 0], (pair[0] * pair[1].first + pair[1].second)[half]))
    slope, cube, bias = calibrate.bent((weight * peak.first + peak.second)[half], label[half, 0])
    if slope <= 0:
        raise UserError("the stages find harmless development prompts more sensitive than sensitive ones: look at the labels")
    together = Together(weight=weight, slope=round(slope, 6), cube=round(cube, 6), bias=round(bias, 6))
    result["together"] = dataclasses.asdict(together)
    p = calibrate.sigmoid(together(peak.first, peak.second))
    result["together"] |= unseen_figures(p)
    harmful = label[:, 0] == 1
    lookalike = ~harmful & np.array([row.source in sources.LOOKALIKES for row in prompts])
    points = calibrate.operating_points(p[harmful], p[~harmful & ~lookalike], p[lookalike], config.points)
    if points["loose"].threshold > 1:
        raise UserError("points: harmless development prompts have the score 1.0, no threshold blocks as few as `loose` allows")
    result["thresholds"] = {name: point.to_json() for name, point in points.items()}
    quiet, loudest = calibrate.sigmoid(peak.first), calibrate.sigmoid(peak.loudest)
    bound = calibrate.clear_below(quiet[harmful], p[harmful], points["strict"].threshold, config.clear_loss)
    result["linear"] |= {
        "clear_below": round(bound, 6),
        "clear_share": round(float((loudest < bound)[~harmful].mean()), 4),
        "clear_loss": round(float(((quiet < bound) & harmful & (p >= points["balanced"].threshold)).sum() / harmful.sum()), 4),
    }
    result["transformer"] |= {"length": config.encoder.length, "overlap": config.encoder.length // 4}
    result["development"] = {
        "sensitive": int(harmful.sum()),
        "everyday": int((~harmful & ~lookalike).sum()),
        "lookalikes": int(lookalike.sum()),
        "documents": len(documents),
    }
    if documents:
        other = peaks(*read(documents), weight)
        p = calibrate.sigmoid(together(other.first, other.second))
        result["documents"] = {name: round(float((p >= point.threshold).mean()), 4) for name, point in points.items()}
    return result


def check_parity(label: np.ndarray, full: np.ndarray, int8: np.ndarray) -> dict[str, float]:
    """How far int8 is from fp32.

    Raises:
        UserError: further than the project allows.
    """
    a, b = calibrate.sigmoid(full[:, 0]), calibrate.sigmoid(int8[:, 0])
    result = {
        "mean_dp": float(np.abs(a - b).mean()),
        "max_dp": float(np.abs(a - b).max()),
        "auroc_fp32": auroc(label, a),
        "auroc_int8": auroc(label, b),
    }
    if result["mean_dp"] > MAX_SHIFT or result["auroc_fp32"] - result["auroc_int8"] > MAX_AUROC_LOSS:
        raise UserError(f"int8 is too far from fp32: {result}")
    return {name: round(value, 5) for name, value in result.items()}


def execute(config: Config) -> Path:
    """Run all steps; returns the folder of the weights."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {text}", file=sys.stderr, flush=True)

    before = _before(config)
    split = build(config.data, config.seed, config.encoder.runs)
    say(f"data: {json.dumps(split.counts)}")
    # The weights that are there work until new ones are whole: files of two trainings do not fit each other.
    output, target = Path(config.output), Path(config.run_dir) / "weights"
    target.mkdir(parents=True, exist_ok=True)
    texts = [row.text for row in split.dev]
    label = np.array([row.label for row in split.dev])

    linear = train_linear(split.draws[0], config.linear, config.seed)  # what other draws say in other words it says twice
    linear.save(target / "linear.npz")
    whole = {"linear": linear.logits(texts)}
    say(f"linear: development AUROC {auroc(label, whole['linear'][:, 0]):.4f}")

    def exported(encoder: Any, spec: dict[str, Any]) -> Transformer:
        (target / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
        export(encoder, target / "encoder.int8.onnx")
        length = config.encoder.length
        return Transformer(target / "encoder.int8.onnx", target / "tokenizer.json", length=length, overlap=length // 4)

    runs: list[np.ndarray] = []
    alone: list[float] = []

    def look(number: int, encoder: Any, spec: dict[str, Any]) -> None:
        runs.append(exported(encoder, spec).logits(texts))
        alone.append(round(auroc(label, runs[-1][:, 0]), 4))
        say(f"encoder: run {number + 1} alone: development AUROC {alone[-1]:.4f}")

    encoder, spec = train_encoder(split.draws, config.encoder, config.seed, Path(config.run_dir), look)
    transformer = exported(encoder, spec)
    # The mean of one run is that run.
    whole["transformer"] = transformer.logits(texts) if len(runs) > 1 or config.encoder.keep else runs[0]
    mean = f"mean of {len(alone)}{' and of what they went on from' if config.encoder.keep else ''}"
    say(f"encoder: {mean}: development AUROC {auroc(label, whole['transformer'][:, 0]):.4f}")
    chosen = sorted(random.Random(config.seed).sample(range(len(texts)), min(PARITY, len(texts))))
    full = full_precision(encoder, transformer, [texts[n] for n in chosen])
    parity = check_parity(label[chosen], full, whole["transformer"][chosen]) | {"texts": len(chosen)}
    say(f"int8 against fp32 {json.dumps(parity)}")

    stages: dict[str, Linear | Transformer] = {"linear": linear, "transformer": transformer}
    calibration = fit_calibration(split, stages, whole, config)
    calibration |= {"parity": parity, "runs": alone, "start": before, "split": _split(config), "data": split.counts}
    (target / weights.CALIBRATION).write_text(json.dumps(calibration, indent=1) + "\n", encoding="utf-8")
    weights.seal(target)
    size = sum((target / name).stat().st_size for name in (*weights.FILES, weights.CALIBRATION))
    if config.data.tests:
        # A folder of weights beside the shipped one has its own canaries.
        shutil.copyfile(CANARIES, target / CANARIES.name)
    say(f"thresholds {json.dumps(calibration['thresholds'])}; {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise UserError(f"the weights take {size:,} bytes, {LIMIT:,} are allowed: lower encoder.vocabulary or linear.bits")
    if config.data.tests:
        (target / card.NAME).write_text(card.render(target), encoding="utf-8")
    shipped = output.resolve() == weights.FOLDER.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(target.iterdir()):
        if not (shipped and file.name == CANARIES.name):
            shutil.copyfile(file, fresh := output / f".{file.name}.tmp")  # the run may lie on another disk
            os.replace(fresh, output / file.name)
    shutil.rmtree(target)
    say("done")
    return output


def _before(config: Config) -> dict[str, Any] | None:
    """What calibration.json says of the weights that training goes on from.

    Raises:
        UserError: they are not whole, of another taxonomy, or learnt from what is held out now.
    """
    start = config.encoder.start
    if start is None:
        return None
    try:
        calibration = weights.read(Path(start))[1]
    except weights.WeightsError as error:
        raise UserError(f"encoder.start: {error}") from error
    if tuple(calibration.get("categories", ())) != KEYS:
        raise UserError(f"encoder.start: the weights in {start} know other categories")
    if (split := calibration.get("split", now := _split(config))) != now:
        raise UserError(f"encoder.start: {start} was trained with {split}, now it is {now}: it has learnt what would be held out")
    return {"weights": calibration["seal"][:12], "keep": config.encoder.keep}


def _split(config: Config) -> dict[str, float]:
    """What decides on the rows that are held out."""
    return {"seed": config.seed, "holdout": config.data.holdout}


def main(arguments: list[str] | None = None) -> int:
    config = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # transformers reports MiniLM's unused pooler at every load
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|treespec|Checkpoint directory|in eval mode).*")
    print(execute(config))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
