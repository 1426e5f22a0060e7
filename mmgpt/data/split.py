"""Which groups of samples are held out."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, TypeVar

from mmgpt.errors import UsageError

K = TypeVar("K", bound=Any)


def hold_out(keys: Iterable[K], share: float, seed: int, fold: int = 0) -> tuple[list[K], list[K]]:
    """Draw the keys of groups that are held out; the folds 0, 1, ... of one seed hold out disjoint parts (cross-validation).

    Args:
        keys: Of the groups; each counts once.
        share: Of the keys that are held out: at least one where there are two, and never all.
        seed: Draws them.
        fold: Which part. With a share of 1 / k there are k.

    Returns:
        The keys to learn from and those held out, both in the order drawn.

    Raises:
        UsageError: there is no such fold.
    """
    names = sorted(set(keys))
    random.Random(seed).shuffle(names)
    if share <= 0 or len(names) < 2:
        return names, []
    folds = max(1, min(round(1 / share), len(names)))
    if fold >= folds:
        raise UsageError(f"data.fold is {fold}: with data.holdout {share:g} of {len(names)} there are {folds}, counted from 0")
    start, end = (min(round(part * share * len(names)), len(names)) for part in (fold, fold + 1))
    if fold == 0:
        end = min(max(end, 1), len(names) - 1)
    return names[:start] + names[end:], names[start:end]
