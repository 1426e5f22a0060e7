"""The labellers' tool: rankings as they are typed, a real session, labels that training reads, agreement in closed form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nano_runs import REPOSITORY
from tiny_models import noise, tiny_model

from mmgpt.config import SourceConfig
from mmgpt.data.preferences import load_preferences
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import read_source
from mmgpt.label import Agreement, compare, format_ranking, parse_ranking

ROWS = [
    {"prompt": "name a fruit", "answers": ["apple", "stone", "plum"]},
    {"prompt": "say hello", "answers": ["hi", "no"]},
    {"prompt": "count to three"},
]


def session(typed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "mmgpt.label", *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def shown_order(output: str, number: int) -> list[str]:
    """The answers in the order in which they were shown for a prompt, by the panels' numbers."""
    part = output.split(f"{number} of ")[1].split(f"{number + 1} of ")[0]
    lines = [line.strip("│ ").strip() for line in part.splitlines() if line.startswith("│")]
    return [line for line in lines if line]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9))
def test_a_ranking_is_read_as_it_is_written(ranks: list[int]):
    dense = [sorted(set(ranks)).index(rank) + 1 for rank in ranks]
    assert parse_ranking(format_ranking(dense), len(dense)) == dense


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "a number is missing"),
        ("2 > x", "'x' is no number of an answer"),
        ("2 > > 1", "a number is missing"),
        ("1 > 2 > 4", "there is no answer 4"),
        ("1 = 1 > 2 > 3", "answer 1 stands there twice"),
        ("1 > 3", "answer 2 is missing"),
        ("0 > 1 > 2", "there is no answer 0"),
    ],
)
def test_what_is_no_ranking_says_why(typed: str, said: str):
    with pytest.raises(ValueError, match=said):
        parse_ranking(typed, 3)


def test_a_session_leaves_labels_that_training_reads(prompts: str, tmp_path: Path):
    output = tmp_path / "labels" / "anna.jsonl"
    typed = "3 > 9\n2 > 1 = 3\ns\nd one two three\n"
    done = session(typed, "--prompts", prompts, "--output", str(output), "--labeller", "anna")
    assert done.returncode == 0, done.stderr
    assert "not understood: there is no answer 9" in done.stderr and "2 judged, 2 of 3 in all" in done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    best = shown_order(done.stdout, 1)[1]
    ranks = dict(zip(rows[0]["answers"], rows[0]["ranks"]))
    assert ranks == {answer: 1 if answer == best else 2 for answer in ROWS[0]["answers"]}
    assert [ROWS[0]["answers"][place - 1] for place in rows[0]["order"]] == shown_order(done.stdout, 1)
    # As a reward model reads them, and as a supervised stage does.
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text(output.read_text().splitlines()[0] + "\n")
    items, _ = load_preferences(
        [SourceConfig(path=str(ranked))], tiny_model(vision=False).encode, max_length=400, report=RejectionReport(None)
    )
    assert len(items) == 1 and len(items[0].preference.pairs) == 2 and items[0].preference.compared == 3
    shown = tmp_path / "shown.jsonl"
    shown.write_text(output.read_text().splitlines()[1] + "\n")
    (sample,) = read_source(SourceConfig(path=str(shown)))
    assert [part["text"] for message in sample.messages for part in message["content"]] == ["count to three", "one two three"]


def test_a_session_goes_on_where_it_was(prompts: str, tmp_path: Path):
    arguments = ["--prompts", prompts, "--output", str(tmp_path / "a.jsonl")]
    first = session("1 > 2 > 3\n", *arguments, "--labeller", "anna")
    assert first.returncode == 0 and "1 judged, 1 of 3" in first.stderr  # the input ended: nothing is lost
    second = session("q\n", *arguments, "--labeller", "anna")
    assert "name a fruit" not in second.stdout and "say hello" in second.stdout
    other = session("q\n", *arguments, "--labeller", "ben")
    assert "name a fruit" in other.stdout


def test_the_order_is_random_and_another_for_each_labeller(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    answers = [f"answer {letter}" for letter in "abcdefgh"]
    path.write_text(json.dumps({"prompt": "which?", "answers": answers}) + "\n")
    orders = []
    for name in ("anna", "ben", "anna"):
        done = session("q\n", "--prompts", str(path), "--output", str(tmp_path / "x.jsonl"), "--labeller", name)
        orders.append(shown_order(done.stdout, 1))
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == answers


def test_a_model_draws_the_answers(tmp_path: Path):
    tiny_model().save_pretrained(tmp_path / "model")
    noise(0).save(tmp_path / "a.png")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "what is it?", "image": "a.png"}) + "\n")
    arguments = ["--prompts", str(path), "--output", str(tmp_path / "out.jsonl"), "--model", str(tmp_path / "model")]
    done = session("1 > 2 > 3\n", *arguments, "--samples", "3", "--max_new_tokens", "6")
    assert done.returncode == 0, done.stderr
    assert f"picture: {tmp_path / 'a.png'}" in done.stdout
    (row,) = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert len(row["answers"]) == 3 and sorted(row["ranks"]) == [1, 2, 3]
    items, _ = load_preferences(
        [SourceConfig(path=str(tmp_path / "out.jsonl"))], tiny_model().encode, max_length=400, report=RejectionReport(None)
    )
    assert len(items[0].images) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "give --prompts SOURCE and --output FILE"),
        (["--prompts", "nothing.jsonl", "--output", "x.jsonl"], 2, "nothing.jsonl"),
        (["--agreement", "a.jsonl", "b.jsonl"], 2, "no such file: a.jsonl"),
        (["--prompts", "letters", "--output", "other.jsonl"], 1, "other.jsonl:1 is no label of this tool"),
    ],
)
def test_wrong_usage_says_so(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    from mmgpt.errors import run_cli
    from mmgpt.label import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    assert run_cli(lambda: main(arguments)) == code
    assert said in capsys.readouterr().err


def test_agreement_in_closed_form(tmp_path: Path):
    def write(name: str, *rankings: tuple[str, list[int]]) -> Path:
        path = tmp_path / name
        rows = [{"key": key, "answers": ["x", "y", "z"], "ranks": ranks} for key, ranks in rankings]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    one = write("a.jsonl", ("p", [1, 2, 3]), ("q", [1, 1, 2]), ("only one", [1, 2, 3]))
    other = write("b.jsonl", ("p", [1, 3, 2]), ("q", [2, 2, 3]))
    found = compare(one, other)
    # p: x > y and x > z alike, y and z the other way round; q: all three alike, one of them a tie.
    assert found == Agreement(2, [[4, 0, 1], [0, 1, 0], [0, 0, 0]])
    assert found.share == pytest.approx(5 / 6)
    chance = 5 / 6 * 4 / 6 + 1 / 6 * 1 / 6
    assert found.kappa == pytest.approx((5 / 6 - chance) / (1 - chance))
    assert "2 prompts that both ranked, 6 pairs of answers: 83.3% judged alike" in str(found)
    assert compare(one, one).share == 1
