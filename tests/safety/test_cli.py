"""`python -m safety`: as a process, and in process where the weights are the test's."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny_filter
from tiny_filter import BAD, GOOD, LOOK_ALIKE

from safety import __main__ as command
from safety.filter import Filter

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_filter.build(tmp_path_factory.mktemp("weights"))


def start(*argv: str, **options: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen([sys.executable, "-m", "safety", *argv], env=environment, **pipes, **options)  # type: ignore[call-overload]


def ask(data: bytes, *argv: str) -> tuple[int, bytes, str]:
    process = start(*argv)
    out, err = process.communicate(data, timeout=120)
    return process.returncode, out, err.decode()


def test_lines_in_order_with_their_verdicts(weights: Path) -> None:
    lines = [BAD, GOOD, LOOK_ALIKE, "", "é\u200b", GOOD + "\r"]
    data = "\n".join(lines).encode() + b"\nbroken \xff\nlast " + BAD.encode()
    code, out, err = ask(data, "--weights", str(weights))
    assert code == 0 and err == ""
    found = [json.loads(line) for line in out.splitlines()]
    assert [entry["line"] for entry in found] == list(range(1, 9))
    assert [entry["sensitive"] for entry in found] == [True, False, False, True, False, False, True, True]
    assert [found[at]["reason"] for at in (3, 6)] == ["empty", "invalid_utf8"]
    # What the command says is what the filter says.
    judge = Filter(weights=weights)
    assert found[0] == {"line": 1, **judge.check(BAD).to_json()} and found[5] == {"line": 6, **judge.check(GOOD).to_json()}


def test_pass_and_rejected_share_out_every_byte(weights: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    lines = [rng.choice([BAD, GOOD, "bath", "murder", "a\r", "", "é"]).encode() + b"\n" for _ in range(3000)]
    lines += [b"\xff\xfe\n", b"no end of line"]
    source = tmp_path / "prompts.txt"
    source.write_bytes(b"".join(lines))
    rejected = tmp_path / "rejected.txt"
    code, out, err = ask(b"", "--weights", str(weights), "--pass", "--rejected", str(rejected), str(source))
    assert code == 0 and err == ""
    allowed = {b"bath", b"a\r", "é".encode(), GOOD.encode(), b"no end of line"}
    assert out == b"".join(line for line in lines if line.removesuffix(b"\n") in allowed)
    assert rejected.read_bytes() == b"".join(line for line in lines if line.removesuffix(b"\n") not in allowed)


def test_fields_of_json(weights: Path, tmp_path: Path) -> None:
    rows = [{"prompt": GOOD, "id": 1}, {"prompt": BAD}, {"text": GOOD}, {"prompt": 3}, [1], "x"]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n" + "[" * 5000 + "\n")
    code, out, _ = ask(b"", "--weights", str(weights), "--field", "prompt", str(source))
    assert code == 0
    reasons = [json.loads(line)["reason"] for line in out.splitlines()]
    assert reasons == ["clear", "indiscriminate_weapons", "bad_line", "not_text", "bad_line", "bad_line", "bad_line", "bad_line"]
    code, out, _ = ask(source.read_bytes(), "--weights", str(weights), "--field", "prompt", "--pass", "-")
    assert out == json.dumps(rows[0]).encode() + b"\n"


def test_a_field_of_messages_is_a_conversation(weights: Path) -> None:
    def turn(text: object) -> dict[str, object]:
        return {"role": "user", "content": text}

    talks: list[object] = [
        [turn(GOOD), {"role": "assistant", "content": [{"type": "text", "text": BAD}]}],
        [turn(GOOD), turn(GOOD)],
        GOOD,
        [turn(None)],
        [GOOD],
        [],
    ]
    lines = "".join(json.dumps({"messages": talk, "model": "any"}) + "\n" for talk in talks)
    code, out, _ = ask(lines.encode(), "--weights", str(weights), "--field", "messages")
    found = [json.loads(line) for line in out.splitlines()]
    reasons = [verdict["reason"] for verdict in found]
    assert code == 0 and reasons == ["indiscriminate_weapons", "clear", "clear", "bad_messages", "bad_messages", "bad_messages"]
    assert found[0] == {"line": 1, **Filter(weights=weights).check_conversation(talks[0]).to_json()}


def test_several_files_are_numbered_through(weights: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{GOOD}\n{BAD}\n")
    code, out, _ = ask(b"", "--weights", str(weights), str(tmp_path / "a"), str(tmp_path / "b"))
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(entry["line"], entry["sensitive"]) for entry in found] == [
        (1, False),
        (2, True),
        (3, False),
        (4, True),
    ]


def test_a_line_is_answered_before_the_next_comes(weights: Path) -> None:
    process = start("--weights", str(weights))
    assert process.stdin and process.stdout
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        for number, text in enumerate([GOOD, BAD, GOOD], 1):
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            assert found["line"] == number and found["sensitive"] == (text == BAD)
        process.stdin.close()
        assert process.wait() == 0
    finally:
        watchdog.cancel()
        process.stdout.close()
        process.stderr.close()  # type: ignore[union-attr]


def test_the_operating_point_counts(weights: Path, tmp_path: Path) -> None:
    for point in ("strict", "balanced", "loose"):
        code, out, _ = ask(BAD.encode(), "--weights", str(weights), "--operating_point", point)
        assert code == 0 and json.loads(out)["operating_point"] == point


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--operating_point", "off"], "invalid choice"),
        (["nowhere.txt"], "no file nowhere.txt"),
        (["--stage", "none"], "unrecognized arguments"),
        (["-", "-"], "given twice"),
        (["--field"], "expected one argument"),
        (["{here}", "--rejected", "{here}"], "overwrite"),
    ],
)
def test_wrong_usage(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([word.format(here=__file__) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.startswith("error: ") and "Traceback" not in err


def test_an_output_that_cannot_be_written(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").write_text(GOOD)
    assert command.main(["--weights", str(weights), "--rejected", str(tmp_path / "no" / "file"), str(tmp_path / "in")]) == 1
    assert "no/file" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_failure(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text((GOOD + "\n") * 20_000)
    process = start("--weights", str(weights), str(tmp_path / "in"))
    assert process.stdout and process.stderr and process.stdin
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and process.stderr.read() == b""
    process.stderr.close()
    process.stdin.close()


def test_lines_of_any_length_are_cut_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MAX_BYTES", 10)
    rng = random.Random(1)
    for _ in range(200):
        lines = [b"x" * rng.choice([0, 1, 5, 9, 10, 11, 40]) + b"\n" for _ in range(rng.randrange(6))]
        data = b"".join(lines) + b"y" * rng.choice([0, 3, 10, 11, 30])
        at = 0

        def read(size: int, data: bytes = data) -> bytes:
            nonlocal at
            piece = data[at : at + rng.randrange(1, 8)]
            at += len(piece)
            return piece

        spilled: list[bytes] = []
        found = [line for batch in command.Lines(read, spilled.append) for line in batch]
        expected = data.splitlines(keepends=True)
        assert [None if len(line) > 10 else line for line in expected] == found
        assert b"".join(spilled) == b"".join(line for line in expected if len(line) > 10)


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    program = "import sys, safety.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
    program += "print([name for name in ('numpy', 'onnxruntime', 'tokenizers', 'rich', 'mmgpt', 'torch') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert found.stdout.endswith("[]\n") and "exit codes:" in found.stdout, found.stderr


def test_a_progress_bar_where_a_person_watches(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    (tmp_path / "in").write_text((GOOD + "\n") * 100)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with command._progress([str(tmp_path / "in")]) as advance:
        advance(10)
        steps.append(10)
    with command._progress(["-"]) as advance:
        advance(10)
    assert steps == [10]
