"""Peers that cannot share this project's environment: each gets a virtual environment of its own under the cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


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
