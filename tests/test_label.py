"""The labeller's tool: its grammar, real processes fed through a pipe, and what the stages' readers make of its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_runs import REPOSITORY
from tiny_models import noise, tiny_model

from mmgpt.config import SourceConfig
from mmgpt.data.labels import Labels, RankingError, Task, format_ranking, parse_ranking, read_tasks
from mmgpt.data.messages import Sample, text_of
from mmgpt.data.preferences import load_preferences, read_preferences
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import read_source
from mmgpt.data.template import Encoded
from mmgpt.errors import UsageError
from mmgpt.label import parse_arguments, visible

ANSWERS = ["a pear", "an apple", "a plum", "no fruit"]


# The grammar


@st.composite
def rankings(draw: st.DrawFn) -> list[int]:
    """Ranks without a gap, as a parsed ranking has them."""
    values = draw(st.lists(st.integers(1, 12), min_size=1, max_size=12))
    levels = sorted(set(values))
    return [levels.index(value) + 1 for value in values]


@given(rankings())
def test_a_ranking_is_read_as_it_is_written(ranks: list[int]):
    assert parse_ranking(format_ranking(ranks), len(ranks)) == ranks


@given(st.text(), st.integers(1, 4))
def test_any_text_is_a_ranking_or_an_error_that_says_why(text: str, count: int):
    try:
        ranks = parse_ranking(text, count)
    except RankingError as error:
        assert str(error)
    else:
        assert len(ranks) == count and set(ranks) == set(range(1, max(ranks) + 1))


def test_spaces_do_not_matter_and_the_order_within_a_tie_neither():
    assert parse_ranking("2>1=3 >4", 4) == parse_ranking(" 2 > 3 = 1 > 4 ", 4) == [2, 1, 2, 3]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "nothing"), ("1 > 2", "answer 3 is missing"), ("1 > 2 > 2", "answer 2 stands there twice"),
        ("1 > 4 > 2", "no answer 4"),
        ("1 2 3", "after 1 comes > or =, not 2"), ("1 > > 2", "> stands where"), ("1 > 2 >", "after the last >"),
        ("1 > two > 3", "t stands where"), ("1 < 2", "not <"), ("0 > 1 > 2", "no answer 0"), ("9" * 5000, "no answer 9"),
        ("¹ > 2 > 3", "¹ stands where"), ("٣ > 1 > 2", "stands where"),
    ],
)  # fmt: skip
def test_a_wrong_ranking_is_told_what_is_wrong(text: str, words: str):
    with pytest.raises(RankingError, match=words):
        parse_ranking(text, 3)


# Processes


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def command(*arguments: str | Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    return {"args": [sys.executable, "-m", "mmgpt.label", *map(str, arguments)], "env": environment}


def label(folder: Path, typed: str | bytes, *more: str | Path, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    given = typed.encode() if isinstance(typed, str) else typed
    done = subprocess.run(**command("--labeller", "ann", *more), cwd=folder, input=given, capture_output=True, check=False)
    assert done.returncode == code, (done.stdout.decode(), done.stderr.decode())
    assert b"Traceback" not in done.stderr
    return done


def encode(messages: Any) -> Encoded:
    """One token a character; the answer is what is learnt."""
    texts = [text_of(message) for message in messages]
    learnt = [message["role"] == "assistant" for message, text in zip(messages, texts) for _ in text]
    return Encoded([ord(char) for char in "".join(texts)], learnt, [])


def test_a_labelled_file_is_what_the_stages_read(tmp_path: Path):
    """Ranking, demonstration, skipping, all ties and mistakes, with a picture, judged from another folder than the pictures'."""
    (tmp_path / "data").mkdir()
    noise(1).save(tmp_path / "data" / "1.png")
    rows = [
        {"prompt": "What is it?", "image": "1.png", "answers": ANSWERS},
        {"messages": [{"role": "user", "content": "Say x."}], "answers": ["x", "y"]},
        {"prompt": "Skipped", "answers": ["x", "y"]},
        {"prompt": "Tied", "answers": ["x", "y"]},
    ]
    prompts = write(tmp_path / "data" / "prompts.jsonl", rows)
    typed = "5 > 1\n2 > 1 = 3 > 4\nd\nX,\n\nx!\n.\ns\n1 = 2\n"
    done = label(tmp_path, typed, "--prompts", prompts, "--out", "judged.jsonl")
    shown = done.stdout.decode()
    assert "no answer 5" in shown and "1.png" in shown and "2 ranked, 1 demonstrated, 1 skipped" in shown

    [record] = lines(tmp_path / "judged.jsonl")
    assert record["answers"] == ANSWERS and sorted(record["order"]) == [0, 1, 2, 3] and record["labeller"] == "ann"
    places = [shown.index(f"{number}. {ANSWERS[answer]}") for number, answer in enumerate(record["order"], 1)]
    assert places == sorted(places), "the order that was recorded is the one that was shown"
    assert [record["ranks"][answer] for answer in record["order"]] == [2, 1, 2, 3]
    assert not Path(record["prompt"][0]["content"][0]["image"]).is_absolute()

    report = RejectionReport(None)
    items, total = load_preferences([SourceConfig(path=str(tmp_path / "judged.jsonl"))], encode, max_length=100, report=report)
    assert total == 1 and not len(report)
    [preference] = [item.preference for item in items]
    best, others, worst = record["order"][1], {record["order"][0], record["order"][2]}, record["order"][3]
    wanted = {(best, other) for other in others} | {(other, worst) for other in others} | {(best, worst)}
    assert set(preference.pairs) == wanted and preference.compared == 6 and preference.answers == ANSWERS
    picture = preference.prompt[0]["content"][0]
    assert picture["type"] == "image" and Path(picture["image"]).resolve() == (tmp_path / "data" / "1.png").resolve()

    [sample] = list(read_source(SourceConfig(path=str(tmp_path / "judged.demonstrations.jsonl"))))
    assert isinstance(sample, Sample) and [text_of(message) for message in sample.messages] == ["Say x.", "X,\n\nx!"]
    assert [tie["ranks"] for tie in lines(tmp_path / "judged.ties.jsonl")] == [[1, 1]]


