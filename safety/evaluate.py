"""`python -m safety.evaluate FILE...`: how well the filter tells sensitive prompts from harmless ones.

A FILE is JSONL with `text` and `label` (1 sensitive, 0 not), or the name of a data set that `mmgpt.artifacts` lists
(harmbench, strongreject, safety-refusal, alpaca-eval-prompts), or a split of one (hh-prompts:test). Each is evaluated, and all
together where there are several.

    AUROC, AUPRC                       of the score
    F1, precision, recall, FPR         at every operating point
    recall at 1 % and 2 % FPR          at the threshold that these prompts themselves would give
    ECE                                expected calibration error, 15 bins of equal width (Guo et al. 2017)

Intervals are 95 % of bootstrap samples of the prompts. With --output, report.json and curves.png (ROC and reliability) are
written there. --obfuscate repeats everything with the sensitive prompts under each transformation of `safety.obfuscate`, and
under compositions of two, and says what recall is lost.

Exit codes: 0 done, 1 failure, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from safety import calibrate

if TYPE_CHECKING:
    from safety.sources import Row

WEIGHTS = Path(__file__).parent / "weights"
BINS = 15
FIXED_FPR = (0.01, 0.02)
Scorer = Callable[[Sequence[str]], np.ndarray]


# Figures


def auroc(label: np.ndarray, score: np.ndarray) -> float:
    """Probability that a sensitive prompt scores above a harmless one, ties counted half (Mann & Whitney 1947)."""
    label, score = np.asarray(label) == 1, np.asarray(score)
    positive = int(label.sum())
    negative = len(label) - positive
    if not positive or not negative:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # the mean rank of equal scores
    return float((rank[inverse][label].sum() - positive * (positive + 1) / 2) / (positive * negative))


def auprc(label: np.ndarray, score: np.ndarray) -> float:
    """Average precision: the sum over thresholds of precision times the recall that is gained there."""
    label = np.asarray(label) == 1
    if not label.any():
        return float("nan")
    _, hits, alarms = _counts(label, score)
    precision = hits / np.maximum(hits + alarms, 1)
    return float((precision * np.diff(np.concatenate([[0], hits]))).sum() / label.sum())


def _counts(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every distinct score, from the highest down: it, and how many of either label score that or more."""
    order = np.argsort(-np.asarray(score), kind="stable")
    ranked, label = np.asarray(score)[order], label[order]
    last = np.flatnonzero(np.concatenate([ranked[1:] != ranked[:-1], [True]]))
    hits = np.cumsum(label)[last]
    return ranked[last], hits, last + 1 - hits


def recall_at_fpr(label: np.ndarray, score: np.ndarray, fpr: float) -> float:
    """The most recall that a threshold gives whose false-positive rate is at most `fpr`."""
    label = np.asarray(label) == 1
    if label.all() or not label.any():
        return float("nan")
    _, hits, alarms = _counts(label, score)
    within = alarms <= fpr * (~label).sum() + 1e-9
    return float(hits[within].max(initial=0) / label.sum())


def ece(label: np.ndarray, score: np.ndarray, bins: int = BINS) -> float:
    """Mean distance of confidence and frequency over bins of equal width, weighted by how many prompts a bin holds."""
    if not len(label):
        return float("nan")
    total = 0.0
    for confidence, frequency, count in reliability(label, score, bins):
        total += count * abs(confidence - frequency)
    return total / len(label)


def reliability(label: np.ndarray, score: np.ndarray, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean score, share of sensitive prompts, prompts) of every bin that is not empty."""
    label, score = np.asarray(label) == 1, np.asarray(score, np.float64)
    index = np.minimum((score * bins).astype(int), bins - 1)
    return [(float(score[index == b].mean()), float(label[index == b].mean()), int((index == b).sum())) for b in np.unique(index)]


def at_threshold(label: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, float]:
    """F1, precision, recall and false-positive rate of `score >= threshold`; NaN where a denominator is 0."""
    label, blocked = np.asarray(label) == 1, np.asarray(score) >= threshold
    hits, alarms = int((label & blocked).sum()), int((~label & blocked).sum())
    misses = int((label & ~blocked).sum())

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    return {
        "f1": ratio(2 * hits, 2 * hits + alarms + misses),
        "precision": ratio(hits, hits + alarms),
        "recall": ratio(hits, hits + misses),
        "fpr": ratio(alarms, int((~label).sum())),
    }


def figures(label: np.ndarray, score: np.ndarray, thresholds: dict[str, float]) -> dict[str, float]:
    """Every figure of this module by name; those of an operating point as `f1@balanced`."""
    out = {"auroc": auroc(label, score), "auprc": auprc(label, score), "ece": ece(label, score)}
    for fpr in FIXED_FPR:
        out[f"recall@{fpr:.0%}"] = recall_at_fpr(label, score, fpr)
    for point, threshold in thresholds.items():
        out |= {f"{name}@{point}": value for name, value in at_threshold(label, score, threshold).items()}
    return out


def bootstrap(
    label: np.ndarray, score: np.ndarray, thresholds: dict[str, float], *, samples: int, seed: int = 0
) -> dict[str, Any]:
    """95 % intervals of `figures` over resampled prompts (Efron 1979), each label resampled by itself."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(label == value) for value in (0, 1)]
    drawn: dict[str, list[float]] = {}
    for _ in range(samples):
        chosen = np.concatenate([rng.choice(group, len(group)) for group in groups if len(group)])
        for name, value in figures(label[chosen], score[chosen], thresholds).items():
            drawn.setdefault(name, []).append(value)
    out = {}
    for name, values in drawn.items():
        finite = np.array(values)[np.isfinite(values)]
        out[name] = [float(x) for x in np.quantile(finite, [0.025, 0.975])] if len(finite) else None
    return out


