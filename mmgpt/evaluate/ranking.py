"""How well a reward model ranks: accuracy, calibration, and whether it only measures length.

Letters in shapes: N answers, P pairs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmgpt.evaluate.captioning import Score
from mmgpt.evaluate.report import replacing

if TYPE_CHECKING:
    import torch

    from mmgpt.data.branching import PreferenceBatch

RESAMPLES = 1000


@dataclass(frozen=True)
class Ranking:
    """The scores of held-out answers, and which of two was preferred.

    Args:
        scores: [N].
        lengths: [N], tokens of each answer.
        prompts: [N], number of the answer's prompt.
        better, worse: [P], places among the N answers.
    """

    scores: np.ndarray
    lengths: np.ndarray
    prompts: np.ndarray
    better: np.ndarray
    worse: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """[P] scores of the preferred answers minus those of the others; exp(m) / (1 + exp(m)) is the model's own confidence."""
        return self.scores[self.better] - self.scores[self.worse]

    @property
    def right(self) -> np.ndarray:
        """[P] 1 where the model agrees, 0 where it does not, 1/2 where it cannot tell."""
        return np.where(self.margins == 0, 0.5, (self.margins > 0).astype(float))

    @property
    def accuracy(self) -> float:
        """Share of pairs that the model ranks as people did."""
        return float(self.right.mean())

    @property
    def length_accuracy(self) -> float:
        """What the rule "the longer answer is better", or its opposite where that is the better rule, would reach."""
        gaps = np.sign(self.lengths[self.better].astype(float) - self.lengths[self.worse])
        return float(0.5 + abs(gaps.mean()) / 2)

    def interval(self, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the accuracy; prompts are drawn, not pairs, which are not independent (Efron 1979)."""
        owners = self.prompts[self.better]
        names, numbers = np.unique(owners, return_inverse=True)
        right = np.bincount(numbers, self.right, len(names))
        counts = np.bincount(numbers, minlength=len(names))
        drawn = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
        means = right[drawn].sum(1) / counts[drawn].sum(1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def calibration(self, bins: int = 5) -> list[tuple[float, float, int]]:
        """Confidence against accuracy: (mean confidence, share right, pairs) of equal steps of confidence from 1/2 to 1.

        A model that is 80 % sure should be right in 80 % (Bai et al. 2022, figure 9).
        """
        confidence = 1 / (1 + np.exp(-np.abs(self.margins)))
        places = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
        found = [places == number for number in range(bins)]
        return [(float(confidence[at].mean()), float(self.right[at].mean()), int(at.sum())) for at in found if at.any()]

    @property
    def calibration_error(self) -> float:
        """Mean distance between confidence and accuracy, each step weighed by its pairs (Guo et al. 2017, equation 3)."""
        steps = self.calibration()
        return sum(abs(sure - right) * count for sure, right, count in steps) / max(1, sum(count for _, _, count in steps))

    @property
    def length_correlation(self) -> float:
        """Pearson correlation of score and length among the answers to the same prompt; 0 where either does not vary."""
        centred = [values - _means(values, self.prompts) for values in (self.scores.astype(float), self.lengths.astype(float))]
        spread = np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum())
        return float((centred[0] * centred[1]).sum() / spread) if spread > 0 else 0.0

    def figures(self) -> dict[str, Any]:
        """What was found, for JSON."""
        low, high = self.interval()
        return {
            "accuracy": round(self.accuracy, 4),
            "interval": [round(low, 4), round(high, 4)],
            "by_length_alone": round(self.length_accuracy, 4),
            "calibration_error": round(self.calibration_error, 4),
            "correlation_with_length": round(self.length_correlation, 3),
        }

    def to_json(self) -> dict[str, Any]:
        """The figures, and of each pair its prompt, margin and the tokens of both answers, so that rankings can be pooled."""
        pairs = zip(self.prompts[self.better], self.margins, self.lengths[self.better], self.lengths[self.worse])
        kept = [[int(prompt), round(float(margin), 4), int(a), int(b)] for prompt, margin, a, b in pairs]
        return {**self.figures(), "pairs": kept}

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            f"{self.accuracy:.1%} of {len(self.better)} held-out pairs ranked as people did (95 % interval {low:.1%} to "
            f"{high:.1%}; by length alone {self.length_accuracy:.1%}); off its own confidence by {self.calibration_error:.1%}; "
            f"correlation with length {self.length_correlation:+.2f}"
        )


def pool(found: Sequence[dict[str, Any]]) -> Ranking:
    """The pairs of several rankings, in the form of `Ranking.to_json`, as those of one; no two share a prompt.

    Its scores are margins: each pair's preferred answer has the margin, the other 0.
    """
    pairs = [(place, *pair) for place, ranking in enumerate(found) for pair in ranking["pairs"]]
    names = {name: number for number, name in enumerate(dict.fromkeys((place, prompt) for place, prompt, *_ in pairs))}
    owners = [names[place, prompt] for place, prompt, *_ in pairs]
    count = len(pairs)
    return Ranking(
        scores=np.array([margin for _, _, margin, _, _ in pairs] + [0.0] * count),
        lengths=np.array([first for *_, first, _ in pairs] + [second for *_, second in pairs]),
        prompts=np.array(owners * 2),
        better=np.arange(count),
        worse=np.arange(count) + count,
    )


def _means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[N] mean of each element's group."""
    _, numbers = np.unique(groups, return_inverse=True)
    return (np.bincount(numbers, values) / np.bincount(numbers))[numbers]


def kendall_tau_c(scores: Sequence[float], ratings: Sequence[float]) -> float:
    """Agreement of two orders where one has few steps: (concordant - discordant) pairs over as many as there could be.

    tau_c = 2 (P - Q) / (n^2 (m - 1) / m), m being the number of different values on the side that has fewer (Stuart 1953); 1 is
    the same order.

    Args:
        scores, ratings: [N].
    """
    first, second = (np.asarray(values, dtype=float) for values in (scores, ratings))
    balance = 0.0
    for start in range(0, len(first), 1024):  # [1024, N] at a time
        chosen = slice(start, start + 1024)
        orders = [np.sign(values[chosen, None] - values[None]) for values in (first, second)]
        balance += float((orders[0] * orders[1]).sum())
    steps = min(len(np.unique(first)), len(np.unique(second)))
    return balance / (len(first) ** 2 * (steps - 1) / steps) if steps > 1 else 0.0


def rank_batches(
    score: Callable[[PreferenceBatch], torch.Tensor], batches: Iterable[PreferenceBatch], finish: Any, device: torch.device
) -> Ranking:
    """Score the answers of batches.

    Args:
        score: Gives the answers of a batch their scores [N]: a `RewardModel` in eval mode, or what a policy implies.
        batches: Of a `PreferenceLoader`.
        finish: Turns a batch's prepared images into what the model takes (`ImageSource.finish`); None for text alone.
        device: Where `score` computes.
    """
    import torch

    parts: list[list[np.ndarray]] = []
    answers = prompts = 0
    for batch in batches:
        if not len(batch.rows):
            continue
        batch.images = finish(batch.images) if finish is not None else None
        with torch.inference_mode():
            scores = score(batch.to(device)).float().cpu()  # type: ignore[arg-type]
        # Answers of one prompt stand together, as many as its pairs name.
        owners = batch.owners + prompts
        pairs = [(places + answers).numpy() for places in (batch.better, batch.worse)]
        parts.append([scores.numpy(), batch.lengths.numpy(), owners.numpy(), *pairs])
        answers, prompts = answers + len(scores), prompts + batch.samples
    return Ranking(*(np.concatenate(part) for part in zip(*parts)))


def write_ranking(
    folder: Path, found: dict[str, Ranking], seconds: float, plots: Sequence[str] = ("loss.png", "accuracy.png")
) -> None:
    """Write report.md, ranking.json and calibration.png.

    Args:
        folder: The run's.
        found: What was measured, by the name of its source.
        seconds: Of training.
        plots: Files of the folder to show beside the calibration.
    """
    lines = [f"# {os.path.basename(folder)}", "", f"Training took {seconds:.0f} s.", ""]
    columns = ("held-out", "pairs", "ranked as people did", "95 % interval", "by length alone", "off its confidence")
    lines += [f"| {' | '.join(columns)} | correlation with length |", "|---|---|---|---|---|---|---|"]
    for name, ranking in found.items():
        low, high = ranking.interval()
        lines += [
            f"| {name} | {len(ranking.better)} | {ranking.accuracy:.1%} | {low:.1%} to {high:.1%} "
            f"| {ranking.length_accuracy:.1%} | {ranking.calibration_error:.1%} | {ranking.length_correlation:+.2f} |"
        ]
    lines += ["", " ".join(f"![{Path(name).stem}]({name})" for name in (*plots, "calibration.png")), ""]
    with replacing(folder / "report.md") as fresh:
        fresh.write_text("\n".join(lines), encoding="utf-8")
    with replacing(folder / "ranking.json") as fresh:
        fresh.write_text(json.dumps({name: ranking.to_json() for name, ranking in found.items()}) + "\n", encoding="utf-8")
    _plot_calibration(folder / "calibration.png", found)


def _plot_calibration(path: Path, found: dict[str, Ranking]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4), layout="constrained")
    axes.plot([0.5, 1], [0.5, 1], "--", color="gray", linewidth=1, label="as sure as right")
    for name, ranking in found.items():
        steps = ranking.calibration()
        sure, right = [step[0] for step in steps], [step[1] for step in steps]
        bounds = [Score(round(share * count), count).interval() for _, share, count in steps]
        below = [max(0.0, share - low) for share, (low, _) in zip(right, bounds)]
        above = [max(0.0, high - share) for share, (_, high) in zip(right, bounds)]
        axes.errorbar(sure, right, [below, above], fmt="o-", markersize=4, capsize=2, label=name)
    axes.set(xlabel="confidence of the model", ylabel="share ranked as people did", xlim=(0.48, 1.02), ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=120)
    pyplot.close(figure)
