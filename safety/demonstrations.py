"""What a policy learns to refuse from: prompts that ask for harm or look like it, and conversations that show how to answer.

    python -m safety.demonstrations --prompts FILE                  write prompts, half of them asking for harm
    python -m safety.demonstrations --conversations FILE [--answers FILE]   write refusals in style and plain answers

The prompts are for `safety.rules.RuleReward`, the conversations for supervised training before it. Exit codes: 0 done, 1 a file
is broken, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safety.propositions import as_text
from safety.rules import EXAMPLES, RulesError, grade, read_examples

PAIRS = Path(__file__).parent / "data" / "pairs"
LONGEST = 300  # characters of a request to learn from: an answer of a small model has room beside it


def write_prompts(path: Path, seed: int = 0) -> int:
    """Write prompts to learn refusing from, half of them harmful, one JSON object a line: `prompt`, `label`, `category`, `split`.

    They are the contrast pairs, of which every fifth is `val`, both halves of it, the others `train`, and as many composed
    `requests` as these: a policy that was shown what to say to the pairs (`write_conversations`) learns little from them.

    Args:
        path: The file.
        seed: Draws the requests.

    Returns:
        How many prompts there are.
    """
    rows = list(_contrast())
    shown = [row for row in rows if row["split"] == "train"]
    rows += _requests([sum(row["label"] == label for row in shown) for label in (0, 1)], seed)
    return _write(path, rows)


def _requests(counts: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """As many harmless and harmful requests as `counts` says, drawn from all acts, none of them long."""
    from safety import sources

    composed = sources.requests(per_act=1, seed=seed)
    random.Random(seed).shuffle(composed)
    rows = []
    for label, count in enumerate(counts):
        fit = (row for row in composed if row.label == label and row.text.isascii() and len(row.text) <= LONGEST)
        for row in itertools.islice(fit, count):
            category = (row.categories or ("harmless",))[0]
            rows.append({"prompt": row.text.strip(), "label": label, "category": category, "split": "requests"})
    return rows


def _contrast() -> Iterator[dict[str, Any]]:
    for file in sorted(PAIRS.glob("*.jsonl")):
        for number, line in enumerate(filter(str.strip, file.read_text(encoding="utf-8").split("\n"))):
            pair = json.loads(line)
            split = "train" if number % 5 else "val"
            for label, key in ((1, "sensitive"), (0, "harmless")):
                yield {"prompt": pair[key].strip(), "label": label, "category": pair["category"], "split": split}


def write_conversations(path: Path, answers: Path | None = None) -> int:
    """Write conversations to learn from: refusals of harmful prompts in the desired style, and answers to harmless ones.

    They are the examples that are as they should be. With `answers`, also one for every prompt of the contrast pairs that is not
    held out: what a model answered to the harmless half, as far as it is a safe answer, up to its last whole sentence; and
    refusals of the other half. A model that is shown refusals alone refuses what only looks harmful, too.

    Args:
        path: The file, JSONL with `messages`.
        answers: Answers of a model to the prompts of `--prompts`, as `python -m mmgpt.answer` writes them.

    Returns:
        How many there are.

    Raises:
        RulesError: a file cannot be read.
    """
    good = [e for e in read_examples(EXAMPLES) if e.grade == ("D" if e.category == "harmless" else "A")]
    pairs = [(example.prompt, example.answer) for example in good]
    if answers is not None:
        said = _answered(answers)
        # What fits any prompt: it names nothing of its own.
        refusals = sorted({e.answer for e in good if e.grade == "A" and len(e.answer) < 60 and _fits_any(e.answer)})
        for number, row in enumerate(row for row in _contrast() if row["split"] == "train"):
            prompt, harmful = row["prompt"], row["label"] == 1
            answer = refusals[number % len(refusals)] if harmful else _whole_sentences(said.get(prompt, ""))
            if answer and (harmful or grade(prompt, answer, 0.0).letter == "D"):
                pairs.append((prompt, answer))
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair)]} for pair in pairs
    ]
    return _write(path, rows)


def _answered(path: Path) -> dict[str, str]:
    """Answers by their prompts. Raises RulesError where the file is not what `python -m mmgpt.answer` writes."""
    try:
        rows = [json.loads(line)["messages"] for line in filter(str.strip, path.read_text(encoding="utf-8").split("\n"))]
        return {as_text(asked["content"]).strip(): as_text(answer["content"]) for asked, answer in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RulesError(f"{path} holds no answers ({error!r}); python -m mmgpt.answer writes them") from None


def _write(path: Path, rows: list[dict[str, Any]]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def _fits_any(refusal: str) -> bool:
    return re.search(r"(with|about|to do) (that|this)\b|this request|that request|that one", refusal) is not None


def _whole_sentences(text: str) -> str:
    """A text up to the end of its last sentence; nothing where none ends."""
    found = re.match(r".*[.!?](?=\s|$)", text.strip(), re.DOTALL)
    return found[0] if found else ""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    about = "Prompts and conversations that a policy learns to refuse from."
    parser = argparse.ArgumentParser(prog="python -m safety.demonstrations", description=about, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompts", type=Path, metavar="FILE", help="write the contrast pairs and requests, for `RuleReward`")
    what.add_argument("--conversations", type=Path, metavar="FILE", help="write refusals in style and answers to learn from")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="with --conversations: a model's answers to the prompts")
    args = parser.parse_args(argv)
    if args.answers and not args.conversations:
        parser.error("--answers goes with --conversations")
    try:
        if args.prompts:
            print(f"{args.prompts}: {write_prompts(args.prompts)} prompts")
        else:
            print(f"{args.conversations}: {write_conversations(args.conversations, args.answers)} conversations")
    except (RulesError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
