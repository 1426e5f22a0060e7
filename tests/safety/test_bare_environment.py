"""Judging needs onnxruntime, tokenizers and numpy alone: an environment that has nothing else runs it from the source tree."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import tiny_filter
from tiny_filter import BAD, GOOD

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = ("onnxruntime", "tokenizers", "numpy")


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions with all that they require, as they are installed."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an optional one that is not here either
        found.add(name)
        for line in requires:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the three packages, and what these require, linked from this one."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for name in closure(NEEDED):
        distribution = metadata.distribution(name)
        for top in {Path(file).parts[0] for file in distribution.files or [] if ".." not in Path(file).parts}:
            target = packages / top
            if top != "__pycache__" and not target.exists():
                target.symlink_to(distribution.locate_file(top).resolve())  # type: ignore[union-attr]
    return folder / "bin" / "python"


def test_runs_with_three_packages(python: Path, tmp_path: Path) -> None:
    weights = tiny_filter.build(tmp_path / "weights")
    environment = {"PATH": "/usr/bin:/bin"}
    lacks = "import importlib.util as u; print([n for n in ('torch', 'transformers', 'lightning', 'onnx') if u.find_spec(n)])"
    found = subprocess.run([python, "-c", lacks], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout == "[]\n", found.stderr
    found = subprocess.run(
        [python, "-m", "safety", "--weights", weights],
        cwd=REPOSITORY,
        env=environment,
        input=f"{BAD}\n{GOOD}\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    assert [json.loads(line)["sensitive"] for line in found.stdout.splitlines()] == [True, False]


def test_nothing_of_the_rest_is_imported(tmp_path: Path) -> None:
    weights = tiny_filter.build(tmp_path / "weights")
    program = f"""
import sys
before = set(sys.modules)
from safety import Filter
from safety.gate import Gate
assert not {{"numpy", "onnxruntime", "tokenizers"}} & set(sys.modules)
gate = Gate(weights={str(weights)!r})
assert gate.filter.check({BAD!r}).sensitive and not gate.problem
others = "mmgpt", "demo", "torch", "transformers", "rich"
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] in others))
"""
    found = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert found.stdout == "[]\n", found.stderr
