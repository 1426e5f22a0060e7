"""Answers to many prompts: files that the stages read, the same ones however the work was cut."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nano_runs import REPOSITORY
from tiny_models import noise, tiny_model

import mmgpt
from mmgpt.answer import main, parse_arguments
from mmgpt.config import SourceConfig
from mmgpt.data.labels import Task, read_tasks
from mmgpt.data.messages import Sample, text_of, user
from mmgpt.data.sources import read_source
from mmgpt.errors import UsageError
from mmgpt.generate import Sampling

QUESTIONS = ["a", "a much longer question than the first", "third", "and one more", "fifth"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and prompts with and without pictures."""
    folder = tmp_path_factory.mktemp("answers")
    tiny_model().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    pictures = []
    for seed in range(3):
        buffer = io.BytesIO()
        noise(seed).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    pq.write_table(pa.table({"image": pictures, "caption": ["x", "y", "z"]}), folder / "photos.parquet")
    return folder


def answer(folder: Path, out: str, *more: str, prompts: str = "prompts.jsonl") -> list[dict[str, Any]]:
    path = folder / out
    settings = ["--model", str(folder), "--prompts", str(folder / prompts), "--out", str(path), "--max_new_tokens", "6"]
    assert main([*settings, *more]) == 0
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_answer_each_is_a_conversation_to_learn_from(folder):
    rows = answer(folder, "greedy.jsonl", "--batch_size", "2")
    model = mmgpt.load(folder)
    expected = model.generate([[user(question)] for question in QUESTIONS], sampling=Sampling(max_new_tokens=6))
    assert [row["messages"][1]["content"][0]["text"] for row in rows] == [one.text.strip() for one in expected]
    read = list(read_source(SourceConfig(path=str(folder / "greedy.jsonl"))))
    assert [text_of(sample.messages[0]) for sample in read if isinstance(sample, Sample)] == QUESTIONS


def test_several_are_to_be_ranked(folder):
    rows = answer(folder, "drawn.jsonl", "--samples", "3", "--temperature", "1.5")
    assert all(len(row["answers"]) == 3 for row in rows) and len({text for row in rows for text in row["answers"]}) > 5
    tasks = [task for task in read_tasks(SourceConfig(path=str(folder / "drawn.jsonl"))) if isinstance(task, Task)]
    assert [text_of(task.messages[0]) for task in tasks] == QUESTIONS and any(len(task.answers) == 3 for task in tasks)


def test_pictures_of_a_table_lie_beside_the_answers(folder):
    rows = answer(folder, "seen.jsonl", "--question", "What is it?", prompts="photos.parquet")
    assert len(rows) == 3
    for row, sample in zip(rows, read_source(SourceConfig(path=str(folder / "seen.jsonl")))):
        picture, question = row["messages"][0]["content"]
        assert question["text"] == "What is it?" and (folder / picture["image"]).is_file()
        assert isinstance(sample, Sample) and len(sample.images) == 1


@pytest.mark.parametrize("more", [(), ("--samples", "2", "--temperature", "1")])
def test_stopped_anywhere_it_ends_with_the_same_file(folder, more):
    whole = folder / f"whole{len(more)}.jsonl"
    answer(folder, whole.name, "--batch_size", "2", *more)
    content = whole.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for cut in (0, ends[0], ends[1], ends[2] + 9, ends[3], len(content)):
        part = folder / "part.jsonl"
        part.write_bytes(content[:cut])
        answer(folder, part.name, "--batch_size", "2", *more)
        assert part.read_bytes() == content


def test_answers_to_other_prompts_are_not_overwritten(folder):
    other = folder / "other.jsonl"
    other.write_text('{"id": "x", "messages": []}\n')
    with pytest.raises(UsageError, match="holds answers to other prompts"):
        answer(folder, other.name)
    assert other.read_text() == '{"id": "x", "messages": []}\n'


@pytest.mark.parametrize(
    "more, message",
    [
        (["--samples", "2"], "needs a --temperature above 0"),
        (["--out", "x.txt"], "must end in .jsonl"),
        (["--limit", "0"], "not a whole number"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_wrong_usage(more, message):
    with pytest.raises(UsageError, match=message):
        parse_arguments(["--model", "m", "--prompts", "p", "--out", "o.jsonl", *more])


def test_as_a_command(folder):
    command = [sys.executable, "-m", "mmgpt.answer", "--model", str(folder), "--prompts", str(folder / "prompts.jsonl")]
    done = subprocess.run([*command, "--out", str(folder / "none" / "x.jsonl")], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no folder" in done.stderr and "Traceback" not in done.stderr
