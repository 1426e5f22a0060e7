"""Windows: nothing uncovered, nothing too long, nothing twice, and not too many."""

from __future__ import annotations

import itertools
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


@given(text)
def test_blocks_overlap_by_about_half(whole: str) -> None:
    found = list(windows(whole))
    # Whatever is shorter than half a block, less the segments it is cut at, lies inside one window.
    reach = BLOCK // 2 - 2 * SEGMENT + SEGMENT // 2
    for start in range(0, max(len(whole) - reach, 1), 37):
        end = min(start + reach, len(whole))
        assert end == start or any(a <= start and end <= b for a, b in found)


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
