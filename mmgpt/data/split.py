"""Which groups of samples are held out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from mmgpt.errors import UsageError

K = TypeVar("K", bound=Any)
T = TypeVar("T")


def hold_out(keys: Iterable[K], share: float, seed: int, fold: int = 0) -> tuple[list[K], list[K]]:
    """Draw the keys of groups that are held out; the folds 0, 1, ... of one seed hold out disjoint parts (cross-validation).

    Args:
        keys: Of the groups; each counts once.
        share: Of the keys that are held out: at least one where there are two, and never all.
        seed: Draws them.
        fold: Which part. With a share of 1 / k there are k, where there are as many keys.

    Returns:
        The keys to learn from and those held out, both in the order drawn.

    Raises:
        UsageError: there is no such fold.
    """
    names = sorted(set(keys))
    random.Random(seed).shuffle(names)
    if share <= 0 or len(names) < 2:
        return names, []
    size = max(1.0, share * len(names))
    folds = max(1, min(round(1 / max(share, 1 / len(names))), int(len(names) / size + 1e-9)))
    if fold >= folds:
        raise UsageError(f"data.fold is {fold}: with data.holdout {share:g} of {len(names)} there are {folds}, counted from 0")
    start, end = round(fold * size), min(round((fold + 1) * size), len(names))
    if fold == 0:
        end = min(end, len(names) - 1)
    return names[:start] + names[end:], names[start:end]


def split_by_prompt(
    items: Sequence[T], share: float, seed: int, key: Callable[[T], str], fold: int = 0
) -> tuple[list[T], list[T]]:
    """Set a share of the prompts aside: no prompt, and no answer to it, is on both sides.

    Args:
        items: What is split.
        share: Of the prompts; at least one, where there are two.
        seed: Draws them.
        key: The prompt of an item (`prompt_key`).
        fold: Which part (`hold_out`).
    """
    held = set(hold_out(map(key, items), share, seed, fold)[1])
    sides: tuple[list[T], list[T]] = ([], [])
    for item in items:
        sides[key(item) in held].append(item)
    return sides