def test_what_was_judged_does_not_come_again(tmp_path: Path):
    """Neither after q nor at the end of the input; what was skipped does, and another labeller starts anew."""
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"question {n}", "answers": ["x", "y"]} for n in range(4)])
    label(tmp_path, "1 > 2\ns\nd mine\nq\n", "--prompts", prompts)
    before = (tmp_path / "labels-ann.jsonl").read_bytes()
    done = label(tmp_path, "2 > 1\n", "--prompts", prompts).stdout.decode()
    assert "4 prompts, 2 of them judged by ann" in done and "1 of 2" in done
    assert "question 0" not in done and "question 1" in done and "question 2" not in done
    after = lines(tmp_path / "labels-ann.jsonl")
    assert (tmp_path / "labels-ann.jsonl").read_bytes().startswith(before) and len(after) == 2
    assert "0 of them judged by bob" in label(tmp_path, "", "--prompts", prompts, "--labeller", "bob").stdout.decode()
    label(tmp_path, "1 > 2\n", "--prompts", prompts)
    assert "4 of them judged by ann" in label(tmp_path, "", "--prompts", prompts).stdout.decode()
    assert len(lines(tmp_path / "labels-ann.jsonl")) == 3


def test_a_line_that_a_crash_cut_off_spoils_no_other(tmp_path: Path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"question {n}", "answers": ["x", "y"]} for n in range(2)])
    label(tmp_path, "1 > 2\n", "--prompts", prompts)
    file = tmp_path / "labels-ann.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    done = label(tmp_path, "1 > 2\n2 > 1\n", "--prompts", prompts)
    assert "labels-ann.jsonl:1" in done.stderr.decode()
    found = list(read_preferences(SourceConfig(path=str(file))))
    assert [type(item).__name__ for item in found] == ["Rejected", "Preference", "Preference"]