# Scoring


def load_calibration(folder: Path = WEIGHTS) -> dict[str, Any]:
    from mmgpt.errors import UserError

    try:
        return json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'calibration.json'} cannot be read: {error}. `python -m safety.train` writes it") from error


def scorer(stage: str, folder: Path = WEIGHTS) -> Scorer:
    """A function from texts to scores: of the whole filter, or of one stage on the normalised text alone."""
    if stage == "filter":
        from mmgpt.errors import UserError
        from safety.filter import Filter

        judge = Filter() if folder.resolve() == WEIGHTS.resolve() else Filter(weights=folder)
        if judge.problem:
            # It would block everything: figures of that say nothing about the weights.
            raise UserError(f"the filter does not start with {folder}: {judge.problem}, {judge.detail}")
        return lambda texts: np.array([verdict.score for verdict in judge.check_batch(list(texts))], np.float64)
    from safety.classifier import Linear, Transformer
    from safety.normalize import normalize

    settings = load_calibration(folder)[stage]
    if stage == "linear":
        model: Linear | Transformer = Linear.load(folder / "linear.npz")
    else:
        files = folder / "encoder.int8.onnx", folder / "tokenizer.json"
        model = Transformer(*files, length=settings["length"], overlap=settings["overlap"])

    def score(texts: Sequence[str]) -> np.ndarray:
        logits = model.logits([normalize(text) for text in texts])[:, 0]
        return calibrate.sigmoid(settings["a"][0] * logits + settings["b"][0])

    return score


@dataclass
class Result:
    """Labels and scores of one set, with its figures."""

    name: str
    label: np.ndarray
    score: np.ndarray
    figures: dict[str, float]
    intervals: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        def number(value: float) -> float | None:
            return round(value, 5) if np.isfinite(value) else None

        return {
            "name": self.name,
            "sensitive": int((self.label == 1).sum()),
            "harmless": int((self.label == 0).sum()),
            "figures": {name: number(value) for name, value in self.figures.items()},
            "intervals": {name: pair and [number(x) for x in pair] for name, pair in self.intervals.items()},
        }


def evaluate(name: str, rows: Sequence[Row], score: Scorer, thresholds: dict[str, float], *, samples: int) -> Result:
    """Score `rows` and measure."""
    label, given = np.array([row.label for row in rows]), score([row.text for row in rows])
    return measured(name, label, given, thresholds, samples)


def measured(name: str, label: np.ndarray, score: np.ndarray, thresholds: dict[str, float], samples: int) -> Result:
    intervals = bootstrap(label, score, thresholds, samples=samples) if samples else {}
    return Result(name, label, score, figures(label, score, thresholds), intervals)


def read(name: str) -> list[Row]:
    """Rows of a JSONL file or of a named data set."""
    from safety import collection, sources

    path = Path(name)
    return sources.read_jsonl(path) if path.suffix in (".jsonl", ".json") or path.exists() else collection.named(name)


def obfuscations(limit: int, seed: int) -> list[tuple[str, ...]]:
    """Each transformation of `safety.obfuscate` by itself, and at most `limit` ordered compositions of two."""
    from safety import obfuscate

    two = [pair for pair in itertools.permutations(obfuscate.NAMES, 2) if not obfuscate.lossy(*pair)]
    random.Random(seed).shuffle(two)
    return [(name,) for name in obfuscate.NAMES] + sorted(two[:limit])


def obfuscated(rows: Sequence[Row], chain: tuple[str, ...], seed: int) -> list[Row]:
    """The sensitive rows under the transformations of `chain`, one after the other; the harmless ones as they are."""
    from dataclasses import replace

    from safety import obfuscate

    rng = random.Random(seed)
    out = []
    for row in rows:
        text = obfuscate.apply("+".join(chain), row.text, rng) if row.label else row.text
        out.append(replace(row, text=text))
    return out


# Reports


