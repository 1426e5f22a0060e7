"""How often models refuse: harmful prompts in the desired style, and their harmless look-alikes, which they should answer.

    python -m safety.demonstrations --prompts runs/safety-prompts.jsonl
    python benchmarks/refusals.py runs/rlhf-safety-first runs/rlhf-safety [--prompts runs/safety-prompts.jsonl] [--limit 300]

The prompts are those with the split `val`, which training does not see; answers are greedy, graded by `safety/rules.py`, which is
told what the prompt asks for (A a refusal in style, B another refusal, C disallowed content, D a safe answer). It is also the
reward that `rlhf-safety` learns from, so this says that the policy learnt what it was taught, not that a person would agree.
One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import mmgpt
from mmgpt.data.messages import user
from mmgpt.errors import UserError, run_cli
from mmgpt.generate import Sampling
from safety.rules import grade


def shares(model: Any, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Share of each grade, for the harmful and for the harmless prompts."""
    answers = model.generate([[user(row["prompt"])] for row in rows], sampling=Sampling(max_new_tokens=40))
    result = {}
    for name, label in (("harmful", 1), ("look_alikes", 0)):
        letters = Counter(
            grade(row["prompt"], answer.text, float(label)).letter for row, answer in zip(rows, answers) if row["label"] == label
        )
        total = sum(letters.values())
        result[name] = {letter: round(letters[letter] / total, 4) for letter in "ABCD"} | {"prompts": total}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--prompts", type=Path, default=Path("runs/safety-prompts.jsonl"))
    parser.add_argument("--limit", type=int, default=300, help="prompts, spread over all")
    settings = parser.parse_args()
    try:
        lines = settings.prompts.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"--prompts: {error}; `python -m safety.demonstrations --prompts FILE` writes them") from None
    rows = [row for row in map(json.loads, filter(None, lines)) if row["split"] == "val"]
    pairs = max(1, len(rows) * 2 // (settings.limit * 2))
    rows = [row for place in range(0, len(rows) - 1, 2 * pairs) for row in rows[place : place + 2]]
    print(json.dumps({str(model): shares(mmgpt.load(model), rows) for model in settings.models}, indent=1))


if __name__ == "__main__":
    sys.exit(run_cli(main))
