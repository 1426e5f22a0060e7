"""Preferences from every kind of row, what is refused of them, and that no prompt is on both sides of a split."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import noise

from mmgpt.config import SourceConfig
from mmgpt.data.messages import Rejected, images_of, text_of
from mmgpt.data.preferences import load_preferences, read_preferences
from mmgpt.data.ranked import Preference, join_prompts, rank_item, ranked_pairs, statistics
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.split import split_by_prompt
from mmgpt.data.template import encode, get_template
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.errors import UsageError

TOKENIZER = Tokenizer.bytes()
ASK = {"prompt": "Why?"}


def render(messages):
    return encode(messages, TOKENIZER, get_template("chatml"), 4)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path: Path, *rows: Any, **settings: Any) -> list[Preference | Rejected]:
    path = write(tmp_path / "rows.jsonl", list(rows))
    return list(read_preferences(SourceConfig(path=path, **settings)))


def one(tmp_path: Path, row: Any) -> Preference:
    (found,) = read(tmp_path, row)
    assert isinstance(found, Preference), found
    return found


def said(preference: Preference) -> list[tuple[str, str]]:
    return [(message["role"], text_of(message)) for message in preference.prompt]


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize("row", [
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"prompt": [turn("user", "Why?")], "chosen": [turn("assistant", "So.")], "rejected": [turn("assistant", "No.")]},
    {"chosen": [turn("user", "Why?"), turn("assistant", "So.")], "rejected": [turn("user", "Why?"), turn("assistant", "No.")]},
    {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
    {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "So.", "rejected": "No."},
    {"chosen": "Why? So.", "rejected": "Why? No."},
    {"prompt": "Why?", "chosen": turn("assistant", "So."), "rejected": turn("assistant", "No.")},
    {"conversations": [{"from": "human", "value": "Why?"}], "chosen": {"from": "gpt", "value": "So."},
     "rejected": {"from": "gpt", "value": "No."}},
    {"prompt": "Why?", "answers": ["So.", "No."], "ranks": [1, 2]},
    {"prompt": "Why?", "completions": ["So.", "No."], "scores": [0.5, -1]},
    {"prompt": "Why?", "answers": [[turn("assistant", "So.")], "No."], "votes": [3, 1]},
    {"instruction": "Why?", "output_1": "So.", "output_2": "No.", "preference": 1},
])  # fmt: skip
def test_every_form_says_the_same(tmp_path, row):
    found = one(tmp_path, row)
    assert said(found) == [("user", "Why?")]
    assert (found.answers, found.pairs, found.compared) == (["So.", "No."], [(0, 1)], 1)
    assert [text_of(message) for message in found.conversations()[1]] == ["Why?", "No."]


def test_a_dialogue_of_several_turns(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And\n\nHuman: now?\n\nAssistant:"
    found = one(tmp_path, {"chosen": f"{start} This.", "rejected": f"{start} That."})
    assert said(found) == [("user", "Hi"), ("assistant", "Hello"), ("user", "And\n\nnow?")]
    assert found.answers == ["This.", "That."]


def test_a_system_message_and_a_prompt_besides_the_sides(tmp_path):
    row = {
        "prompt": [turn("system", "Be brief."), turn("user", "Why?")],
        "chosen": [turn("assistant", "So.")],
        "rejected": [turn("assistant", "No.")],
    }
    assert said(one(tmp_path, row)) == [("system", "Be brief."), ("user", "Why?")]


def test_rankings_with_ties(tmp_path):
    found = one(tmp_path, {**ASK, "answers": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 4]})
    assert found.pairs == [(1, 0), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert found.compared == 6


def test_pairs_of_a_ranking():
    assert ranked_pairs([2, 1, 3]) == [(1, 0), (0, 2), (1, 2)]
    assert ranked_pairs([1, 1]) == []
    assert len(ranked_pairs(range(9))) == 36


def test_votes_on_a_pair_are_counted_whichever_side_it_stood_on(tmp_path):
    def vote(first: str, second: str, preference: Any) -> dict[str, Any]:
        return {"instruction": "Why?", "output_1": first, "output_2": second, "preference": preference}

    rows = [vote("a", "b", 1), vote("b", "a", 1), vote("b", "a", 1.9), vote("c", "d", 2), vote("d", "c", 2), vote("e", "f", None)]
    found = read(tmp_path, *rows)
    assert isinstance(found[0], Preference) and (found[0].answers, found[0].pairs) == (["a", "b"], [(0, 1)])
    assert [item.reason for item in found[1:]] == ["only_ties", "only_ties"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("row", "reason"), [
    ({**ASK, "chosen": "So.", "rejected": " So. "}, "equal_answers"),
    ({**ASK, "chosen": "So.", "rejected": " "}, "empty_answer"),
    ({**ASK, "answers": ["So."], "ranks": [1]}, "one_answer"),
    ({**ASK, "answers": ["a", "b"], "ranks": [1, 1]}, "only_ties"),
    ({**ASK, "answers": ["a", "b"], "ranks": [1]}, "bad_ranks"),
    ({**ASK, "answers": ["a", "b"], "ranks": [1, float("nan")]}, "bad_ranks"),
    ({**ASK, "answers": ["a", "b"], "ranks": ["1", "2"]}, "bad_ranks"),
    ({**ASK, "answers": ["a", "b"]}, "bad_ranks"),
    ({**ASK, "answers": ["a", 3], "ranks": [1, 2]}, "bad_part"),
    ({"chosen": "one", "rejected": "two"}, "empty_prompt"),
    ({"prompt": " ", "chosen": "one", "rejected": "two"}, "empty_prompt"),
    ({"prompt": [], "chosen": "one", "rejected": "two"}, "empty_prompt"),
    ({"prompt": [turn("user", "a"), turn("assistant", "b")], "chosen": "one", "rejected": "two"}, "bad_role"),
    ({"chosen": [turn("user", "a")], "rejected": [turn("user", "b")]}, "bad_role"),
    ({"chosen": [turn("user", "a"), turn("assistant", "c")], "rejected": [turn("user", "b"), turn("assistant", "d")]},
     "prompts_differ"),
    ({**ASK, "chosen": "one", "rejected": [turn("assistant", "two")]}, "not_messages"),
    ({**ASK, "output_1": "a", "output_2": "b", "preference": "first"}, "bad_ranks"),
    ({"image": "gone.png", **ASK, "chosen": "one", "rejected": "two"}, "missing_file"),
    ({"prompt": "Why?"}, "no_preference"),
])  # fmt: skip
def test_what_cannot_be_learnt_from_is_rejected_with_its_place(tmp_path, row, reason):
    (found,) = read(tmp_path, row)
    assert isinstance(found, Rejected) and found.reason == reason, found
    assert found.where.endswith("rows.jsonl:1") and found.detail


def test_a_broken_line_is_one_rejection(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen"\n' + json.dumps({**ASK, "chosen": "a", "rejected": "b"}))
    found = list(read_preferences(SourceConfig(path=str(tmp_path / "rows.jsonl"))))
    assert [type(item) for item in found] == [Rejected, Preference]


def test_images_go_to_the_prompt(tmp_path):
    noise(1).save(tmp_path / "a.png")
    found = one(tmp_path, {"image": "a.png", "prompt": "What is it?", "answers": ["x", "y"], "ranks": [1, 2]})
    assert images_of(found.prompt) == [str(tmp_path / "a.png")]
    assert [part["type"] for part in found.prompt[0]["content"]] == ["image", "text"]
    item = rank_item(found, render, 200)
    assert not isinstance(item, Rejected) and item.images == [str(tmp_path / "a.png")]
    assert item.shared.count(TOKENIZER.image_id) == 4


def test_gzip_limit_and_split(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "split": "train" if i < 3 else "test"} for i in range(5)]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    source = SourceConfig(path=str(tmp_path / "rows.jsonl.gz"), split="test")
    assert [said(item)[0][1] for item in read_preferences(source)] == ["p3", "p4"]  # type: ignore[arg-type]
    assert len(list(read_preferences(SourceConfig(path=source.path, limit=2)))) == 2
    with pytest.raises(UsageError, match="there is test, train"):
        list(read_preferences(SourceConfig(path=source.path, split="dev")))


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_tables(tmp_path, kind):
    sides = {"chosen": [turn("assistant", "a")], "rejected": [turn("assistant", "b")]}
    rows = [{"prompt": [turn("user", f"q{i}")], **sides} for i in range(3)]
    table = datasets.Dataset.from_list(rows)
    if kind == "parquet":
        path = str(tmp_path / "rows.parquet")
        table.to_parquet(path)
    else:
        path = str(tmp_path / "saved")
        table.save_to_disk(path)
    found = list(read_preferences(SourceConfig(path=path)))
    assert [said(item) for item in found] == [[("user", f"q{i}")] for i in range(3)]  # type: ignore[arg-type]


def test_a_table_with_pictures(tmp_path):
    rows = [{"prompt": "What?", "answers": ["a", "b", "c"], "ranks": [3, 1, 2], "image": noise(i)} for i in range(2)]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    found = list(read_preferences(SourceConfig(path=str(tmp_path / "rows.parquet"))))
    assert all(isinstance(item, Preference) and len(images_of(item.prompt)) == 1 for item in found)
    assert found[0].key != found[1].key  # type: ignore[union-attr]


def load(path: str, max_length: int = 100) -> tuple[list[Any], int, RejectionReport]:
    report = RejectionReport(None)
    items, total = load_preferences([SourceConfig(path=path)], render, max_length=max_length, report=report)
    return items, total, report


def test_all_pairs_of_a_prompt_are_one_item(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "c"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    items, total, report = load(write(tmp_path / "rows.jsonl", rows))
    assert total == 5 and len(report) == 0
    first, second = (item.preference for item in items)
    assert (first.answers, first.pairs, first.compared) == (["a", "b", "c"], [(0, 1), (0, 2), (1, 0), (0, 1)], 4)
    assert first.where.endswith("rows.jsonl:1 and 3 more") and second.compared == 1
    found = statistics(items)
    assert (found.prompts, found.answers, found.pairs) == (2, 5, 5)
    assert (found.ties, found.repeated, found.contradictions) == (0, 1, 1)


def test_rows_longer_than_the_window_are_counted(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b" * 90}, {"prompt": "p", "chosen": "a", "rejected": "b"}]
    items, _, report = load(write(tmp_path / "rows.jsonl", rows))
    assert report.counts == {"too_long": 1} and "data.max_length is 100" in report.examples[0].detail
    assert items[0].preference.answers == ["a", "b"]


def asked(text: str, answers: list[str]) -> Preference:
    return Preference([{"role": "user", "content": [{"type": "text", "text": text}]}], answers, [(0, 1)], 1, text)


def test_tokens_that_answers_begin_with_are_shared_and_each_keeps_its_end():
    preference = asked("p", ["ab", "abc", "x"])
    item = rank_item(preference, render, 100)
    assert not isinstance(item, Rejected)
    whole = [render(messages) for messages in preference.conversations()]
    for branch, encoded, answer in zip(item.branches, whole, preference.answers):
        ids = item.shared + branch
        assert ids == encoded.ids[: len(ids)] and ids[-1] == TOKENIZER.eos_id
        assert TOKENIZER.decode(encoded.ids[len(ids) :]).strip() == ""
        assert TOKENIZER.decode(branch) == answer
    assert item.lengths == [3, 4, 2]
    close = rank_item(asked("p", ["ab", "abc"]), render, 100)
    assert not isinstance(close, Rejected) and [TOKENIZER.decode(branch) for branch in close.branches] == ["", "c"]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20), st.floats(0, 1), st.integers(0, 5))
def test_no_prompt_is_on_both_sides(prompts, share, seed):
    preferences = [asked(f"p{prompt}", [f"a{i}", f"b{i}"]) for i, prompt in enumerate(prompts)]
    items: Any = [rank_item(preference, render, 100) for preference in preferences]
    train, held = split_by_prompt(items, share, seed, lambda item: item.preference.key)
    assert len(train) + len(held) == len(items)
    assert not {item.preference.key for item in train} & {item.preference.key for item in held}
    assert train and (held or share == 0 or len(set(prompts)) == 1)
    assert len(join_prompts(preferences, most=100)) == len(set(prompts))
    small = join_prompts(preferences, most=4)
    assert sum(len(part.pairs) for part in small) == len(prompts) and all(len(part.answers) <= 4 for part in small)


def test_what_a_judge_of_length_would_reach(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "long answer", "rejected": "short"},
        {"prompt": "q", "chosen": "tiny", "rejected": "very long"},
        {"prompt": "r", "chosen": "same", "rejected": "size"},
        {"prompt": "s", "answers": ["aa", "b", "c"], "ranks": [1, 2, 2]},
    ]
    items, _, _ = load(write(tmp_path / "rows.jsonl", rows))
    found = statistics(items)
    assert (found.pairs, found.ties) == (5, 1)
    assert found.longer == (1 + 0 + 0.5 + 2) / 5
    assert found.better == (12 + 5 + 5 + 3 + 3) / 5
    assert "4 prompts with 9 answers and 5 pairs, 1 ties" in str(found)
