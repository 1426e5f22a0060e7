"""Prompts of every kind of source, the order in which they are answered, and plain text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import noise, tiny_model

from mmgpt.config import SourceConfig
from mmgpt.data.messages import images_of, text_of, user
from mmgpt.data.prompts import Prompt, PromptLoader, load_prompts
from mmgpt.data.ranked import prompt_key
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.split import split_by_prompt
from mmgpt.data.text import holds_text, load_text
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.errors import UsageError


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def load(path: str, *, max_length: int = 200, **settings: Any) -> tuple[list[Prompt], RejectionReport]:
    report = RejectionReport(None)
    model = tiny_model(vision=settings.pop("vision", True))
    found, _ = load_prompts([SourceConfig(path=path, **settings)], model.encode, max_length=max_length, report=report, seed=0)
    return found, report


FORMS = {
    "conversation": {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
    "open": {"messages": [{"role": "user", "content": "hello"}]},
    "prompt": {"prompt": "hello"},
    "instruction": {"instruction": "hello", "output": "hi"},
    "preference": {"prompt": "hello", "chosen": "hi", "rejected": "no"},
    "hh": {"chosen": "\n\nHuman: hello\n\nAssistant: hi", "rejected": "\n\nHuman: hello\n\nAssistant: no"},
    "ranking": {"prompt": "hello", "answers": ["a", "b"], "ranks": [1, 2]},
    "question": {"question": "hello", "answer": "hi"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_prompt(tmp_path: Path, form: str):
    found, report = load(lines(tmp_path / "rows.jsonl", [FORMS[form]]))
    assert [prompt.messages for prompt in found] == [[user("hello")]] and not len(report)


def test_the_last_answer_alone_is_left_away(tmp_path: Path):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    found, _ = load(lines(tmp_path / "rows.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}]))
    assert [text_of(message) for message in found[0].messages] == ["one", "two", "three"]


def test_a_prompt_counts_once_and_what_cannot_be_asked_is_reported(tmp_path: Path):
    rows = [{"prompt": "hello"}, {"prompt": "hello"}, "{broken", {"prompt": "x" * 999}, {"prompt": ""}, {"prompt": "bye"}]
    found, report = load(lines(tmp_path / "rows.jsonl", rows))
    assert [text_of(prompt.messages[0]) for prompt in found] == ["hello", "bye"]
    assert report.counts == {"bad_json": 1, "too_long": 1, "empty_prompt": 1}


def test_pictures_come_along_and_broken_ones_are_reported(tmp_path: Path):
    noise(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    rows = [{"image": name, "prompt": "what is it?"} for name in ("a.png", "b.png")]
    found, report = load(lines(tmp_path / "rows.jsonl", rows))
    assert len(found) == 1 and images_of(found[0].messages) == [str(tmp_path / "a.png")]
    assert sum(report.counts.values()) == 1


def test_a_model_without_eyes_gets_no_pictures(tmp_path: Path):
    noise(0).save(tmp_path / "a.png")
    found, report = load(lines(tmp_path / "rows.jsonl", [{"image": "a.png", "prompt": "what is it?"}]), vision=False)
    assert not found and report.counts == {"no_vision": 1}


def _key(prompt: Prompt) -> str:
    return prompt_key(prompt.messages)


def test_the_held_out_prompts_are_others():
    prompts = [Prompt([user(str(n))], str(n)) for n in range(20)]
    train, held = split_by_prompt(prompts, 0.2, 0, _key)
    assert len(held) == 4 and {p.where for p in train} | {p.where for p in held} == {p.where for p in prompts}
    assert split_by_prompt(prompts[:1], 0.2, 0, _key) == (prompts[:1], [])


@pytest.mark.parametrize(("count", "size", "world"), [(10, 4, 1), (3, 8, 1), (10, 2, 2)])
def test_every_prompt_comes_once_before_any_comes_twice(count: int, size: int, world: int):
    prompts = [Prompt([user(str(n))], str(n)) for n in range(count)]
    loaders = [PromptLoader(prompts, 12, size, seed=1, rank=rank, world=world) for rank in range(world)]
    order = [prompt.where for iteration in range(12) for loader in loaders for prompt in loader.batch(iteration)]
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count], key=int) == [str(n) for n in range(count)]
    assert order[:count] != order[count : 2 * count]


def test_a_loader_goes_on_where_it_was():
    prompts = [Prompt([user(str(n))], str(n)) for n in range(7)]
    whole = [[p.where for p in batch] for batch in PromptLoader(prompts, 6, 3, seed=0)]
    first = PromptLoader(prompts, 6, 3, seed=0)
    stream = iter(first)
    seen = [[p.where for p in next(stream)] for _ in range(2)]
    second = PromptLoader(prompts, 6, 3, seed=0)
    second.load_state_dict(first.state_dict())
    assert seen + [[p.where for p in batch] for batch in second] == whole


# Plain text


def text(source: str, length: int = 8, **settings: Any) -> tuple[list[Any], RejectionReport]:
    report = RejectionReport(None)
    model = tiny_model()
    tokenizer = Tokenizer.bytes()
    items, _ = load_text([SourceConfig(path=source, **settings)], tokenizer, model.encode, length=length, report=report, seed=0)
    return items, report


def test_documents_are_cut_where_they_are_full_and_end_with_the_end_token(tmp_path: Path):
    (tmp_path / "a.txt").write_text("0123456789")
    items, _ = text(str(tmp_path / "a.txt"))
    tokenizer = Tokenizer.bytes()
    assert [item.encoded.ids for item in items] == [tokenizer.encode("01234567"), [*tokenizer.encode("89"), tokenizer.eos_id]]
    assert all(all(item.encoded.supervised) for item in items)


def test_text_comes_from_files_folders_and_json_lines(tmp_path: Path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("one")
    (tmp_path / "books" / "b.md").write_text("two")
    rows = lines(tmp_path / "c.jsonl", [{"text": "three"}, {"text": ""}, {"title": "x"}, "{"])
    assert [item.sample.where for item in text(str(tmp_path / "books"))[0]] == [
        f"{tmp_path}/books/a.txt, token 0",
        f"{tmp_path}/books/b.md, token 0",
    ]
    items, report = text(rows)
    assert [item.sample.where for item in items] == [f"{rows}:1, token 0"]
    assert report.counts == {"empty_text": 1, "no_text": 1, "bad_json": 1}


def test_bytes_that_are_no_text_are_reported(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    items, report = text(str(tmp_path / "a.txt"))
    assert not items and report.counts == {"not_utf8": 1}


def test_conversations_are_text_too(tmp_path: Path):
    rows = lines(tmp_path / "rows.jsonl", [FORMS["conversation"]])
    assert not holds_text(SourceConfig(path=rows))
    items, _ = text(rows, length=500)
    assert (
        items[0].encoded.ids
        == tiny_model().encode([user("hello"), {"role": "assistant", "content": [{"type": "text", "text": "hi"}]}]).ids
    )


def test_a_file_that_does_not_exist_is_a_usage_error(tmp_path: Path):
    with pytest.raises(UsageError, match="no such file"):
        text(str(tmp_path / "nothing.txt"))
