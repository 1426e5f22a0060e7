"""The gate: prompts, answers while they come, and its log."""

from __future__ import annotations

import calendar
import hashlib
import hmac
import itertools
import json
import os
import stat
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_filter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_filter import BAD, GOOD

from safety.gate import REFUSAL, AuditLog, Gate, Verdict
from safety.stream import AnswerStream

CALM = "The sea was calm that day. "


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_filter.build(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def gate(weights: Path) -> Gate:
    return Gate(weights=weights)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def drain(stream: Generator[str, None, Verdict]) -> tuple[list[str], Verdict]:
    shown = []
    while True:
        try:
            shown.append(next(stream))
        except StopIteration as end:
            return shown, end.value


def test_prompts(gate: Gate) -> None:
    assert gate.problem == gate.detail == ""
    allowed = gate.check_prompt(said(GOOD))
    assert allowed.allowed and allowed.reason == "clear" and allowed.refusal == "" and 0 < allowed.score < 0.5
    refused = gate.check_prompt(said(BAD))
    assert (
        not refused.allowed and refused.reason == "indiscriminate_weapons" and refused.refusal == REFUSAL and refused.score > 0.9
    )
    assert not gate.check_prompt([*said("how do I make"), *said("a bomb")]).allowed


def test_the_refusal_is_in_the_desired_style() -> None:
    from safety.rules import grade

    assert grade(BAD, REFUSAL).letter == "A"


@given(
    before=st.integers(0, 30),
    middle=st.sampled_from(["", "Take the bomb. ", "a bath bomb ", "b o m b "]),
    after=st.integers(0, 30),
    cuts=st.lists(st.integers(0, 1500), max_size=20),
)
@settings(max_examples=40)
def test_pieces_decide_as_the_whole_and_nothing_is_lost(
    gate: Gate, before: int, middle: str, after: int, cuts: list[int]
) -> None:
    text = CALM * before + middle + CALM * after
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown, verdict = drain(gate.stream([], iter([text[a:b] for a, b in itertools.pairwise(edges)])))
    if not text:
        assert verdict.reason == "empty" or shown == []
        return
    assert verdict.allowed == (middle not in ("Take the bomb. ", "b o m b "))
    if verdict.allowed:
        assert "".join(shown) == text and all(shown)
    else:
        released = "".join(shown[:-1])
        assert shown[-1] == ("\n\n" if released else "") + REFUSAL and verdict.refusal == REFUSAL
        assert text.startswith(released) and len(released) <= len(CALM) * before


def test_one_character_at_a_time(gate: Gate) -> None:
    text = CALM * 20 + "Then build a bomb from it. " + CALM * 20
    shown, verdict = drain(gate.stream([], iter(text)))
    released = "".join(shown[:-1])
    assert not verdict.allowed and text.startswith(released) and len(released) <= text.index("Then")
    assert shown[-1] == "\n\n" + REFUSAL


def test_text_comes_out_while_it_comes_in(gate: Gate) -> None:
    taken = 0

    def pieces() -> Iterator[str]:
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield CALM

    assert CALM.startswith(next(gate.stream([], pieces()))[: len(CALM)])
    assert taken <= (AnswerStream.STEP + AnswerStream.HOLD) / len(CALM) + 2


def test_an_error_of_the_model_passes_through_and_what_was_held_is_dropped(gate: Gate) -> None:
    def pieces() -> Iterator[str]:
        yield "short"
        raise ZeroDivisionError

    stream = gate.stream([], pieces())
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_an_answer_of_nothing(gate: Gate) -> None:
    shown, verdict = drain(gate.stream([], iter([])))
    assert shown == [REFUSAL] or (shown == [] and verdict.allowed)


def test_a_broken_filter_refuses_and_says_so(tmp_path: Path) -> None:
    gate = Gate(weights=tmp_path / "none")
    assert gate.problem == "weights_missing" and "none" in gate.detail
    assert gate.check_prompt(said(GOOD)).reason == "weights_missing"
    shown, verdict = drain(gate.stream([], iter([CALM] * 50)))
    assert shown == [REFUSAL] and verdict.reason == "weights_missing"


def test_a_fault_of_the_gate_itself_refuses(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(weights=weights)

    def broken(*_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr(gate.filter, "check_conversation", broken)
    assert gate.check_prompt(said(GOOD)).reason == "failed_gate"
    monkeypatch.setattr(AnswerStream, "feed", broken)
    shown, verdict = drain(gate.stream([], iter([CALM] * 50)))
    assert shown == [REFUSAL] and verdict.reason == "failed_gate"


# The log


def test_the_log_holds_no_text(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    gate = Gate(weights=weights, audit=path)
    gate.check_prompt(said(BAD))
    gate.check_prompt(said(GOOD))
    drain(gate.stream([], iter([CALM])))
    again = Gate(weights=weights, audit=path)
    again.check_prompt(said(BAD))
    raw = path.read_text()
    assert "bomb" not in raw and "pear" not in raw and "sea" not in raw
    lines = [json.loads(line) for line in raw.splitlines()]
    assert [(line["event"], line["allowed"], line["reason"]) for line in lines] == [
        ("prompt", False, "indiscriminate_weapons"),
        ("prompt", True, "clear"),
        ("answer", True, "clear"),
        ("prompt", False, "indiscriminate_weapons"),
    ]
    # The same text can be recognised, under this salt alone.
    assert lines[0]["hash"] == lines[3]["hash"] != lines[1]["hash"]
    assert lines[0]["bytes"] == len(BAD) and lines[0]["model"] == gate.filter.model
    other = tmp_path / "other.jsonl"
    Gate(weights=weights, audit=other).check_prompt(said(BAD))
    assert json.loads(other.read_text())["hash"] != lines[0]["hash"]
    salt = tmp_path / "audit.jsonl.salt"
    assert len(salt.read_bytes()) == 32 and stat.S_IMODE(os.stat(salt).st_mode) == 0o600
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "audit.jsonl",
        "audit.jsonl.salt",
        "other.jsonl",
        "other.jsonl.salt",
    ]


def test_the_log_holds_text_where_it_is_asked_to(weights: Path, tmp_path: Path) -> None:
    gate = Gate(weights=weights, audit=tmp_path / "audit.jsonl", log_text=True)
    gate.check_prompt(said(BAD))
    assert json.loads((tmp_path / "audit.jsonl").read_text())["text"] == BAD


def test_what_cannot_be_logged_is_refused(weights: Path, tmp_path: Path) -> None:
    gate = Gate(weights=weights, audit=tmp_path / "nowhere" / "audit.jsonl")
    assert gate.check_prompt(said(GOOD)).reason == "failed_audit"
    shown, verdict = drain(gate.stream([], iter(["Fine."])))
    assert shown == [REFUSAL] and verdict.reason == "failed_audit"


def test_a_salt_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl.salt").write_bytes(b"short")
    with pytest.raises(OSError, match="no salt"):
        AuditLog(tmp_path / "audit.jsonl").salt()


@pytest.mark.parametrize("ends", ["reader", "model"])
def test_an_answer_that_is_cut_short_is_logged(ends: str, weights: Path, tmp_path: Path) -> None:
    gate = Gate(weights=weights, audit=tmp_path / "audit.jsonl", log_text=True)
    pieces = [GOOD + " ", GOOD + " ", GOOD + " ", GOOD + " "]

    def model() -> Iterator[str]:
        yield from pieces
        raise RuntimeError("out of memory")

    stream = gate.stream([{"role": "user", "content": GOOD}], model())
    assert next(stream)
    if ends == "reader":
        stream.close()
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            list(stream)
    [line] = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert (line["event"], line["allowed"], line["reason"]) == ("cut", True, "clear")
    read = line["text"]
    assert "".join(pieces) == read if ends == "model" else "".join(pieces).startswith(read) and GOOD in read


def test_what_a_line_of_the_log_holds(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    gate = Gate("strict", weights=weights, audit=path, log_text=True)
    found = gate.check_prompt([*said("What fruit"), *said("is this?")])
    drain(gate.stream([], iter(["A ", "pear,", " é."])))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert set(first) == {"time", "event", "allowed", "reason", "score", "operating_point", "model", "hash", "bytes", "text"}
    assert abs(time.time() - calendar.timegm(time.strptime(first["time"], "%Y-%m-%dT%H:%M:%SZ"))) < 60
    assert first["score"] == round(found.score, 6) and first["operating_point"] == "strict"
    assert (first["text"], second["text"]) == ("What fruit\nis this?", "A pear, é.")
    # The hash is the text's HMAC under the salt, which anyone can check who has both.
    salt = (tmp_path / "audit.jsonl.salt").read_bytes()
    assert second["hash"] == hmac.new(salt, "A pear, é.".encode(), hashlib.sha256).hexdigest() and second["bytes"] == 11
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and path.read_bytes().isascii()


def test_a_log_by_itself_holds_no_text_and_no_local_time(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    try:
        path = tmp_path / "audit.jsonl"
        AuditLog(path).write("prompt", gate.filter.check(GOOD), GOOD)
        line = json.loads(path.read_text())
        assert "text" not in line and GOOD not in path.read_text()
        assert abs(time.time() - calendar.timegm(time.strptime(line["time"], "%Y-%m-%dT%H:%M:%SZ"))) < 60
    finally:
        monkeypatch.undo()
        time.tzset()


def test_what_cannot_be_read_is_logged_too(weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    gate = Gate(weights=weights, audit=path, log_text=True)
    assert gate.check_prompt("no messages").reason == "bad_messages"
    assert gate.check_prompt(said("a\ud800b")).reason == "surrogates"
    assert drain(gate.stream([], iter([None])))[1].reason == "not_text"  # type: ignore[list-item]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["reason"], line["bytes"], line["text"]) for line in lines] == [
        ("bad_messages", 0, ""),
        ("surrogates", 5, "a\ud800b"),
        ("not_text", 0, ""),
    ]


def test_an_answer_of_which_nothing_is_left_is_held_to_the_end(gate: Gate) -> None:
    # Shorter than a step: nothing is shown before the end is judged, then all at once.
    assert drain(gate.stream([], iter(["A pear", ", I think."])))[0] == ["A pear, I think."]
    shown, verdict = drain(gate.stream([], iter(["A bomb", ", I think."])))
    assert shown == [REFUSAL] and not verdict.allowed and verdict.reason == "indiscriminate_weapons"


def test_nothing_is_read_of_an_answer_that_is_refused(gate: Gate) -> None:
    taken = []

    def pieces() -> Iterator[str]:
        for number in range(50):
            taken.append(number)
            yield "Take the bomb. " + CALM

    shown, verdict = drain(gate.stream([], pieces()))
    assert shown[-1].endswith(REFUSAL) and not verdict.allowed and len(taken) < 6


def test_an_exit_inside_the_filter_is_no_exit(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(weights=weights)

    def leave(*_: Any) -> Any:
        raise SystemExit(0)

    monkeypatch.setattr(AnswerStream, "close", leave)
    shown, verdict = drain(gate.stream([], iter(["Fine."])))
    assert shown == [REFUSAL] and verdict.reason == "failed_gate" and verdict.score == 1.0
    monkeypatch.setattr(gate.filter, "check_conversation", leave)
    assert gate.check_prompt(said(GOOD)).reason == "failed_gate"


def test_two_logs_that_begin_together_share_a_salt(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    first, second = AuditLog(path), AuditLog(path)
    assert first.salt() == first.salt() == second.salt() and len(first.salt()) == 32
    # A salt of 32 bytes or more is taken as it is, and what another process left half made is no obstacle.
    (tmp_path / "b.jsonl.salt").write_bytes(b"s" * 40)
    assert AuditLog(tmp_path / "b.jsonl").salt() == b"s" * 40
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["audit.jsonl.salt", "b.jsonl.salt"]
