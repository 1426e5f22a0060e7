"""The contrast pairs: well formed, one file a category, no prompt twice, and two sides that differ in little.

A pair teaches meaning only if its sides share their topic and most of their words; the bounds below keep it so.
"""

import json
import statistics
from collections import Counter
from pathlib import Path

import pytest

from safety import taxonomy

FOLDER = Path(taxonomy.__file__).parent / "data" / "pairs"
FILES = sorted(FOLDER.glob("*.jsonl"))
FIELDS = {"category", "sensitive", "harmless", "differs"}
ATTACKS = {"jailbreak", "prompt_injection"}
"""Whole messages are swapped there more often than a phrase: they get the wider bound."""

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts(path: Path) -> list[str]:
    return [pair[side] for pair in read(path) for side in ("sensitive", "harmless")]


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


def word_edits(first: str, second: str) -> int:
    """Levenshtein distance in words."""
    left, right = first.split(), second.split()
    row = list(range(len(right) + 1))
    for i, word in enumerate(left, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != other))
    return row[-1]


def opening(text: str) -> str:
    return " ".join(text.casefold().split()[:3])


def test_word_edits():
    assert word_edits("kill a python process", "kill a process") == 1
    assert word_edits("", "a b c") == 3
    assert word_edits("a b c d", "b c d e") == 2


def test_every_category_has_its_pairs():
    assert {path.stem for path in FILES} == set(taxonomy.KEYS)
    assert sum(len(read(path)) for path in FILES) >= 1500


@every_file
def test_well_formed(path):
    for number, pair in enumerate(read(path), 1):
        where = f"{path.name}:{number}"
        assert pair.keys() == FIELDS, where
        assert pair["category"] == path.stem and path.stem in taxonomy.KEYS, where
        for name, text in pair.items():
            assert isinstance(text, str) and text and text == text.strip(), f"{where}: {name}"
        assert " -> " in pair["differs"], where
        assert folded(pair["sensitive"]) != folded(pair["harmless"]), where


def test_no_prompt_twice():
    seen: dict[str, str] = {}
    for path in FILES:
        for text in prompts(path):
            assert folded(text) not in seen, f"{path.name} repeats a prompt of {seen[folded(text)]}: {text!r}"
            seen[folded(text)] = path.name


def edits(path: Path) -> list[int]:
    return [word_edits(pair["sensitive"], pair["harmless"]) for pair in read(path)]


@every_file
def test_sides_differ_in_a_phrase(path, record_property):
    found = edits(path)
    middle = statistics.median(found)
    record_property("median_word_edits", middle)
    print(f"{path.stem}: {len(found)} pairs, word edits median {middle}, most {max(found)}")
    assert middle <= (12 if path.stem in ATTACKS else 10)


def test_sides_of_all_hazards_differ_in_a_phrase(record_property):
    middle = statistics.median(count for path in FILES if path.stem not in ATTACKS for count in edits(path))
    record_property("median_word_edits", middle)
    assert middle <= 8


@every_file
def test_openings_vary(path):
    texts = prompts(path)
    common, count = Counter(map(opening, texts)).most_common(1)[0]
    assert count <= 0.08 * len(texts), f"{count} of {len(texts)} prompts open with {common!r}"


def test_openings_vary_over_all_files():
    texts = [text for path in FILES for text in prompts(path)]
    common, count = Counter(map(opening, texts)).most_common(1)[0]
    assert count <= 0.08 * len(texts), f"{count} of {len(texts)} prompts open with {common!r}"
