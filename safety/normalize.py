"""Every way to read a text: its canonical form, and what it says once its disguises are off.

    text -> clean -> canonical form                         one view that every text has
              |----> decode -> clean -> canonical form      one more for each disguise that is found
                       |----> decode ...                    and for disguises inside disguises, to a depth

`normalize` gives the canonical form alone; it is what the classifier is trained on and what it reads. A view rewrites the
disguised stretches in place and leaves the rest, so that a request of which only a word is disguised is read whole; of a
long text it keeps the surroundings of the stretches. Each knows which characters of the original its own stand for.

The work is bounded: every decoder is linear, and where encodings are nested deeper than `DEPTH`, or the views together are
longer than `GROWTH` times the text, `BudgetError` is raised. The filter blocks then: a reader who gives up must not pass.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from safety.characters import before_clean, before_small, clean, small
from safety.decode import DECODERS, ENCODINGS, Replacement

DEPTH = 3
"""Encodings inside each other that are taken off, and how deep other disguises are looked for."""

GROWTH, GROWTH_BASE = 8, 1 << 16
"""All views together hold at most GROWTH * len(text) + GROWTH_BASE characters."""

WHOLE = 2048
"""A text of up to so many characters is kept whole around what was decoded in it."""

CONTEXT = 256
"""Characters that are kept on both sides of a decoded stretch of a longer text."""


class BudgetError(Exception):
    """The text hides more than is decoded: nested too deep, or growing too long."""


@dataclass(frozen=True)
class View:
    """One reading of a text.

    Args:
        name: The decoders that led to it, outermost first (`reverse+base64`); `canonical` for the first.
        text: Its canonical form.
        origin: Gives the span of the original text that the characters [start, end) of `text` stand for.
    """

    name: str
    text: str
    origin: Callable[[int, int], tuple[int, int]] = field(compare=False, repr=False)


def normalize(text: str) -> str:
    """The canonical form of a text: clean, in lower case, one space or line break where there were several.

    Idempotent: normalize(normalize(text)) == normalize(text).
    """
    return _layout(small(clean(text)))


def views(text: str) -> list[View]:
    """All readings of a text, the canonical one first and none twice.

    Raises:
        BudgetError: see the module.
    """
    room = GROWTH * len(text) + GROWTH_BASE
    root = _Reading("canonical", text, None, ())
    found = [root.view()]
    seen, canonical = {text}, {root.canonical}
    level = [root]
    while level:
        following: list[_Reading] = []
        for reading in level:
            for name, raw, pieces in reading.decoded():
                if name in ENCODINGS and reading.encodings == DEPTH:
                    raise BudgetError(f"encodings are nested more than {DEPTH} deep")
                inner = _Reading(name if reading is root else f"{reading.name}+{name}", raw, reading, pieces)
                room -= max(len(raw), len(inner.canonical))
                if room < 0:
                    raise BudgetError("the text grows too long when its disguises are taken off")
                if raw not in seen:
                    seen.add(raw)
                    following.append(inner)
                if inner.canonical and inner.canonical not in canonical:
                    canonical.add(inner.canonical)
                    found.append(inner.view())
        level = following
    return found


_RUN = re.compile(r"[ \n]{2,}|\n")


def _layout(text: str) -> str:
    if "  " in text or "\n" in text:
        text = _RUN.sub(lambda match: "\n" if "\n" in match[0] else " ", text)
    return text.strip(" \n")


@dataclass(frozen=True)
class _Piece:
    """Characters from `start` on of a rewritten text stand for those from `first` to `last` of the one it was made of.

    Those of a piece that was `kept` stand for one each, in order.
    """

    start: int
    first: int
    last: int
    kept: bool


class _Reading:
    """A text, what it was decoded from, and lazily its forms."""

    def __init__(self, name: str, raw: str, parent: _Reading | None, pieces: tuple[_Piece, ...]) -> None:
        self.name, self.raw, self.parent, self.pieces = name, raw, parent, pieces
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.encodings: int = 0 if parent is None else parent.encodings + (name.rsplit("+")[-1] in ENCODINGS)
        self.clean = clean(raw)
        self.canonical = _layout(small(self.clean))

    def view(self) -> View:
        return View(self.name, self.canonical, self.origin)

    def decoded(self) -> Iterator[tuple[str, str, tuple[_Piece, ...]]]:
        """What each decoder makes of the text: the decoder's name, the text, where its characters come from."""
        # What English disguises itself as is looked for to a depth; what no one writes by chance, as long as there is any.
        only = DECODERS if self.depth < DEPTH else ENCODINGS
        encoded: list[Replacement] = []
        letters: list[Replacement] = []
        for name, decoder in only.items():
            replacements = decoder(self.clean, self.raw)
            if name in ENCODINGS and name != "tags":
                encoded += replacements
                letters += replacements if name in ("base64", "hex") else []
            elif name in ("leet", "marks"):
                # What is encoded is no English: read as leet or turned it gives one wrong text after the other.
                replacements = _outside(replacements, encoded)
            elif name != "spaced":
                replacements = _outside(replacements, letters)
            if replacements:
                source = self.raw if name == "tags" else self.clean
                yield name, *_rewrite(source, replacements)

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """The span of the original text for the characters [start, end) of the canonical form."""
        # canonical -> small -> clean -> raw, each by the number of characters that one of the coarser text became.
        start, end = _undo_layout(small(self.clean), start, end)
        return self._to_original(*before_clean(self.raw, *before_small(self.clean, start, end)))

    def _to_original(self, start: int, end: int) -> tuple[int, int]:
        if self.parent is None:
            return start, end
        starts = [piece.start for piece in self.pieces]
        first = self.pieces[max(bisect_right(starts, start) - 1, 0)]
        last = self.pieces[max(bisect_right(starts, max(end - 1, start)) - 1, 0)]
        begin = first.first + (start - first.start if first.kept else 0)
        finish = last.first + (end - last.start) if last.kept else last.last
        if self.name.rsplit("+")[-1] != "tags":
            begin, finish = before_clean(self.parent.raw, begin, finish)
        return self.parent._to_original(begin, finish)