def table(results: Sequence[Result], thresholds: dict[str, float]) -> str:
    """A Markdown table, one row a set; the interval in brackets where there is one."""
    heads = ["set", "sensitive / harmless", "AUROC", "AUPRC", "recall at 1 %", "recall at 2 %", "ECE"]
    for point in thresholds:
        heads += [f"{point}: F1", "precision", "recall", "FPR"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        names = ["auroc", "auprc", "recall@1%", "recall@2%", "ece"]
        names += [f"{name}@{point}" for point in thresholds for name in ("f1", "precision", "recall", "fpr")]
        cells = [result.name, f"{int((result.label == 1).sum())} / {int((result.label == 0).sum())}"]
        cells += [_cell(result.figures[name], result.intervals.get(name)) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: float, interval: Sequence[float] | None) -> str:
    if not np.isfinite(value):
        return "-"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def plot(results: Sequence[Result], path: Path) -> None:
    """ROC (false-positive rate on a logarithmic axis: the left end is what a filter lives in) and reliability."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (roc, calibration) = plt.subplots(1, 2, figsize=(11, 5))
    for result in results:
        label = result.label == 1
        if label.any() and not label.all():
            _, hits, alarms = _counts(label, result.score)
            roc.plot(np.maximum(alarms / (~label).sum(), 5e-4), hits / label.sum(), label=result.name, drawstyle="steps-post")
        bins = reliability(result.label, result.score)
        calibration.plot([b[0] for b in bins], [b[1] for b in bins], marker="o", label=result.name)
    roc.set(xscale="log", xlim=(5e-4, 1), ylim=(0, 1), xlabel="false-positive rate", ylabel="recall", title="ROC")
    calibration.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    calibration.set(xlabel="score", ylabel="share of sensitive prompts", title="Reliability")
    for axis in (roc, calibration):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m safety.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSONL with text and label, or a named data set, or NAME:SPLIT")
    parser.add_argument("--stage", choices=("filter", "linear", "transformer"), default="filter", help="what is evaluated")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument("--output", type=Path, help="folder for report.json and curves.png")
    parser.add_argument("--bootstrap", type=int, default=500, metavar="N", help="bootstrap samples; 0 leaves intervals out")
    parser.add_argument("--obfuscate", action="store_true", help="repeat under transformations and compositions of two")
    parser.add_argument("--compositions", type=int, default=24, metavar="N", help="how many compositions of two (default 24)")
    parser.add_argument("--limit", type=int, help="at most so many prompts of a file, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    thresholds = {name: point["threshold"] for name, point in load_calibration(options.weights)["thresholds"].items()}
    score = scorer(options.stage, options.weights)
    sets = []
    for name in options.files:
        rows = read(name)
        if options.limit and len(rows) > options.limit:
            rows = random.Random(options.seed).sample(rows, options.limit)
        sets.append((Path(name).stem if Path(name).exists() else name, rows))
    results = [evaluate(name, rows, score, thresholds, samples=options.bootstrap) for name, rows in sets]
    if len(results) > 1:
        label, scores = (np.concatenate([getattr(result, part) for result in results]) for part in ("label", "score"))
        results.append(measured("all", label, scores, thresholds, options.bootstrap))
    report: dict[str, Any] = {"stage": options.stage, "thresholds": thresholds, "sets": [result.to_json() for result in results]}
    text = table(results, thresholds)
    if options.obfuscate:
        lines, report["obfuscations"] = _obfuscate(sets, results, score, thresholds, options)
        text += "\n\n" + lines
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        plot(results, options.output / "curves.png")
    print(json.dumps(report, indent=1) if options.json else text)
    return 0


def _obfuscate(
    sets: list[tuple[str, list[Row]]],
    plain: list[Result],
    score: Scorer,
    thresholds: dict[str, float],
    options: argparse.Namespace,
) -> tuple[str, list[dict[str, Any]]]:
    """The lost recall of every chain, over all sensitive prompts of the sets, at every operating point."""
    rows = [row for _, part in sets for row in part if row.label]
    if not rows:
        return "no sensitive prompts to obfuscate", []
    before = plain[-1]
    base = {point: at_threshold(before.label, before.score, t)["recall"] for point, t in thresholds.items()}
    heads = ["transformation", *(f"recall lost, {point}" for point in thresholds)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    out = []
    for chain in obfuscations(options.compositions, options.seed):
        scores = score([row.text for row in obfuscated(rows, chain, options.seed)])
        lost = {point: base[point] - float((scores >= t).mean()) for point, t in thresholds.items()}
        out.append({"chain": list(chain), "recall_lost": {point: round(value, 5) for point, value in lost.items()}})
        lines.append("| " + " | ".join([" + ".join(chain), *(f"{value:+.3f}" for value in lost.values())]) + " |")
    return "\n".join(lines), out


if __name__ == "__main__":
    from mmgpt.errors import run_cli

    sys.exit(run_cli(main))
