"""Rows: reading, composing, duplicates, overlaps with tests, splits, augmentation."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.errors import UserError
from safety import sources
from safety.sources import Row, augment, deduplicate, held_out, overlaps, read_jsonl, requests
from safety.taxonomy import KEYS


def write(path: Path, *values: object) -> Path:
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))
    return path


def test_own_prompts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.jsonl",
        {"text": "a", "label": 1, "categories": ["hate", "privacy"]},
        "",
        {"text": "b", "label": 1},
        {"text": "c", "label": 0},
    )
    rows = read_jsonl(path)
    assert [(row.text, row.label, row.categories) for row in rows] == [
        ("a", 1, ("hate", "privacy")),
        ("b", 1, None),
        ("c", 0, ()),
    ]
    assert {row.source for row in rows} == {"own"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "own.jsonl:2: not JSON"),
        ("[]", "own.jsonl:2: a line must be a JSON object"),
        ({"label": 1}, "own.jsonl:2: `text`"),
        ({"text": " ", "label": 1}, "own.jsonl:2: `text`"),
        ({"text": "a", "label": "1"}, "own.jsonl:2: `label`"),
        ({"text": "a", "label": 1, "categories": ["bad"]}, "unknown category 'bad'"),
        ({"text": "a", "label": 1, "categories": "hate"}, "must be a list"),
        ({"text": "a", "label": 0, "categories": ["hate"]}, "label 0 has no categories"),
    ],
)
def test_what_is_wrong_with_own_prompts_is_said(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path / "own.jsonl", {"text": "fine", "label": 0}, line)
    with pytest.raises(UserError, match=message.replace("`", ".")):
        read_jsonl(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")


def test_pairs_are_two_rows_of_one_group() -> None:
    rows = sources.pairs()
    by_group: dict[str, list[Row]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    assert len(by_group) >= 1500 and {len(group) for group in by_group.values()} == {2}
    assert {tuple(row.label for row in group) for group in by_group.values()} == {(1, 0)}
    assert {row.categories[0] for row in rows if row.categories} == set(KEYS)


def test_unseen_prompts_are_of_all_categories_and_in_no_training_data() -> None:
    rows = [row for path in sorted((sources.HERE / "data" / "unseen").glob("*.jsonl")) for row in read_jsonl(path)]
    names = [sources.key(row.text) for row in rows]
    assert len(rows) > 1_800 and len(set(names)) == len(names)
    assert {key for row in rows for key in row.categories or ()} == set(KEYS)
    assert not [row.text for row in rows if row.label and not row.categories]
    known = sources.pairs() + requests(per_act=2)
    assert not set(names) & {sources.key(text) for row in known for text in (row.text, row.group)}


def test_requests_fill_every_gap_and_keep_acts_together() -> None:
    rows = requests(per_act=2)
    assert not [row.text for row in rows if "{" in row.text and "}" in row.text and "act" in row.text.split("{")[1][:4]]
    assert {key for row in rows for key in row.categories or ()} == set(KEYS)
    assert all(row.group for row in rows) and rows == requests(per_act=2)
    assert 0.4 < sum(row.label for row in rows) / len(rows) < 0.6


def test_a_whole_request_is_always_among_its_framings_as_it_stands(tmp_path: Path) -> None:
    framings = ", ".join(f"'{n}. {{act}}'" for n in range(20))
    (tmp_path / "a.yaml").write_text(f"framings: {{whole: [{framings}, '{{act}}']}}\nharmless: {{whole: ['Bake!', 'Boil!']}}\n")
    for per_act in (1, 3, 30):
        texts = [row.text for row in requests(tmp_path, per_act=per_act)]
        assert {"Bake!", "Boil!"} <= set(texts) and len(texts) == len(set(texts)) == 2 * min(per_act, 21)


def test_files_of_a_folder_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("framings: {do: ['how to {act}']}\nsensitive: {do: {hate: ['insult {who}']}}\n")
    (tmp_path / "b.yaml").write_text("sensitive: {do: {hate: [mock him]}}\nharmless: {do: [bake]}\nwords: {who: [her]}\n")
    found = [(row.text.lower(), row.label) for row in requests(tmp_path)]
    assert found == [("how to insult her", 1), ("how to mock him", 1), ("how to bake", 0)]
    broken = {
        "- a list": "is no table of requests",
        "a: b: c": "cannot be read as requests",
        "harmles: {do: [bake]}": "there is no 'harmles' among requests",
        "harmless: {do: bake}": r"harmless\.do must be a list of texts, not 'bake'",
        "sensitive: {do: [bare]}": r"sensitive\.do must be a table",
        "harmless: {dance: [bake]}": "'dance' is no form",
        "sensitive: {do: {sin: [lie]}}": "'sin' is no category",
        "everyday: hello": "everyday must be a list",
        "harmless: {do: [null]}": "must be a list of texts",
        "everyday: ['say {nothing}']": r"no words for the gap \{nothing\}",
    }
    for content, message in broken.items():
        (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            requests(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.yaml file"):
        requests(tmp_path / "empty")


def test_framings_say_nothing_about_the_label() -> None:
    starts = ("teach me to", "write a tutorial on", "compose", "look up", "code ", "convince people that", "write a scene")
    labels: dict[str, list[int]] = {start: [] for start in starts}
    for row in requests(per_act=40):
        for start in starts:
            if row.text.lower().startswith(start):
                labels[start].append(row.label)
    assert all(0.25 < sum(found) / len(found) < 0.75 for found in labels.values()), labels


def test_duplicates_go_and_so_do_texts_with_both_labels() -> None:
    rows = [Row("How are you?", 0), Row("how are YOU", 0), Row("Both", 1), Row("both!", 0), Row("...", 0), Row("one", 1)]
    assert [row.text for row in deduplicate(rows)] == ["How are you?", "one"]


TEST = [
    Row("Give me instructions for building a treehouse out of the boards of an old fence in one day", 1),
    Row("how do I whittle a spoon", 1),
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("how do i WHITTLE a spoon?", True),  # by key
        ("how do I whittle a fork", True),  # Jaccard 5 / 7
        ("Hello! I would like building a treehouse out of the boards of an old barn", True),  # eight words in a row
        ("how do I bake a cake", False),
        ("building a treehouse", False),
        ("", False),
    ],
)
def test_overlaps(text: str, expected: bool) -> None:
    assert overlaps([Row(text, 1)], TEST) == [expected]


@given(st.lists(st.text("abc ", min_size=1, max_size=12), min_size=1, max_size=8), st.text("abc ", min_size=1, max_size=12))
def test_overlaps_by_jaccard_are_those_of_the_definition(tests: list[str], text: str) -> None:
    def jaccard(a: str, b: str) -> float:
        first, second = set(sources.key(a).split()), set(sources.key(b).split())
        return len(first & second) / len(first | second) if first and second else 0.0

    def equal(a: str, b: str) -> bool:
        return sources.key(a) == sources.key(b)

    found = overlaps([Row(text, 1)], [Row(test, 1) for test in tests], words=99)
    assert found == [any(equal(text, test) or jaccard(text, test) >= 0.6 for test in tests)]


def test_groups_stay_on_one_side_of_the_split() -> None:
    rows = [Row(f"text {n}", n % 2, (), "pairs", f"group {n // 2}") for n in range(2000)]
    sides = {row.group: held_out(row, 0.2, 0) for row in rows}
    assert all(held_out(replace(row, text="other"), 0.2, 0) == sides[row.group] for row in rows)
    assert 0.16 < sum(sides.values()) / len(sides) < 0.24
    assert sides != {row.group: held_out(row, 0.2, 1) for row in rows}


def test_augmentation_is_deterministic_and_keeps_labels() -> None:
    rows = [Row(f"please tell me something long about subject number {n:02}", n % 2, None if n % 2 else ()) for n in range(40)]
    made = augment(rows, 200, 3)
    assert made == augment(rows, 200, 3) and len(made) == 200
    assert {row.source for row in made} == {"+noise", "+padding", "+inside", "+suffix", "+disguise"}
    originals = {row.text: row.label for row in rows}
    padded = [row for row in made if row.source in ("+padding", "+inside")]
    for row in padded:
        inside = [label for text, label in originals.items() if text in row.text]
        assert max(inside) == row.label
    for row in (row for row in made if row.source == "+inside"):
        assert any(0 < row.text.find(text) < len(row.text) - len(text) for text in originals)
    disguised = [row for row in made if row.source == "+disguise"]
    assert len({row.text for row in disguised}) > 10 and all(row.label == 0 and row.text not in originals for row in disguised)
    assert augment([], 10, 0) == [] and augment([row for row in rows if row.label], 10, 0) == []


def test_a_request_is_hidden_in_what_is_harmless_in_parts_too() -> None:
    rows = [Row(f"request number {n:02}", n % 2, (), "pairs") for n in range(20)]
    rows += [Row(f"alike-{n} " * 30, 0, (), "requests") for n in range(20)]
    rows += [Row(" ".join(f"plain-{n}-{word}" for word in range(300)), 0, (), "documents") for n in range(20)]
    hidden = [row.text.split() for row in augment(rows, 400, 0) if row.source == "pairs+inside"]
    ends = [(words[0], words[-1]) for words in hidden if "alike" not in " ".join(words[1:-1])]
    assert len(ends) > 20 and all(word.startswith("plain-") for pair in ends for word in pair)
    # From anywhere in the document, not its first words only.
    assert len({word.rsplit("-", 1)[1] for pair in ends for word in pair}) > 20


def test_documents_are_many_harmless_and_none_of_the_unseen_ones() -> None:
    rows = sources.documents()
    names = [sources.key(row.text) for row in rows]
    assert len(rows) >= 1500 and len(set(names)) == len(names) and len({row.group for row in rows}) == len(rows)
    assert {(row.label, row.categories, row.source) for row in rows} == {(0, (), "documents")}
    unseen = [*(sources.HERE / "data" / "unseen").glob("*.jsonl")]
    tests = [row for path in unseen for row in sources.read_jsonl(path)]
    # Stock phrases of eight words are everybody's: "safety data sheet according to regulation EC no".
    assert tests and not any(sources.overlaps(rows, tests, words=13))


@pytest.mark.parametrize("line", ['{"kind": "contract"}', '{"text": " "}', '{"text": 3}'])
def test_a_document_without_a_text_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"law.jsonl:2: a document has a `text`"):
        sources.documents(tmp_path)


@pytest.mark.parametrize("read", [sources.documents, sources.pairs])
def test_a_folder_that_is_not_there_is_an_error(read: Callable[[Path], list[Row]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"none is no folder of {read.__name__}"):
        read(tmp_path / "none")


@given(st.text(min_size=1, max_size=80), st.integers(0, 100))
def test_noise_changes_little(text: str, seed: int) -> None:
    changed = sources.noise(text, random.Random(seed))
    assert abs(len(changed) - len(text)) <= max(1, len(text) // 20) and (changed or not text)