def _rewrite(text: str, replacements: list[Replacement]) -> tuple[str, tuple[_Piece, ...]]:
    """Put replacements into a text, and keep of a long one only what surrounds them."""
    whole = len(text) <= WHOLE
    parts: list[str] = []
    pieces: list[_Piece] = []
    size = at = 0

    def add(part: str, first: int, last: int, kept: bool) -> None:
        nonlocal size
        if part:
            parts.append(part)
            pieces.append(_Piece(size, first, last, kept))
            size += len(part)

    for position, (start, end, new) in enumerate(replacements):
        if not whole and start - at > 2 * CONTEXT:
            # Not the far side of a gap: the end of what follows the last stretch, a break, the beginning before the next.
            if position:
                add(text[at : at + CONTEXT], at, at + CONTEXT, True)
                add("\n", at + CONTEXT, start - CONTEXT, False)
            at = start - CONTEXT
        add(text[at:start], at, start, True)
        add(new, start, end, len(new) == end - start)
        at = end
    tail = len(text) if whole else min(len(text), at + CONTEXT)
    add(text[at:tail], at, tail, True)
    return "".join(parts), tuple(pieces)


def _outside(replacements: list[Replacement], taken: list[Replacement]) -> list[Replacement]:
    """Those of which less than half is taken."""
    if not taken or not replacements:
        return replacements
    # How many characters before an edge are taken; spans may overlap, and count once.
    edges, before = [0], [0]
    for start, end, _ in sorted(taken):
        start = max(start, edges[-1])
        if end > start:
            edges += [start, end]
            before += [before[-1], before[-1] + end - start]

    def count(position: int) -> int:
        at = bisect_right(edges, position) - 1
        # Behind an even edge (the end of a span) nothing is taken, behind an odd one everything.
        return before[at] + (position - edges[at] if at % 2 else 0)

    return [item for item in replacements if 2 * (count(item[1]) - count(item[0])) < item[1] - item[0]]


def _undo_layout(text: str, start: int, end: int) -> tuple[int, int]:
    """From a span of `_layout(text)` to the span of `text`."""
    at = len(text) - len(text.lstrip(" \n"))
    size = len(text.rstrip(" \n"))
    edges: list[int] = []
    # Runs of layout became one character each: positions after a run shift by what it lost.
    lost = [(at, 0)]
    for match in _RUN.finditer(text, at, size):
        lost.append((match.end(), lost[-1][1] + len(match[0]) - 1))
    befores = [position - at - shift for position, shift in lost]
    for position in (start, max(end - 1, start)):
        shift = lost[max(bisect_right(befores, position) - 1, 0)][1]
        edges.append(position + at + shift)
    return edges[0], edges[1] + 1
