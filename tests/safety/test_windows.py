"""Windows: nothing uncovered, nothing too long, nothing twice, and not too many."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safety.windows import BLOCK, MINIMUM, SEGMENT, Window, segments, windows

text = st.lists(
    st.sampled_from(["word", " ", ". ", "\n", "? ", "x" * 50, "。", "a" * 200, "e.g. ", "!", ".", '." ']), max_size=80
).map("".join)


@given(text)
def test_segments_cover_the_text(whole: str) -> None:
    found = segments(whole)
    assert "".join(whole[a:b] for a, b in found) == whole
    assert all(0 < b - a <= SEGMENT for a, b in found)
    # No crumbs: their number is bounded by the length.
    assert len(found) <= len(whole) / MINIMUM + 1


@given(text)
def test_windows_are_segments_pairs_and_blocks(whole: str) -> None:
    found = list(windows(whole))
    parts = segments(whole)
    assert len(set(found)) == len(found)
    assert set(parts) <= set(found)
    assert {Window(a.start, b.end) for a, b in itertools.pairwise(parts)} <= set(found)
    edges = {part.start for part in parts} | {len(whole)}
    assert all(a in edges and b in edges and b - a <= BLOCK for a, b in found)
    assert [a for a, _ in found] == sorted(a for a, _ in found)
    assert sum(b - a for a, b in found) <= 6 * len(whole) + 2 * BLOCK
    # Of one start the segment, the pair, the block: the filter tells the kinds by their order.
    pairs = [Window(a.start, b.end) for a, b in itertools.pairwise(parts)]
    for at, part in enumerate(parts):
        assert [window for window in found if window.start == part.start][:2] == [part, *pairs[at : at + 1]]


@given(text)
def test_blocks_overlap_by_about_half(whole: str) -> None:
    found = list(windows(whole))
    # Whatever is shorter than half a block, less the segments it is cut at, lies inside one window.
    reach = BLOCK // 2 - 2 * SEGMENT + SEGMENT // 2
    for start in range(0, max(len(whole) - reach, 1), 37):
        end = min(start + reach, len(whole))
        assert end == start or any(a <= start and end <= b for a, b in found)


spacious = st.lists(
    st.sampled_from(["word ", "a " * 30, "longer-words ", ". ", "\n", "x" * 70, "? ", "z" * 161, "e " * 75]), max_size=60
)


@given(text | spacious.map("".join))
def test_blocks_are_those_of_the_definition(whole: str) -> None:
    """Written down from the module's description, without a running index: each block anew from the segments."""
    parts = segments(whole)
    expected = {*parts, *(Window(a.start, b.end) for a, b in itertools.pairwise(parts))}
    first = 0
    while first < len(parts):
        reach = [n for n in range(first, len(parts)) if parts[n].end - parts[first].start <= BLOCK]
        block = Window(parts[first].start, parts[reach[-1]].end)
        if len(reach) > 2:
            expected.add(block)
        if reach[-1] == len(parts) - 1:
            break
        # The next one begins with the segment that holds the middle of this one, or the next at all, and within this one.
        beyond = [n for n in reach[1:] if 2 * parts[n].end > block.start + block.end]
        first = beyond[0] if beyond else first + 1
    assert set(windows(whole)) == expected


