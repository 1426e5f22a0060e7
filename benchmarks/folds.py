"""A reward model's accuracy on all pairs of a source, each judged by a model that never saw its prompt (k-fold cross-validation).

    python benchmarks/folds.py --source pairs.jsonl.gz --folder runs/folds [--folds 5] [--at_once 1] [--config rlhf-text-reward]

Every fold is a run of its own in --folder (`data.fold`), and one that stands there already is taken as it is; --at_once trains
several side by side, as a GPU has room for. Further arguments go to each run, and `--second hhh-alignment` has each rank a second
source. The pairs of all folds are pooled: accuracy with a bootstrap interval over prompts, and what the better rule of "longer is
better" and its opposite reaches on the same pairs. One JSON object on stdout; progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt.errors import UserError, run_cli
from mmgpt.evaluate.ranking import Ranking

OWN = "prompts of the same source"


def train(settings: argparse.Namespace, more: list[str], fold: int) -> Path:
    """One fold's run, unless it is there."""
    folder = Path(settings.folder) / str(fold)
    if not (folder / "ranking.json").is_file():
        arguments = ["--config", settings.config, "--run_dir", str(folder), "--overwrite", "true", "--trainer.progress", "false"]
        arguments += ["--data.train", json.dumps([{"path": settings.source}])]
        arguments += ["--data.holdout", str(1 / settings.folds), "--data.fold", str(fold)]
        if settings.second:
            arguments += ["--evaluate.source", json.dumps({"path": settings.second})]
        done = subprocess.run([sys.executable, "-m", "mmgpt.train", *arguments, *more], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"fold {fold} failed:\n{done.stderr[-2000:]}")
    print(f"fold {fold} done", file=sys.stderr, flush=True)
    return folder


def pooled(rankings: list[dict[str, Any]]) -> Ranking:
    """The pairs of several rankings as one; no two share a prompt."""
    pairs = [(fold, *pair) for fold, ranking in enumerate(rankings) for pair in ranking["pairs"]]
    names = {place: number for number, place in enumerate(sorted({(fold, prompt) for fold, prompt, *_ in pairs}))}
    count = len(pairs)
    scores = np.zeros(2 * count)
    scores[:count] = [margin for _, _, margin, _, _ in pairs]
    return Ranking(
        scores=scores,
        lengths=np.array([a for *_, a, _ in pairs] + [b for *_, b in pairs]),
        prompts=np.array([names[fold, prompt] for fold, prompt, *_ in pairs] * 2),
        better=np.arange(count),
        worse=np.arange(count) + count,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="preferences: a file, or the name of a data set")
    parser.add_argument("--folder", required=True, help="where the runs go")
    parser.add_argument("--config", default="rlhf-text-reward")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--at_once", type=int, default=1)
    parser.add_argument("--second", help="a source that every fold's model ranks, too")
    settings, more = parser.parse_known_args(arguments)
    with ThreadPoolExecutor(settings.at_once) as pool:
        folders = list(pool.map(lambda fold: train(settings, more, fold), range(settings.folds)))
    found = [json.loads((folder / "ranking.json").read_text(encoding="utf-8")) for folder in folders]
    every = pooled([ranking[OWN] for ranking in found])
    low, high = every.interval()
    result: dict[str, Any] = {
        "pairs": len(every.better),
        "accuracy": round(every.accuracy, 4),
        "interval": [round(low, 4), round(high, 4)],
        "by_length_alone": round(every.length_accuracy, 4),
        "folds": [ranking[OWN]["accuracy"] for ranking in found],
    }
    if settings.second:
        result[settings.second] = [ranking[settings.second]["accuracy"] for ranking in found]
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