def test_interrupted_it_keeps_what_was_judged(tmp_path: Path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"question {n}", "answers": ["x", "y"]} for n in range(2)])
    process = subprocess.Popen(
        **command("--labeller", "ann", "--prompts", prompts), cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"1 > 2\n")
    process.stdin.flush()
    file, deadline = tmp_path / "labels-ann.jsonl", time.monotonic() + 120
    while not (file.is_file() and file.read_bytes().endswith(b"\n")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and b"Traceback" not in told
    assert len(lines(file)) == 1


def test_answers_drawn_from_a_model(tmp_path: Path):
    """The same for the same seed whatever was asked before; two people see them in orders of their own."""
    tiny_model(vision=False).save_pretrained(tmp_path / "model")
    prompts = write(tmp_path / "p.jsonl", [{"prompt": f"question {n}"} for n in range(3)])
    more = ["--prompts", prompts, "--model", "model", "--samples", "3", "--max_new_tokens", "6", "--device", "cpu"]
    label(tmp_path, "1 > 2 > 3\n" * 3, *more, "--out", "all.jsonl")
    label(tmp_path, "s\n1 > 2 > 3\n", *more, "--out", "second.jsonl", "--labeller", "bob")
    whole, [second] = {record["id"]: record for record in lines(tmp_path / "all.jsonl")}, lines(tmp_path / "second.jsonl")
    assert len(whole) == 3 and whole[second["id"]]["answers"] == second["answers"] and len(set(second["answers"])) == 3
    assert second["model"] == "model" and second["seed"] == 0
    assert len({json.dumps(record["answers"]) for record in whole.values()}) == 3


def test_mistakes_are_told_without_a_traceback(tmp_path: Path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "question"}, {"prompt": ""}])
    assert "--model" in label(tmp_path, "", "--prompts", prompts, code=2).stderr.decode()
    assert "p.jsonl:2: left out" in label(tmp_path, "", "--prompts", prompts, code=2).stderr.decode()
    assert "nowhere" in label(tmp_path, "", "--prompts", "nowhere.jsonl", code=2).stderr.decode()
    answered = write(tmp_path / "q.jsonl", [{"prompt": "question", "answers": ["x", "y"]}])
    done = label(tmp_path, b"d \xff\n1 > 2\n", "--prompts", answered)
    assert b"not UTF-8" in done.stdout and len(lines(tmp_path / "labels-ann.jsonl")) == 1


# Parts


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["--prompts", "x"], ["--labeller", "a"], ["--labeller", "../a", "--prompts", "x"],
        ["--labeller", "a", "--prompts", "x", "--out", "x.txt"], ["--labeller", "a", "--prompts", "x", "--samples", "1"],
    ],
)  # fmt: skip
def test_wrong_usage(arguments: list[str]):
    with pytest.raises(UsageError):
        parse_arguments(arguments)


def test_an_answer_cannot_command_the_terminal():
    assert visible("a\x1b[2J\r\u202eb\n\tc") == "a\\x1b[2J\\r\\u202eb\n\tc"


def test_every_form_of_answers_becomes_a_task(tmp_path: Path):
    rows = [
        {"prompt": "q", "chosen": "x", "rejected": "y"},
        {"instruction": "r", "output_1": "x", "output_2": "y", "preference": 1},
        {"prompt": "s", "completions": ["x", " x ", "", "y"]},
        {"messages": [{"role": "user", "content": "t"}, {"role": "assistant", "content": "x"}]},
        {"prompt": "q", "answers": ["y", "x"]},
    ]
    found = list(read_tasks(SourceConfig(path=str(write(tmp_path / "p.jsonl", rows)))))
    tasks = [task for task in found if isinstance(task, Task)]
    assert [(text_of(task.messages[-1]), task.answers) for task in tasks] == [
        ("q", ["x", "y"]), ("r", ["x", "y"]), ("s", ["x", "y"]), ("t", []),
    ]  # fmt: skip
    assert len(list(read_tasks(SourceConfig(path=str(tmp_path / "p.jsonl"), limit=2)))) == 2


def test_made_up_pictures_are_put_beside_the_rankings(tmp_path: Path):
    [task] = [task for task in read_tasks(SourceConfig(path="shapes", split="val", limit=1)) if isinstance(task, Task)]
    labels = Labels(tmp_path / "judged.jsonl", "ann")
    labels.rank(task, ["x", "y"], [1, 0], [1, 2], {})
    labels.demonstrate(task, "a square")
    [preference] = list(read_preferences(SourceConfig(path=str(tmp_path / "judged.jsonl"))))
    assert preference.pairs == [(1, 0)]  # type: ignore[union-attr]
    [again] = [t for t in read_tasks(SourceConfig(path=str(tmp_path / "judged.jsonl"))) if isinstance(t, Task)]
    assert [text_of(message) for message in again.messages] == [text_of(message) for message in task.messages]
    assert len(list((tmp_path / "judged.images").iterdir())) == 1
