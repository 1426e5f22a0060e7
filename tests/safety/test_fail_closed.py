"""Whatever goes wrong, wherever it is asked: blocked, with a reason of its own, and never let through."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_filter
from tiny_filter import BAD, GOOD, LOOK_ALIKE, OUTPUTS

from safety import __main__ as command
from safety import weights as sealed
from safety.filter import MIN_CANARIES, Filter
from safety.gate import REFUSAL, Gate
from safety.verdict import MAX_BYTES, REASONS


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: Any, **__: Any) -> Any:
        raise error

    return raise_it


class Stage:
    """A stage that gives the same whatever it is asked, or raises."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def logits(self, texts: list[str]) -> Any:
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value(len(texts))


def stage(number: int, value: Any) -> Callable[[Filter, pytest.MonkeyPatch], None]:
    def put(judge: Filter, patch: pytest.MonkeyPatch) -> None:
        stages = list(judge._stages)
        stages[number] = Stage(value)
        judge._stages = tuple(stages)  # type: ignore[assignment]

    return put


def patched(name: str, value: Any) -> Callable[[Filter, pytest.MonkeyPatch], None]:
    return lambda judge, patch: patch.setattr(f"safety.filter.{name}", value)


def full(value: float) -> Callable[[int], np.ndarray]:
    return lambda count: np.full((count, OUTPUTS), value, np.float32)


def nested() -> str:
    text = "how to bake a cake with pears"
    for _ in range(5):
        text = base64.b64encode(text.encode()).decode()
    return text


@dataclass(frozen=True)
class Fault:
    """What is broken, or wrong with the text, and the reason it must give.

    `code` breaks a filter that was loaded; `weights` breaks the folder before; `line` is what stands for the text on the
    command line, `gate` the reason there where it is another.
    """

    reason: str
    text: Any = GOOD
    code: Callable[[Filter, pytest.MonkeyPatch], None] | None = None
    weights: Callable[[Path], Any] | None = None
    line: bytes | None = None
    gate: str = ""


