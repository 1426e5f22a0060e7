"""Reward models as judges: of pairs that people, or what people wrote, decided, and of answers that people scored.

    python benchmarks/judges.py runs/rlhf-text-reward --source hhh-alignment
    python benchmarks/judges.py runs/rlhf-image-reward --source flickr8k.parquet --split val --candidates 6 --limit 300
    python benchmarks/judges.py runs/rlhf-image-reward --ratings ratings.jsonl

With `--source` (any form of preferences, or pictures with several captions each and `--candidates`): share of the pairs ranked as
there, with a bootstrap interval over prompts, what length alone reaches, calibration error, correlation with length. With
`--ratings`: Kendall's tau-c, in points, between the scores of the model and those that people gave: JSONL rows with `image`,
`caption` and `scores` (one or several people's); every rating counts once, as in CLIPScore (Hessel et al. 2021, section 4.1).
One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from mmgpt import machine
from mmgpt.config import SourceConfig
from mmgpt.data.messages import user
from mmgpt.data.preferences import read_preferences
from mmgpt.data.ranked import Preference, side_by_side
from mmgpt.errors import UsageError, UserError, run_cli
from mmgpt.evaluate.ranking import Ranking, kendall_tau_c
from mmgpt.model.heads import RewardModel


def rank(model: RewardModel, preferences: list[Preference]) -> Ranking:
    """The scores of all answers, and who was preferred."""
    prompts, texts, decided = side_by_side(preferences)
    better, worse = zip(*decided)
    lengths = [len(model.model.tokenizer.encode(text)) for text in texts]
    owners = np.repeat(np.arange(len(preferences)), [len(item.answers) for item in preferences])
    scores = model.score(prompts, texts, batch_size=32).numpy()
    return Ranking(scores, np.array(lengths), owners, np.array(better), np.array(worse))


def pairs(settings: argparse.Namespace) -> dict[str, Any]:
    asked = {"limit": settings.limit, "candidates": settings.candidates, "question": settings.question}
    source = SourceConfig(path=settings.source, split=settings.split, **asked)
    found = [item for item in read_preferences(source) if isinstance(item, Preference)]
    if not found:
        raise UserError(f"{settings.source} holds no preference that can be used")
    result: dict[str, Any] = {"prompts": len(found), "pairs": sum(len(item.pairs) for item in found)}
    for name in settings.models:
        result[name] = rank(RewardModel.from_pretrained(name).to(machine.pick_device()), found).figures()
    return result


def ratings(settings: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for number, line in enumerate(settings.ratings.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            values = row["scores"] if isinstance(row["scores"], list) else [row["scores"]]
            rows.append((str(settings.ratings.parent / row["image"]), str(row["caption"]), [float(value) for value in values]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{settings.ratings}:{number}: needs image, caption and scores: {error}") from error
    result: dict[str, Any] = {"captions": len(rows), "ratings": sum(len(values) for _, _, values in rows)}
    for name in settings.models:
        model = RewardModel.from_pretrained(name).to(machine.pick_device())
        prompts = [[user(settings.question, [image])] for image, _, _ in rows]
        scores = model.score(prompts, [text for _, text, _ in rows], batch_size=32).tolist()
        judged = [(score, value) for score, (_, _, values) in zip(scores, rows) for value in values]
        result[name] = {"tau_c": round(100 * kendall_tau_c(*zip(*judged)), 2)}
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="run folders of reward models")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", help="preferences, or pictures with several captions each")
    what.add_argument("--ratings", type=Path, help="what people scored")
    parser.add_argument("--split", default=None)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--candidates", type=int, default=0, help="captions to rank for a picture")
    parser.add_argument("--question", default="Describe this image.")
    settings = parser.parse_args(arguments)
    print(json.dumps(ratings(settings) if settings.ratings else pairs(settings), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
