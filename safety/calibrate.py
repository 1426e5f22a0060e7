"""From a logit to a probability, and from probabilities to the operating points; numpy only.

Platt 1999, "Probabilistic outputs for support vector machines": p = sigmoid(a z + b), fitted on a development split that
training does not see. a alone would be temperature scaling (Guo et al. 2017); b takes up that the development split holds
another share of sensitive prompts than the batches did. The score of both stages gets one term more, see `bent`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

POINTS = ("strict", "balanced", "loose")


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logistic function in float64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The a and b of p = sigmoid(a z + b) that maximise the likelihood of `labels`; see `logistic`."""
    a, b = logistic(np.asarray(logits)[:, None], labels)
    return a, b


def bent(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """The a, c and b of p = sigmoid(a z + c z^3 + b) that maximise the likelihood of `labels`, if a and c are positive.

    A loss with smoothed labels holds the logits back, those of certain prompts the most. On a development split they then lie
    close together at both ends, where Platt's line is too flat, and it makes up for that by being too steep between them.
    Where the labels bend another way p would not rise with z everywhere: then c = 0, and a and b are Platt's.
    """
    z = np.asarray(logits, np.float64)
    a, c, b = logistic(np.column_stack([z, z**3]), labels)
    if a > 0 and c > 0:
        return a, c, b
    a, b = platt(z, labels)
    return a, 0.0, b


def logistic(logits: np.ndarray, labels: np.ndarray, *, steps: int = 100, ridge: float = 1e-6) -> tuple[float, ...]:
    """The weights and the bias of p = sigmoid(w . z + b) that maximise the likelihood of `labels`, by Newton's method.

    The targets are Platt's, (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) instead of 1 and 0: without them the weights do not converge
    where the classes do not overlap.

    Args:
        logits: [N, K].
        labels: [N] of 0 and 1.

    Returns:
        K weights, then the bias.

    Raises:
        ValueError: a logit is not finite, or a class is missing.
    """
    z, y = np.asarray(logits, np.float64), np.asarray(labels) == 1
    if not np.isfinite(z).all():
        raise ValueError("a logit is not finite")
    if y.all() or not y.any():
        raise ValueError("calibration needs prompts with label 1 and with label 0")
    target = np.where(y, (y.sum() + 1) / (y.sum() + 2), 1 / ((~y).sum() + 2))
    design = np.column_stack([z, np.ones(len(z))])
    size = design.shape[1]
    value = np.zeros(size)

    def loss(v: np.ndarray) -> float:
        s = design @ v
        return float((np.logaddexp(0, s) - target * s).sum() + ridge / 2 * v @ v)

    for _ in range(steps):
        p = sigmoid(design @ value)
        gradient = design.T @ (p - target) + ridge * value
        hessian = (design * (p * (1 - p))[:, None]).T @ design + ridge * np.eye(size)
        step, length = np.linalg.solve(hessian, gradient), 1.0
        while loss(value - length * step) > loss(value):
            length /= 2
            if length < 1e-9:  # rounding is all that is left to gain
                return tuple(value.tolist())
        value = value - length * step
        if np.abs(length * step).max() < 1e-9:
            break
    return tuple(value.tolist())


@dataclass(frozen=True)
class Bounds:
    """What an operating point may block at most, as shares of the development split.

    Args:
        everyday: Of harmless prompts that are not look-alikes.
        lookalikes: Of the harmless halves of contrast pairs, and of other harmless prompts written to look like sensitive ones.
    """

    everyday: float
    lookalikes: float


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold on the probability (`score >= threshold` is sensitive) and what it does on the development split."""

    threshold: float
    fpr: float
    lookalike_fpr: float
    recall: float

    def to_json(self) -> dict[str, float]:
        return {key: round(value, 6) for key, value in asdict(self).items()}


def operating_points(
    sensitive: np.ndarray, everyday: np.ndarray, lookalikes: np.ndarray, bounds: Mapping[str, Bounds]
) -> dict[str, OperatingPoint]:
    """The lowest threshold within both bounds of every operating point.

    Args:
        sensitive, everyday, lookalikes: Probabilities of the development split's prompts, [N] each.
        bounds: By name; from strict to loose they must not grow.
    """
    points: dict[str, OperatingPoint] = {}
    lowest = 0.0
    for name in POINTS:
        bound = bounds[name]
        threshold = max(lowest, above(everyday, bound.everyday), above(lookalikes, bound.lookalikes))
        # Rounded up to what calibration.json holds, so that what is measured is what is stored.
        threshold = float(np.ceil(threshold * 1e6) / 1e6)
        lowest = threshold
        rates = [float((np.asarray(p) >= threshold).mean()) if len(p) else 0.0 for p in (everyday, lookalikes, sensitive)]
        points[name] = OperatingPoint(threshold, *rates)
    return points


def above(scores: np.ndarray | Sequence[float], share: float) -> float:
    """The lowest threshold that at most `share` of the scores reach (`score >= threshold`)."""
    ranked = np.sort(np.asarray(scores, np.float64))[::-1]
    allowed = int(share * len(ranked) + 1e-9)
    return float(np.nextafter(ranked[allowed], np.inf)) if allowed < len(ranked) else 0.0


def clear_below(first: np.ndarray, second: np.ndarray, threshold: float, loss: float) -> float:
    """Probability of stage 1 below which it may pass a prompt without stage 2.

    Args:
        first, second: Probabilities that the stages give to the sensitive prompts of the development split.
        threshold: Of the operating point that blocks the most.
        loss: Share of these prompts that stage 2 would have blocked and stage 1 may pass.

    Returns:
        The highest such bound, and never more than `threshold`: what stage 1 passes must be below it.
    """
    caught = np.sort(first[second >= threshold])
    allowed = int(loss * len(first) + 1e-9)
    return float(min(caught[allowed] if allowed < len(caught) else threshold, threshold))
