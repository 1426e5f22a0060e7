"""The rows that the filter learns from: of named collections, contrast pairs, composed requests and own files.

    rows -> one form -> without duplicates and what the tests hold -> split by group -> disguised copies -> in windows
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.errors import UserError
from safety import sources
from safety.sources import Row
from safety.taxonomy import KEYS

OUTPUTS = 1 + len(KEYS)


@dataclass
class Collection:
    """A data set by name and how much of it is taken; see `sources.take`."""

    name: str
    cap: int | None = None
    per_source: int | None = None
    weight: float = 1.0


@dataclass
class Data:
    """What is trained on; the keys are explained in configs/safety.yaml."""

    collections: list[Collection] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    pairs: str | None = None
    requests: str | None = None
    pair_weight: float = 2.0
    per_act: int = 3
    augment: float = 0.25
    holdout: float = 0.12
    tests: list[str] = field(default_factory=lambda: list(sources.TESTS))


@dataclass
class Split:
    """Rows to learn from and rows to calibrate on, both normalised, and what was left out on the way."""

    train: list[Row]
    dev: list[Row]
    counts: dict[str, Any]


def build(data: Data, seed: int) -> Split:
    """Rows of a configuration, without duplicates and without what stands in the tests."""
    rows: list[Row] = []
    rows += [dataclasses.replace(row, weight=data.pair_weight) for row in sources.pairs(Path(data.pairs) if data.pairs else None)]
    rows += sources.requests(Path(data.requests) if data.requests else None, per_act=data.per_act, seed=seed)
    for path in data.own:
        rows += sources.read_jsonl(Path(path))
    for entry in data.collections:
        taken = sources.take(sources.named(entry.name), entry.cap, entry.per_source, seed)
        rows += [dataclasses.replace(row, weight=entry.weight) for row in taken]
    tests = [row for name in data.tests for row in sources.named(name)]
    counts: dict[str, Any] = {"rows": len(rows)}
    unique = sources.deduplicate(canonical(rows))
    counts["duplicates"] = len(rows) - len(unique)
    hit = sources.overlaps(unique, canonical(tests))
    counts["overlaps"] = dict(Counter(row.source for row, found in zip(unique, hit) if found))
    unique = [row for row, found in zip(unique, hit) if not found]
    dev = [row for row in unique if sources.held_out(row, data.holdout, seed)]
    train = [row for row in unique if not sources.held_out(row, data.holdout, seed)]
    train += canonical(sources.augment(train, int(data.augment * len(train)), seed))
    train = as_read(train, random.Random(seed))
    for name, part in (("train", train), ("dev", dev)):
        counts[name] = {"sensitive": sum(row.label for row in part), "harmless": sum(1 - row.label for row in part)}
        counts[f"{name} sources"] = dict(Counter(row.source.split("+")[0] for row in part).most_common())
    if not any(row.label for row in dev) or all(row.label for row in dev):
        raise UserError("the development split has prompts of one label only: name more data, or raise data.holdout")
    return Split(train, dev, counts)


def as_read(rows: list[Row], rng: random.Random, most: int = 1) -> list[Row]:
    """Rows with what the filter reads of a long text: it reads windows, and blocks a text for its worst.

    Every window of a harmless text is harmless: of a longer one, its first block and at most `most` others at random. A
    sentence of a sensitive text may be harmless by itself: of it the first block, and one more at random.
    """
    from safety.windows import BLOCK, SEGMENT, windows

    out = []
    for row in rows:
        parts = [part for part in windows(row.text) if row.label == 0 or part.end - part.start > SEGMENT]
        if len(row.text) <= SEGMENT or len(parts) < 2:
            out.append(dataclasses.replace(row, text=row.text[:BLOCK]))
            continue
        first = max(parts, key=lambda part: (part.start == 0, part.end))
        chosen = {first, *rng.sample(parts, min(most if row.label == 0 else 1, len(parts)))}
        out += [dataclasses.replace(row, text=part.read(row.text)) for part in sorted(chosen)]
    return out


def canonical(rows: list[Row]) -> list[Row]:
    """Rows with the text that the classifier will see."""
    from safety.normalize import normalize

    return [dataclasses.replace(row, text=normalize(row.text)) for row in rows]


def targets(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and their mask, float32 [N, 1 + K]: a sensitive row of unknown categories counts in column 0 only."""
    label, mask = np.zeros((len(rows), OUTPUTS), np.float32), np.ones((len(rows), OUTPUTS), np.float32)
    for index, row in enumerate(rows):
        label[index, 0] = row.label
        if row.categories is None:
            mask[index, 1:] = 0
        else:
            for name in row.categories:
                label[index, 1 + KEYS.index(name)] = 1
    return label, mask
