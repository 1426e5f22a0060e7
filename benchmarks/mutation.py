"""Mutation testing of what decides in the filter: `python benchmarks/mutation.py`. Needs `pip install -e '.[mutation]'`.

mutmut changes normalize, windows, gate and the thresholds (calibrate) in one place at a time, an operator or a constant, and
runs the tests that reach the place. A mutant that no test notices has survived. What is changed and which tests run stands in
pyproject.toml, `tool.mutmut`; mutmut does not change decorated functions, nor what stands outside of functions.

All mutants take long (each some seconds), so a seeded sample of every file is tried; --sample 0 takes all. Prints JSON: killed
of tried by file, with Wilson's 95 % interval, the whole weighted by how many mutants a file has, and the survivors as diffs.
A mutant that runs out of time counts as killed: it hangs where the code did not.

Exit codes: 0 at least --least of the mutants are killed, 1 less or failure, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from mmgpt.errors import UsageError, UserError, run_cli  # noqa: E402
from safety.intervals import wilson  # noqa: E402

SURVIVED, UNTESTED, TIMEOUT = (0,), (5, 33), (36, 24, -24, 152, 255)
KILLED = (1, 3, *TIMEOUT)


THRESHOLDS = re.compile(r"operating_points|above|clear_below|OperatingPoint")
"""Of calibrate these alone: how Platt's optimum is searched for can change a lot without changing what is found."""


def settings() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    return found


def copy(folder: Path) -> None:
    """The tree that mutmut works on: it writes mutants beside the source, and none may end up in the repository."""
    for name in ("safety", "tests", "mutants"):
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.copytree(REPOSITORY / "safety", folder / "safety", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    shutil.copytree(REPOSITORY / "tests" / "safety", folder / "tests" / "safety", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "tiny_filter.py"):
        shutil.copy(REPOSITORY / "tests" / name, folder / "tests")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)


def mutmut(folder: Path, names: list[str], processes: int) -> None:
    """Run mutmut on some mutants. Raises UserError."""
    # The copy's modules must be found, not the repository's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = "import sys; from mutmut.__main__ import cli; cli()"
    command = [sys.executable, "-c", program, "run", "--max-children", str(processes), *names]
    log = folder / "mutmut.log"
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise UserError(f"mutmut ended with {done.returncode}: {log} says why (do the tests pass without a mutant?)")


def results(folder: Path, file: str) -> dict[str, int | None]:
    """Exit code of the tests for every mutant of a file; None where it was not tried."""
    meta = json.loads((folder / "mutants" / f"{file}.meta").read_text(encoding="utf-8"))
    found: dict[str, int | None] = meta["exit_code_by_key"]
    return {name: code for name, code in found.items() if not file.endswith("calibrate.py") or THRESHOLDS.search(name)}


def difference(folder: Path, file: str, name: str) -> str:
    """The line a mutant changes, before and after."""
    tree = ast.parse((folder / "mutants" / file).read_text(encoding="utf-8"))
    mutant = name.rpartition(".")[2]
    bodies: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in (mutant, re.sub(r"__mutmut_\d+$", "__mutmut_orig", mutant)):
            bodies[node.name] = ast.unparse(node).replace(node.name, "").splitlines()
    original = bodies.pop(re.sub(r"__mutmut_\d+$", "__mutmut_orig", mutant), [])
    lines = difflib.unified_diff(original, bodies.get(mutant, []), n=0, lineterm="")
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def report(folder: Path, tried: dict[str, list[str]]) -> dict[str, Any]:
    """Figures of the mutants that were tried, by file."""
    files, survivors, weighted, total = {}, {}, 0.0, 0
    for file, names in tried.items():
        found = results(folder, file)
        # Broken off, or lost to the machine: neither killed nor survived.
        codes = [found[name] for name in names if found[name] in (*KILLED, *SURVIVED, *UNTESTED)]
        killed = sum(code in KILLED for code in codes)
        low, high = wilson(killed, len(codes))
        files[file] = {
            "mutants": len(found),
            "tried": len(codes),
            "killed": killed,
            "of these out of time": sum(code in TIMEOUT for code in codes),
            "share": round(killed / max(len(codes), 1), 4),
            "interval": [round(low, 4), round(high, 4)],
        }
        weighted += len(found) * killed / max(len(codes), 1)
        total += len(found)
        survivors |= {name: difference(folder, file, name) for name in names if found[name] in (*SURVIVED, *UNTESTED)}
    counts = [sum(entry[key] for entry in files.values()) for key in ("killed", "tried")]
    low, high = wilson(counts[0], counts[1])
    whole = {
        "killed": counts[0],
        "tried": counts[1],
        "share": round(weighted / total, 4),
        "interval": [round(low, 4), round(high, 4)],
    }
    return {"files": files, "all": whole, "survivors": survivors}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=40, metavar="N", help="mutants of every file; 0 takes all (default 40)")
    parser.add_argument("--files", nargs="+", metavar="FILE", help="only these of the files in pyproject.toml")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--least", type=float, default=0.85, metavar="SHARE", help="share that must be killed (default .85)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="mutants tried at once (default 1)")
    parser.add_argument(
        "--folder", type=Path, default=REPOSITORY / "runs" / "mutation", help="to work in (default runs/mutation)"
    )
    options = parser.parse_args(arguments)
    known = settings()["only_mutate"]
    for file in options.files or []:
        if file not in known:
            raise UsageError(f"--files: {file} is not mutated; there are {', '.join(known)}")
    if options.sample < 0 or options.processes < 1:
        raise UsageError("--sample must not be negative, --processes at least 1")
    if importlib.util.find_spec("mutmut") is None:
        raise UserError("mutmut is not installed: pip install -e '.[mutation]'")
    options.folder.mkdir(parents=True, exist_ok=True)
    copy(options.folder)
    # Each file's first mutant by pattern: mutmut writes down all there are before it tries one.
    mutmut(options.folder, ["safety.calibrate.x_sigmoid__mutmut_1"], options.processes)
    tried = {}
    for file in options.files or known:
        names = sorted(results(options.folder, file))
        tried[file] = random.Random(f"{options.seed}:{file}").sample(names, min(options.sample or len(names), len(names)))
    mutmut(options.folder, [name for names in tried.values() for name in names], options.processes)
    found = {"seed": options.seed, "sample": options.sample, **report(options.folder, tried)}
    print(json.dumps(found, indent=1))
    return 0 if found["all"]["share"] >= options.least else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))
