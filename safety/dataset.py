"""The rows that the filter learns from: of named collections, contrast pairs, composed requests and own files.

    rows -> one form -> without duplicates and what the tests hold -> split by group -> disguised copies -> in windows
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.errors import UserError
from safety import attacks, collection, sources
from safety.sources import Row
from safety.taxonomy import KEYS

OUTPUTS = 1 + len(KEYS)
DRAWS = 1000  # of one seed at most
OTHERS = {"documents": 4}
"""How many windows of a harmless text are learnt beside the first, by source; of all other sources, and of augmented copies, one.
This project's documents are few, and unlike each other."""


@dataclass
class Collection:
    """A data set by name, or one split of it (NAME:SPLIT), and how much of it is taken; see `collection.take`."""

    name: str
    cap: int | None = None
    per_source: int | None = None
    weight: float = 1.0
    sources: list[str] | None = None


@dataclass
class Data:
    """What is trained on; the keys are explained in configs/safety.yaml."""

    collections: list[Collection] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    pairs: str | None = None
    requests: str | None = None
    documents: str | None = None
    pair_weight: float = 2.0
    per_act: int = 3
    augment: float = 0.25
    holdout: float = 0.12
    tests: list[str] = field(default_factory=lambda: list(sources.TESTS))


@dataclass
class Split:
    """Rows to learn from and rows to calibrate on, all of them normalised, and what was left out on the way.

    Args:
        draws: The rows of every run of stage 2: the same prompts, acts in framings drawn anew (what is a request by itself also
            as it stands), with other disguised copies and other windows.
    """

    draws: list[list[Row]]
    dev: list[Row]
    counts: dict[str, Any]


def build(data: Data, seed: int, draws: int = 1) -> Split:
    """Rows of a configuration, without duplicates and without what stands in the tests or in the red team's templates.

    A group is held out of all draws or of none. A draw does not depend on how many there are. The counts are those of the first.
    What only the model hub has is left out, with a note, where it cannot be reached.
    """
    pairs = [dataclasses.replace(row, weight=data.pair_weight) for row in sources.pairs(Path(data.pairs) if data.pairs else None)]
    named = [row for path in data.own for row in sources.read_jsonl(Path(path))]
    missing: list[str] = []  # of collections and tests

    def fetched(name: str) -> list[Row]:
        try:
            return collection.named(name)
        except collection.HubOnlyError as error:
            print(f"data: {name} is left out: {error}", file=sys.stderr, flush=True)
            missing.append(name)
            return []

    for entry in data.collections:
        rows = fetched(entry.name)
        if entry.name in missing:
            continue
        if entry.sources is not None:
            unknown = set(entry.sources) - {row.source for row in rows}
            if unknown or not entry.sources:
                raise UserError(f"{entry.name} has no source {', '.join(sorted(unknown)) or '[]'}; there are {_listed(rows)}")
            rows = [row for row in rows if row.source in entry.sources]
        taken = collection.take(rows, entry.cap, entry.per_source, seed)
        named += [dataclasses.replace(row, weight=entry.weight) for row in taken]
    named += sources.documents(Path(data.documents) if data.documents else None)
    tests = [row for name in data.tests for row in fetched(name)]
    tests = canonical(tests + [Row(text, 1, None, "redteam") for text in attacks.requests()])
    pairs, named = canonical(pairs), canonical(named)
    overlaps: dict[str, bool] = {}

    def without_tests(rows: list[Row]) -> list[Row]:
        new = [row for row in rows if row.text not in overlaps]
        overlaps.update(zip((row.text for row in new), sources.overlaps(new, tests)))
        return [row for row in rows if not overlaps[row.text]]

    found: list[list[Row]] = []
    for draw in range(draws):
        number = draw_seed(seed, draw)
        composed = sources.requests(Path(data.requests) if data.requests else None, per_act=data.per_act, seed=number)
        rows = pairs + canonical(composed) + named
        unique = sources.deduplicate(rows)
        kept = without_tests(unique)
        if draw == 0:
            counts: dict[str, Any] = {
                "rows": len(rows),
                "duplicates": len(rows) - len(unique),
                "overlaps": dict(Counter(row.source for row in unique if overlaps[row.text])),
                "collections": list(dict.fromkeys(entry.name for entry in data.collections if entry.name not in missing)),
                "missing": missing,
                "tests": [name for name in data.tests if name not in missing],
            }
            dev = [row for row in kept if sources.held_out(row, data.holdout, seed)]
            held = {sources.key(row.text) for row in dev}
        train = [row for row in kept if not sources.held_out(row, data.holdout, seed)]
        train += canonical(sources.augment(train, int(data.augment * len(train)), number))
        # Another group's framing, or a window, may be word for word what is held out.
        found.append([row for row in as_read(train, random.Random(number)) if sources.key(row.text) not in held])
    for name, part in (("train", found[0]), ("dev", dev)):
        counts[name] = {"sensitive": sum(row.label for row in part), "harmless": sum(1 - row.label for row in part)}
        counts[f"{name} sources"] = dict(Counter(row.source.split("+")[0] for row in part).most_common())
    if not any(row.label for row in dev) or all(row.label for row in dev):
        raise UserError("the development split has prompts of one label only: name more data, or raise data.holdout")
    return Split(found, dev, counts)


def draw_seed(seed: int, draw: int) -> int:
    """What a draw is made from, whatever others there are; no draw of one seed is a draw of the next."""
    return seed * DRAWS + draw


def _listed(rows: Sequence[Row]) -> str:
    return ", ".join(sorted({row.source for row in rows}))


def as_read(rows: list[Row], rng: random.Random) -> list[Row]:
    """Rows with what the filter reads of a text: it reads windows, and blocks a text for its worst.

    Every window of an everyday text is harmless: of one that has several, its first block and others at random (`OTHERS`),
    of short ones too: a question that leans on the sentence before it ("How would I do that?") says little by itself. A sentence
    of a sensitive text may be harmless by itself, and one of a look-alike (a threat that is quoted, a plan that is a game's)
    sensitive: of these, if they are long, the first block, and one more at random. What pads a text is read as that text is.
    """
    from safety.windows import BLOCK, SEGMENT, windows

    out = []
    for row in rows:
        source, made = row.source.partition("+")[::2]
        everyday = row.label == 0 and source not in sources.LOOKALIKES
        parts = [part for part in windows(row.text) if everyday or part.end - part.start > SEGMENT]
        if len(parts) < 2 or (not everyday and len(row.text) <= SEGMENT):
            out.append(dataclasses.replace(row, text=row.text[:BLOCK]))
            continue
        first = max(parts, key=lambda part: (part.start == 0, part.end))
        others = [part for part in parts if part != first]
        most = 1 if made else OTHERS.get(source, 1)
        chosen = [first, *rng.sample(others, min(most, len(others)))]
        out += [dataclasses.replace(row, text=part.read(row.text)) for part in sorted(chosen)]
    return out


def canonical(rows: list[Row]) -> list[Row]:
    """Rows with the text that the classifier will see."""
    from safety.normalize import normalize

    return [dataclasses.replace(row, text=normalize(row.text)) for row in rows]


def targets(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
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