def cut(name: str, size: int = 100) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def flip(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(bytes(data))

    return change


def edit(resealed: bool, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def do(folder: Path) -> None:
        path = folder / "calibration.json"
        calibration = json.loads(path.read_text())
        change(calibration)
        path.write_text(json.dumps(calibration))
        if resealed:
            sealed.seal(folder)

    return do


def canaries(change: Callable[[list[str]], list[str]]) -> Callable[[Path], Any]:
    def do(folder: Path) -> None:
        path = folder / "canaries.jsonl"
        path.write_text("\n".join(change(path.read_text().splitlines())))

    return do


def swapped_labels(lines: list[str]) -> list[str]:
    return [json.dumps({**json.loads(line), "label": 1 - json.loads(line)["label"]}) for line in lines]


def junk(name: str) -> Callable[[Path], Any]:
    def do(folder: Path) -> None:
        (folder / name).write_bytes(b"junk" * 100)
        sealed.seal(folder)

    return do


FAULTS: dict[str, Fault] = {
    "normalize raises": Fault("failed_normalize", code=patched("views", raising(RuntimeError()))),
    "normalize leaves the program": Fault("failed_normalize", code=patched("views", raising(SystemExit(0)))),
    "normalize runs out of memory": Fault("failed_normalize", code=patched("views", raising(MemoryError()))),
    "windows raises": Fault("failed_windows", code=patched("windows", raising(RuntimeError()))),
    "windows raises late": Fault("failed_windows", code=patched("windows", lambda text: (1 / 0 for _ in "x"))),
    "stage 1 raises": Fault("failed_linear", code=stage(0, RuntimeError())),
    "stage 1 leaves the program": Fault("failed_linear", code=stage(0, SystemExit(0))),
    "stage 2 raises": Fault("failed_transformer", LOOK_ALIKE, code=stage(1, RuntimeError())),
    "stage 2 stops": Fault("failed_transformer", LOOK_ALIKE, code=stage(1, StopIteration())),
    "decision raises": Fault("failed_decision", code=patched("_sigmoid", raising(OverflowError()))),
    "stage 1 gives NaN": Fault("not_finite", code=stage(0, full(np.nan))),
    "stage 1 gives infinity": Fault("not_finite", code=stage(0, full(-np.inf))),
    "stage 1 gives too few": Fault("not_finite", code=stage(0, lambda count: np.zeros((count, 3), np.float32) - 9)),
    "stage 1 gives no row": Fault("not_finite", code=stage(0, lambda count: np.zeros((0, OUTPUTS), np.float32))),
    "stage 1 gives nothing": Fault("not_finite", code=stage(0, lambda count: None)),
    "stage 2 gives NaN": Fault("not_finite", LOOK_ALIKE, code=stage(1, full(np.nan))),
    "stage 2 gives too many": Fault(
        "not_finite", LOOK_ALIKE, code=stage(1, lambda count: np.zeros((2, OUTPUTS), np.float32) - 9)
    ),
    "empty": Fault("empty", "", line=b"\n"),
    "nothing visible": Fault("empty", " \u200b\n ", line="\u200b \n".encode()),
    "None": Fault("not_text", None, line=b'{"text": null}\n', gate="bad_messages"),
    "a number": Fault("not_text", 3.5, line=b'{"text": 3.5}\n', gate="bad_messages"),
    "a list": Fault("not_text", ["text", 3], line=b'{"text": {"text": 3}}\n', gate="bad_messages"),
    "bytes": Fault("not_text", GOOD.encode(), line=b'{"text": true}\n', gate="bad_messages"),
    "10 MB": Fault("too_long", "x " * (MAX_BYTES // 2)),
    "10 MB of two bytes each": Fault("too_long", "é" * (MAX_BYTES // 2)),
    "lone surrogates": Fault("surrogates", "hello \ud83d", line=b'{"text": "hello \\ud83d"}\n'),
    "budget exceeded": Fault("budget_exceeded", nested()),
    "weights missing": Fault("weights_missing", weights=lambda folder: (folder / "linear.npz").unlink()),
    "no calibration": Fault("weights_missing", weights=lambda folder: (folder / "calibration.json").unlink()),
    "no folder": Fault("weights_missing", weights=shutil.rmtree),
    "a folder for a file": Fault(
        "weights_unreadable", weights=lambda folder: [(folder / "linear.npz").unlink(), (folder / "linear.npz").mkdir()]
    ),
    "linear truncated": Fault("weights_truncated", weights=cut("linear.npz")),
    "encoder truncated": Fault("weights_truncated", weights=cut("encoder.int8.onnx")),
    "tokenizer truncated": Fault("weights_truncated", weights=cut("tokenizer.json", 0)),
    "calibration truncated": Fault("weights_truncated", weights=cut("calibration.json")),
    "linear altered": Fault("weights_altered", weights=flip("linear.npz")),
    "encoder altered": Fault("weights_altered", weights=flip("encoder.int8.onnx")),
    "tokenizer altered": Fault("weights_altered", weights=flip("tokenizer.json")),
    "threshold altered": Fault(
        "weights_altered", weights=edit(False, lambda c: c["thresholds"]["balanced"].update(threshold=1.0))
    ),
    "wrong hash": Fault("weights_altered", weights=edit(False, lambda c: c["files"].update({"linear.npz": "0" * 64}))),
    "no hashes": Fault("weights_unreadable", weights=edit(False, lambda c: c.pop("files"))),
    "a file without hash": Fault("weights_altered", weights=edit(False, lambda c: c["files"].pop("tokenizer.json"))),
    "another version": Fault("weights_unreadable", weights=edit(True, lambda c: c.update(version=2))),
    "stages without weights": Fault("weights_unreadable", weights=edit(True, lambda c: c.pop("together"))),
    "a stage against": Fault("weights_unreadable", weights=edit(True, lambda c: c["together"].update(weight=-0.1))),
    "a stage unheard": Fault("weights_unreadable", weights=edit(True, lambda c: c["together"].update(slope=0.0))),
    "no cube": Fault("weights_unreadable", weights=edit(True, lambda c: c["together"].pop("cube"))),
    "a cube that turns the order": Fault("weights_unreadable", weights=edit(True, lambda c: c["together"].update(cube=-0.1))),
    "an infinite score": Fault("canary_failed", weights=edit(True, lambda c: c["together"].update(slope=1e308))),
    "a bias of NaN": Fault("weights_unreadable", weights=edit(True, lambda c: c["together"].update(bias=float("nan")))),
    "another taxonomy": Fault("weights_unreadable", weights=edit(True, lambda c: c["categories"].reverse())),
    "thresholds out of order": Fault(
        "weights_unreadable", weights=edit(True, lambda c: c["thresholds"]["strict"].update(threshold=0.9))
    ),
    "clears what it should not": Fault("weights_unreadable", weights=edit(True, lambda c: c["linear"].update(clear_below=0.4))),
    "a scale of NaN": Fault("weights_unreadable", weights=edit(True, lambda c: c["linear"]["a"].__setitem__(0, float("nan")))),
    "a scale turned": Fault("weights_unreadable", weights=edit(True, lambda c: c["linear"]["a"].__setitem__(0, -1.0))),
    "too few scales": Fault("weights_unreadable", weights=edit(True, lambda c: c["transformer"]["b"].pop())),
    "no such network": Fault("weights_unreadable", weights=junk("encoder.int8.onnx")),
    "no such table": Fault("weights_unreadable", weights=junk("linear.npz")),
    "no such tokenizer": Fault("weights_unreadable", weights=junk("tokenizer.json")),
    "canaries missing": Fault("canary_failed", weights=lambda folder: (folder / "canaries.jsonl").unlink()),
    "canaries broken": Fault("canary_failed", weights=canaries(lambda lines: ["{", *lines])),
    "too few canaries": Fault("canary_failed", weights=canaries(lambda lines: lines[-MIN_CANARIES + 1 :])),
    "canaries of one kind": Fault("canary_failed", weights=canaries(lambda lines: lines[:1] * MIN_CANARIES)),
    "canaries not told apart": Fault("canary_failed", weights=canaries(swapped_labels)),
    "a canary cannot be judged": Fault("canary_failed", weights=canaries(lambda lines: [*lines, '{"text": "", "label": 1}'])),
    "weights that do not tell": Fault("canary_failed", weights=edit(True, lambda c: c["transformer"]["a"].__setitem__(0, 1e-6))),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_filter.build(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "weights")
    return tmp_path / "weights"


def prepared(fault: Fault, folder: Path) -> Path:
    if fault.weights is not None:
        fault.weights(folder)
    return folder


def test_without_a_fault_it_passes(folder: Path) -> None:
    """What is blocked below is blocked by its fault alone."""
    assert Filter(weights=folder).check(GOOD).allowed and Filter(weights=folder).check(LOOK_ALIKE).allowed
    assert Gate(weights=folder).check_prompt([{"role": "user", "content": GOOD}]).allowed


def test_every_reason_is_tried() -> None:
    texts = {fault.reason for fault in FAULTS.values()} | {fault.gate for fault in FAULTS.values()}
    elsewhere = {"clear", "sensitive", "invalid_utf8", "bad_line", "failed_load", "failed_gate", "failed_audit"}
    hazards = {reason for reason, meaning in REASONS.items() if meaning.startswith("sensitive;")}
    assert set(REASONS) == texts - {""} | elsewhere | hazards


@pytest.mark.parametrize("name", FAULTS)
def test_in_python(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    judge = Filter(weights=prepared(fault, folder))
    if fault.code is not None:
        fault.code(judge, monkeypatch)
    found = judge.check(fault.text)
    assert found.sensitive and found.reason == fault.reason and found.score == 1 and not found.categories
    assert (judge.problem == fault.reason) == (fault.weights is not None)
    # In a batch the others keep their verdicts, unless it is the filter that is broken.
    batch = judge.check_batch([GOOD, fault.text, BAD])
    assert batch[1] == found and batch[2].sensitive
    if fault.weights is None and fault.code is None:
        assert batch[0].allowed


@pytest.mark.parametrize("name", FAULTS)
def test_at_the_gate(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fault = FAULTS[name]
    gate = Gate(weights=prepared(fault, folder), audit=tmp_path / "audit.jsonl")
    if fault.code is not None:
        fault.code(gate.filter, monkeypatch)
    found = gate.check_prompt([{"role": "user", "content": fault.text}])
    assert not found.allowed and found.reason == (fault.gate or fault.reason) and found.refusal == REFUSAL
    stream = gate.stream([], iter(["", fault.text, ""]))
    shown = []
    while True:
        try:
            shown.append(next(stream))
        except StopIteration as end:
            verdict = end.value
            break
    assert shown[-1].strip() == REFUSAL and not verdict.allowed and verdict.reason == fault.reason
    assert not fault.text or "".join(shown[:-1]) != fault.text
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["event"], line["allowed"]) for line in lines] == [("prompt", False), ("answer", False)]


@pytest.mark.parametrize("name", FAULTS)
def test_on_the_command_line(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    fault = FAULTS[name]

    prepared(fault, folder)
    line = fault.line if fault.line is not None else fault.text.encode() + b"\n"
    options = ["--field", "text"] if line.startswith(b"{") else []
    outcomes = []
    for mode in ([], ["--pass"]):
        with monkeypatch.context() as patch:

            def load(*args: Any, patch: pytest.MonkeyPatch = patch, **how: Any) -> Filter:
                judge = Filter(*args, **how)
                if fault.code is not None:
                    fault.code(judge, patch)
                return judge

            patch.setattr(command, "Filter", load)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line)))
            outcomes.append(command.main(["--weights", str(folder), *options, *mode]))
        out, err = capsysbinary.readouterr()
        assert b"Traceback" not in err
        if mode:
            assert out == b""
        else:
            [verdict] = map(json.loads, out.splitlines())
            assert verdict["sensitive"] is True and verdict["reason"] == fault.reason
    assert outcomes == [3 if fault.weights else 0] * 2


def test_a_filter_that_cannot_be_built_for_another_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safety.filter.read", raising(KeyError("x")))
    judge = Filter(weights=folder)
    assert judge.problem == "failed_load" and judge.check(GOOD).reason == "failed_load"
    assert judge.check_conversation([{"role": "user", "content": GOOD}]).reason == "failed_load"
    assert judge.check_conversation(None).reason == judge.check_answer(GOOD, GOOD).reason == "failed_load"


def test_an_interrupt_is_no_verdict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Filter(weights=folder)
    stage(0, KeyboardInterrupt())(judge, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        judge.check(GOOD)


def test_seal_of_what_was_meant(folder: Path) -> None:
    edit(False, lambda c: c["thresholds"]["loose"].update(threshold=0.9))(folder)
    assert Filter(weights=folder).problem == "weights_altered"
    assert sealed.seal(folder)[:12] == Filter(weights=folder).model
