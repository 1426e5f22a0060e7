"""Overlapping windows over a text, so that nothing is too long to be read and nothing hides in the rest.

A text is cut into segments: sentences and lines, the long ones further at spaces. Windows are
    each segment, each pair of neighbours, and blocks of about `BLOCK` characters that overlap by half.
Single segments find a short request whatever surrounds it; pairs find one that lies across a boundary; blocks find one
that needs its context. Every character is in at most five windows or so: the work is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

SEGMENT = 160
"""Longest segment in characters; a request of this length lies inside some pair, wherever it starts."""

MINIMUM = 24
"""A segment shorter than this is joined to the one before it: `Hi.` or `1.` is no request."""

BLOCK = 640
"""Longest block in characters, about 128 to 160 tokens of English."""


class Window(NamedTuple):
    """Characters `start` to `end` of a text."""

    start: int
    end: int

    def read(self, text: str) -> str:
        """What the stages read of `text`, whose window this is."""
        return text[self.start : self.end].strip()


# A sentence's end, or a line's. Sentences of other scripts end with their own marks.
_END = re.compile(r"(?<![.!?;:])[.!?;:]++[\"')\]]*+\s|[\u3002\uff01\uff1f\u0964\u061f]|\n")


def segments(text: str) -> list[Window]:
    """Cut a text into consecutive segments of at most `SEGMENT` characters that cover it without a gap."""
    edges = [0]
    size = len(text)
    for match in _END.finditer(text):
        if match.end() - edges[-1] >= MINIMUM:
            _cut(text, edges, match.end())
    _cut(text, edges, size)
    if len(edges) > 2 and edges[-1] - edges[-2] < MINIMUM and edges[-1] - edges[-3] <= SEGMENT:
        del edges[-2]
    return [Window(a, b) for a, b in pairwise(edges)]


def _cut(text: str, edges: list[int], end: int) -> None:
    """Append `end` to the edges, and before it what keeps every segment within `SEGMENT`."""
    while end - edges[-1] > SEGMENT:
        start = edges[-1]
        # Not closer than half a segment, or a text without spaces behind a short word would be cut into crumbs.
        space = text.rfind(" ", start + SEGMENT // 2, start + SEGMENT)
        edges.append(space + 1 if space >= 0 else start + SEGMENT)
    if end > edges[-1]:
        edges.append(end)


def windows(text: str) -> Iterator[Window]:
    """The windows of a text in the order of their starts, each once; none for an empty text. Of one start the segment comes
    first, then the pair, then the block.

    Whatever its length, every character is covered, and what is no longer than `SEGMENT` / 2 lies wholly inside a window of
    at most 2 * `SEGMENT`.
    """
    parts = segments(text)
    block = last = 0  # the part that the next block begins with, and the last one of the block before
    for at, part in enumerate(parts):
        yield part
        if at + 1 < len(parts):
            yield Window(part.start, parts[at + 1].end)
        if at != block or (last == len(parts) - 1 and at):
            continue
        last = max(last, at)
        while last + 1 < len(parts) and parts[last + 1].end - part.start <= BLOCK:
            last += 1
        if last > at + 1:
            yield Window(part.start, parts[last].end)
        # The next block begins in the middle of this one.
        middle = (part.start + parts[last].end) // 2
        block = at + 1
        while block < last and parts[block].end <= middle:
            block += 1