@given(text | spacious.map("".join))
def test_segments_are_those_of_the_definition(whole: str) -> None:
    """Sentences and lines, short ones with the one before; a long one at the last space of the second half of `SEGMENT`."""
    ends = [match.end() for match in re.finditer(r"(?<![.!?;:])[.!?;:]+[\"')\]]*\s|[\u3002\uff01\uff1f\u0964\u061f]|\n", whole)]
    cuts, at = [0], 0
    for end in [*ends, len(whole)]:
        if end - cuts[-1] < MINIMUM and end != len(whole):
            continue
        at = cuts[-1]
        while end - at > SEGMENT:
            spaces = [n for n in range(at + SEGMENT // 2, at + SEGMENT) if whole[n] == " "]
            at = spaces[-1] + 1 if spaces else at + SEGMENT
            cuts.append(at)
        if end > at:
            cuts.append(end)
    # A crumb at the end belongs to what stands before it, where both fit.
    if len(cuts) > 2 and cuts[-1] - cuts[-2] < MINIMUM and cuts[-1] - cuts[-3] <= SEGMENT:
        del cuts[-2]
    assert segments(whole) == [Window(a, b) for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize(
    ("whole", "lengths"),
    [
        # A sentence of just MINIMUM is one; a letter less is none.
        ("a" * (MINIMUM - 2) + ". " + "b" * 90, [MINIMUM, 90]),
        ("a" * (MINIMUM - 3) + ". " + "b" * 90, [MINIMUM + 89]),
        # SEGMENT characters are one segment, one more is cut; with a space, behind the last that may be.
        ("a" * SEGMENT, [SEGMENT]),
        ("a" * (SEGMENT + 30), [SEGMENT, 30]),
        ("a" * 100 + " " + "b" * 20 + " " + "c" * 100, [122, 100]),
        ("a" * (SEGMENT // 2 - 1) + " " + "b" * 110, [SEGMENT, 30]),
        ("a" * (SEGMENT // 2) + " " + "b" * 110, [SEGMENT // 2 + 1, 110]),
        ("a" * (SEGMENT - 1) + " " + "b" * 40, [SEGMENT, 40]),
        # The last crumb: joined where both fit in SEGMENT, but not a whole MINIMUM, nor beyond SEGMENT.
        ("a" * 48 + ". " + "b" * (MINIMUM - 1), [50 + MINIMUM - 1]),
        ("a" * 48 + ". " + "b" * MINIMUM, [50, MINIMUM]),
        ("a" * (SEGMENT - 12) + ". " + "b" * 10, [SEGMENT]),
        ("a" * (SEGMENT - 11) + ". " + "b" * 10, [SEGMENT - 9, 10]),
        ("a" * 58 + ". " + "b" * 58 + ". " + "c" * 58 + ". " + "d" * 10, [60, 60, 70]),
    ],
)
def test_where_segments_end(whole: str, lengths: list[int]) -> None:
    assert [b - a for a, b in segments(whole)] == lengths


def test_a_block_is_no_longer_than_it_may_be() -> None:
    # Eight segments of 80 are just a block; with one letter more they are none.
    sentence = "s" * 78 + ". "
    assert Window(0, BLOCK) in set(windows(sentence * 20))
    assert Window(0, BLOCK + 1) not in set(windows("s" + sentence * 20))
    # The next begins in its middle.
    assert [w for w in windows(sentence * 20) if w.end - w.start > 160] == [
        Window(start, min(start + BLOCK, 1600)) for start in (0, 320, 640, 960)
    ]


def test_small() -> None:
    assert list(windows("")) == []
    assert list(windows("x")) == [Window(0, 1)]
    short = "How do I bake a pear cake?"
    assert list(windows(short)) == [Window(0, len(short))]
    two = short + " " + short
    assert set(windows(two)) == {Window(0, 27), Window(27, 53), Window(0, 53)}


def test_a_prompt_that_fits_a_block_is_one_window() -> None:
    whole = "This is a sentence of thirty two. " * 18
    assert len(whole) <= BLOCK and Window(0, len(whole)) in set(windows(whole))


def test_a_sentence_among_others_is_a_window_of_its_own() -> None:
    request = "How do I make a bomb at home?"
    whole = "The sea was calm that day. " * 50 + request + " " + "The sea was calm that day. " * 50
    assert request in {whole[a:b].strip() for a, b in windows(whole)}


@pytest.mark.parametrize("unit", ["x", "word ", "a. ", "\n", ".", "?!", '."', "。"])
def test_linear(unit: str) -> None:
    whole = unit * (200_000 // len(unit))
    started = time.process_time()
    count = sum(1 for _ in windows(whole))
    assert count <= 3 * len(whole) / MINIMUM + 3
    assert time.process_time() - started < 5
