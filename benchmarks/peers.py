"""The sides of a comparison: each a process, those of peers in a virtual environment of their own under the cache.

Nothing but the standard library is imported: a side's own process, in a peer's environment, takes `Answers` from here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def environment(*requirements: str) -> Path:
    """The interpreter of a virtual environment with some packages, made where it is not yet.

    Args:
        requirements: Pinned, as pip takes them; the first gives the environment its name.

    Raises:
        SystemExit: pip cannot install them.
    """
    from mmgpt.artifacts import cache_dir

    folder = cache_dir() / "peers" / requirements[0].replace("==", "-").replace("[", "-").replace("]", "")
    done, python = folder / "done", folder / "bin" / "python"
    if not done.exists():
        names = ", ".join(requirements)
        print(f"{names} is installed in {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise SystemExit(f"{names} could not be installed; it is fetched from the package registry once")
        done.touch()
    return python


class Side:
    """A process that gives a line of JSON once it has begun, and one for every line it is asked.

    Args:
        name: For messages.
        command: Of the process; its standard error is kept for the message should it end too early.
        threads: Of its libraries.
    """

    def __init__(self, name: str, command: list[str], threads: int = 1) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.ready = self.answer()

    def ask(self, request: Any) -> Any:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        """The next line. Raises SystemExit with the end of what it said when the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self.errors.read().decode('utf-8', 'replace')[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


class Answers:
    """A side's end of the pipe: whatever a library prints goes to standard error instead, for it is no answer."""

    def __init__(self) -> None:
        self.out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def give(self, answer: Any) -> None:
        print(json.dumps(answer), file=self.out, flush=True)

    def requests(self) -> Iterator[Any]:
        """What is asked, until nothing more is."""
        for line in sys.stdin:
            yield json.loads(line)


def peak_memory_mb() -> float:
    """Peak resident memory of this process; `getrusage` counts from before `exec`, so its number may be the parent's."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 1024
