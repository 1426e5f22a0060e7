"""`python -m safety.train [--config FILE] [--key value ...]`: data, both stages, calibration, export, card.

    1  data        named collections, contrast pairs, composed requests, own files -> rows (`sources`)
    2  linear      stage 1 (`fitting`)
    3  encoder     stage 2 (`fitting`), exported to int8 ONNX (`export`)
    4  calibrate   Platt scaling on one half of the development split, operating points on all of it (`calibrate`)
    5  check       int8 against fp32; the weights' sizes; calibration.json with every file's sha256
    6  evaluate    the development tests, and the card (`evaluate`)

Exit codes: 0 done, 1 failure, 2 wrong usage.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.errors import UsageError, UserError, run_cli
from safety import calibrate, card, sources, weights
from safety.classifier import Transformer
from safety.dataset import OUTPUTS, Data, Split, build, targets
from safety.evaluate import auroc, ece
from safety.export import export, full_precision
from safety.filter import CANARIES
from safety.fitting import EncoderConfig, LinearConfig, train_encoder, train_linear
from safety.taxonomy import KEYS

LIMIT = 30_000_000  # bytes that are shipped
MAX_SHIFT, MAX_AUROC_LOSS = 0.02, 0.005  # int8 against fp32
PARITY = 800  # development prompts that both are compared on


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
    if missing := [name for name in calibrate.POINTS if name not in config.points]:
        raise UsageError(f"points: {', '.join(missing)} missing; give `everyday` and `lookalikes` for each")
    return config


def fit_calibration(split: Split, first: np.ndarray, second: np.ndarray, config: Config) -> dict[str, Any]:
    """Everything in calibration.json but the hashes.

    Args:
        first, second: Logits of both stages on the development split, [N, 1 + K].
    """
    label, mask = targets(split.dev)
    half = np.array([sources.held_out(row, 0.5, config.seed + 1) for row in split.dev])
    result: dict[str, Any] = {"version": 2, "categories": list(KEYS)}
    scaled, probabilities, unseen = {}, {}, ~half

    def unseen_figures(p: np.ndarray) -> dict[str, float]:
        return {"dev_auroc": round(auroc(label[unseen, 0], p[unseen]), 4), "dev_ece": round(ece(label[unseen, 0], p[unseen]), 4)}

    for name, logits in (("linear", first), ("transformer", second)):
        ab = [calibrate.platt(logits[half, 0], label[half, 0])]
        for column in range(1, OUTPUTS):
            known = half & (mask[:, column] == 1)
            enough = label[known, column].sum() >= 5
            ab.append(calibrate.platt(logits[known, column], label[known, column]) if enough else ab[0])
        result[name] = {"a": [round(a, 6) for a, _ in ab], "b": [round(b, 6) for _, b in ab]}
        scaled[name] = logits[:, 0] * result[name]["a"][0] + result[name]["b"][0]
        probabilities[name] = calibrate.sigmoid(scaled[name])
        result[name] |= unseen_figures(probabilities[name])
    fitted = calibrate.together(scaled["linear"][half], scaled["transformer"][half], label[half, 0])
    one, two, bias = (round(value, 6) for value in fitted)
    result["together"] = {"linear": one, "transformer": two, "bias": bias}
    p = calibrate.sigmoid(one * scaled["linear"] + two * scaled["transformer"] + bias)
    result["together"] |= unseen_figures(p)
    harmful = label[:, 0] == 1
    lookalike = ~harmful & np.array([row.source in ("pairs", "requests") for row in split.dev])
    points = calibrate.operating_points(p[harmful], p[~harmful & ~lookalike], p[lookalike], config.points)
    result["thresholds"] = {name: point.to_json() for name, point in points.items()}
    bound = calibrate.clear_below(probabilities["linear"][harmful], p[harmful], points["strict"].threshold, config.clear_loss)
    passed = probabilities["linear"] < bound
    result["linear"] |= {
        "clear_below": round(bound, 6),
        "clear_share": round(float(passed[~harmful].mean()), 4),
        "clear_loss": round(float((passed & harmful & (p >= points["balanced"].threshold)).sum() / harmful.sum()), 4),
    }
    result["transformer"] |= {"length": config.encoder.length, "overlap": config.encoder.length // 4}
    result["development"] = {
        "sensitive": int(harmful.sum()),
        "everyday": int((~harmful & ~lookalike).sum()),
        "lookalikes": int(lookalike.sum()),
    }
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

    split = build(config.data, config.seed)
    say(f"data: {json.dumps(split.counts)}")
    # The weights that are there work until new ones are whole: files of two trainings do not fit each other.
    output, target = Path(config.output), Path(config.run_dir) / "weights"
    target.mkdir(parents=True, exist_ok=True)
    texts = [row.text for row in split.dev]
    label = np.array([row.label for row in split.dev])

    linear = train_linear(split.train, config.linear, config.seed)
    linear.save(target / "linear.npz")
    first = linear.logits(texts)
    say(f"linear: development AUROC {auroc(label, first[:, 0]):.4f}")

    encoder, spec = train_encoder(split.train, config.encoder, config.seed, Path(config.run_dir))
    (target / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    export(encoder, target / "encoder.int8.onnx")
    length = config.encoder.length
    transformer = Transformer(target / "encoder.int8.onnx", target / "tokenizer.json", length=length, overlap=length // 4)
    second = transformer.logits(texts)
    say(f"encoder: development AUROC {auroc(label, second[:, 0]):.4f}")
    chosen = sorted(random.Random(config.seed).sample(range(len(texts)), min(PARITY, len(texts))))
    full = full_precision(encoder, transformer, [texts[n] for n in chosen])
    parity = check_parity(label[chosen], full, second[chosen])
    say(f"int8 against fp32 {json.dumps(parity)}")

    calibration = fit_calibration(split, first, second, config) | {"parity": parity, "data": split.counts}
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
        (target / card.NAME).write_text(card.render(target, config.data.tests), encoding="utf-8")
    shipped = output.resolve() == weights.FOLDER.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(target.iterdir()):
        if not (shipped and file.name == CANARIES.name):
            shutil.copyfile(file, fresh := output / f".{file.name}.tmp")  # the run may lie on another disk
            os.replace(fresh, output / file.name)
    shutil.rmtree(target)
    say("done")
    return output


def main(arguments: list[str] | None = None) -> int:
    config = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*(does not have many workers|treespec|Checkpoint directory|in eval mode).*")
    print(execute(config))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
