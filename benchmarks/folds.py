"""A reward model's accuracy on all pairs of a source, each judged by a model that never saw its prompt (k-fold cross-validation).

    python benchmarks/folds.py --source pairs.jsonl.gz --folder runs/folds [--folds 5] [--at_once 1] [--config rlhf-text-reward]

Every fold is a run of its own in --folder (`data.fold`), and one that the same arguments made before is taken as it is; --at_once
trains several side by side, as a GPU has room for. Further arguments go to each run, and `--second hhh-alignment` has each rank a
second source. The pairs of all folds are pooled: accuracy with a bootstrap interval over prompts, and what the better rule of
"longer is better" and its opposite reaches on the same pairs. One JSON object on stdout; progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmgpt.errors import UsageError, UserError, run_cli
from mmgpt.evaluate.ranking import pool

OWN = "prompts of the same source"


def train(settings: argparse.Namespace, more: list[str], fold: int) -> Path:
    """One fold's run, unless it is there.

    Raises:
        UsageError: the folder holds the fold of another source, division or configuration.
    """
    folder = Path(settings.folder) / str(fold)
    arguments = ["--config", settings.config, "--run_dir", str(folder), "--overwrite", "true", "--trainer.progress", "false"]
    arguments += ["--data.train", json.dumps([{"path": settings.source}]), "--data.validation", "[]"]
    arguments += ["--data.holdout", str(1 / settings.folds), "--data.fold", str(fold)]
    if settings.second:
        arguments += ["--evaluate.source", json.dumps({"path": settings.second})]
    arguments += more
    asked = folder / "asked.json"
    if (folder / "ranking.json").is_file():
        if not asked.is_file() or json.loads(asked.read_text(encoding="utf-8")) != arguments:
            raise UsageError(f"{folder} holds a run that was asked for otherwise: name another --folder, or remove it")
        return folder
    done = subprocess.run([sys.executable, "-m", "mmgpt.train", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"fold {fold} failed:\n{done.stderr[-2000:]}")
    asked.write_text(json.dumps(arguments), encoding="utf-8")
    print(f"fold {fold} done", file=sys.stderr, flush=True)
    return folder


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="preferences: a file, or the name of a data set")
    parser.add_argument("--folder", required=True, help="where the runs go")
    parser.add_argument("--config", default="rlhf-text-reward")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--at_once", type=int, default=1)
    parser.add_argument("--second", help="a source that every fold's model ranks, too")
    settings, more = parser.parse_known_args(arguments)
    if settings.folds < 2 or settings.at_once < 1:
        raise UsageError("--folds must be at least 2, --at_once at least 1")
    with ThreadPoolExecutor(settings.at_once) as workers:
        folders = list(workers.map(lambda fold: train(settings, more, fold), range(settings.folds)))
    found = [json.loads((folder / "ranking.json").read_text(encoding="utf-8")) for folder in folders]
    every = pool([ranking[OWN] for ranking in found])
    figures = every.figures()
    result: dict[str, Any] = {
        "pairs": len(every.better),
        **{key: figures[key] for key in ("accuracy", "interval", "by_length_alone")},
        "folds": [ranking[OWN]["accuracy"] for ranking in found],
    }
    if settings.second:
        result[settings.second] = [ranking[settings.second]["accuracy"] for ranking in found]
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
