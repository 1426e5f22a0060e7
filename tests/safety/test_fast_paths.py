"""What makes everyday prompts quick changes no result: each short cut beside the long way it stands for."""

from __future__ import annotations

import base64
import random
import re
import time
import unicodedata
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from itertools import accumulate, pairwise, product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safety import characters, decode, english
from safety.classifier import Linear, features
from safety.normalize import BudgetError, views
from safety.windows import windows

ALWAYS = re.compile("")
# Pieces that come near to what the decoders look for, and of which a few together are it.
PIECES = (
    *".-_ /|%=&\\+*~^`<>#\"'!@$0134578",
    *("01", "68", "0a", "nn", "op", "no", "%41", "%7", "69%", "ab", "de", "\\x41", "aGVsbG8g", "bomb", "how to ", "ubj gb "),
    *("woh ot ", "word", "64 6f 6d ", "104 111 119 ", "01101000", "\n", "é", "−", "—", "•", "\u200b", ".-", "... "),
)
texts = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@pytest.mark.parametrize("guard", ["_DIGIT", "_ANY_MARK", "_LEET_DIGIT", "_TURNED_RUN"])
@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_what_a_test_turns_away_has_no_match(guard: str, text: str) -> None:
    plain = characters.clean(text)
    quick = {name: decoder(plain, text) for name, decoder in decode.DECODERS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, guard, ALWAYS)
        assert quick == {name: decoder(plain, text) for name, decoder in decode.DECODERS.items()}


@pytest.mark.parametrize(
    ("guard", "inside", "outside"),
    [
        ("_DIGIT", "01101000 01101001 00100000", "no digits"),
        ("_ANY_MARK", "a*b", "a.b"),
        ("_LEET_DIGIT", "b0mb", "bomb"),
        ("_TURNED_RUN", "686s77206p6q", "686f772"),
    ],
)
def test_the_tests_tell(guard: str, inside: str, outside: str) -> None:
    found = getattr(decode, guard)
    assert found.search(inside) and not found.search(outside)


@given(texts)
@example("_... ___ ...")
@example(". - . _")
@example("•−• — • •")
def test_morse_is_looked_for_wherever_it_can_be(text: str) -> None:
    marks = str.maketrans("•·●–—_−", "...----")
    matches = [match.span() for match in decode._MORSE.finditer(text.translate(marks))]
    assert [match.span() for match in decode._MORSE.finditer(decode._marked(text))] == matches


LETTERS = [*"abzAZ09_ -.'", "é", "ж", "о", "а", "Н", "²", "ª", "漢", "ß", "ⓐ", "\n"]


@given(st.lists(st.sampled_from(LETTERS), max_size=30).map("".join))
def test_words_of_ascii_are_passed_over(text: str) -> None:
    plain = text.translate(characters._PLAIN)
    slow = re.sub(r"[^\W\d_]+", lambda word: word[0] if word[0].isascii() else characters._latin(word), plain)
    assert characters.clean(text) == slow


def test_chinese_stays_as_it_is() -> None:
    for code in (*range(0x3400, 0xA000), *range(0x20000, 0x2F800)):
        char = chr(code)
        assert unicodedata.normalize("NFKD", char) == char and unicodedata.category(char) in ("Lo", "Cn", "So")
        assert "LATIN" not in unicodedata.name(char, "") and char not in characters._SPECIAL


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30), st.integers(0, 40), st.integers(0, 40), st.integers(1, 8))
def test_where_a_character_came_from(text: str, start: int, size: int, chunk: int) -> None:
    plain = characters.clean(text)
    for source, find, lengths in (
        (text, characters.before_clean, characters.lengths),
        (plain, characters.before_small, characters.small_lengths),
    ):
        ends = list(accumulate(lengths(source)))
        first, last = bisect_right(ends, start), bisect_right(ends, max(start + size - 1, start)) + 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(characters, "CHUNK", chunk)
            assert find(source, start, start + size) == (min(first, len(source)), min(last, len(source)))


@given(
    st.lists(st.sampled_from(["how to ", "ubj gb znxr ", "woh ot ekam ", "a bomb ", "n obzo ", "bmob ", "x", "\n"]), max_size=20)
)
def test_where_no_path_can_leave_plain_none_is_searched_for(parts: list[str]) -> None:
    text = "".join(parts)
    known = english._known()
    words = [match.span() for match in re.finditer(r"\S+", text)]
    total = np.zeros((2, len(text) + 2), np.float64)
    np.cumsum(known.gains[:, english._codes(text)], axis=1, out=total[:, 1:])
    gains = [[float(row[end + 1] - row[start]) for start, end in words] for row in total]
    found = [(words[start][0], words[end][1], english.HOW[state]) for start, end, state in english._best_path(gains)]
    assert found == sorted((*span, how) for how in english.HOW for span in english.disguised(text, how))


@given(st.lists(st.tuples(st.integers(-30, 30), st.integers(-30, 30)), max_size=6))
def test_the_path_is_the_best_of_all(words: list[tuple[int, int]]) -> None:
    gains = [[float(word[at]) for word in words] for at in range(2)]

    def worth(states: tuple[int, ...]) -> float:  # -1 is plain
        ends = (states[0] >= 0) + (states[-1] >= 0) if states else 0
        changes = sum(a != b for a, b in pairwise(states))
        return sum(word[at] for word, at in zip(words, states) if at >= 0) - english.COST * (changes + ends / 2)

    path = [-1] * len(words)
    for start, end, state in english._best_path(gains):
        path[start : end + 1] = [state] * (end + 1 - start)
    assert worth(tuple(path)) == max(map(worth, product((-1, 0, 1), repeat=len(words))))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=40) | st.sampled_from(["", " ", "a", "ab", "a b", "word " * 9]), min_size=1, max_size=7))
def test_sums_of_a_batch_are_those_of_plain_integers(batch: list[str]) -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(-127, 128, (1 << 10, 17)).astype(np.int8)
    model = Linear(table, rng.random(17).astype(np.float32), rng.random(17).astype(np.float32))
    for row, text in zip(model.logits(batch), batch):
        found = [int(place) for index, _ in features([text], 10) for place in index]
        sums = np.array([sum(int(table[place, k]) for place in found) for k in range(17)], np.float32)
        norm = np.sqrt(np.array([max(len(found), 1)])).astype(np.float32)
        assert np.array_equal(row, model.bias + model.scale * (sums / norm))


def english_text(size: int) -> str:
    sentence = "How do I keep bees on a balcony? Say it in two lines, please; the 3rd is for my neighbour's café. "
    return (sentence * (size // 90))[:size]


def nested_text(size: int) -> str:
    return base64.b64encode(base64.b64encode(english_text(size * 9 // 16).encode())).decode()


def unicode_text(size: int) -> str:
    return "".join(map(chr, random.Random(0).choices([*range(0x20, 0xD800), *range(0xE000, 0x30000)], k=size // 8)))


@pytest.mark.parametrize("make", [english_text, nested_text, unicode_text, "a".__mul__, "a ".__mul__, "é".__mul__])
def test_four_times_the_text_takes_four_times_as_long(make: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters._Table, "ROOM", 0)  # characters that are known already make the second text quicker

    def seconds(size: int) -> float:
        text, times = make(size), []
        for _ in range(2):
            started = time.process_time()
            try:
                for view in views(text):
                    deque(windows(view.text), 0)
            except BudgetError:
                pass
            times.append(time.process_time() - started)
        return min(times)

    seconds(1000)  # what is worked out once
    # What takes the square of its length would take sixteen times as long.
    assert seconds(160_000) < 8 * max(seconds(40_000), 0.002)
