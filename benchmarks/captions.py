"""Captions of models, and judges of captions, measured against what people wrote.

    python benchmarks/captions.py answers runs/rlhf-image-captions runs/rlhf-image --source flickr8k.parquet --split val
    python benchmarks/captions.py judges runs/rlhf-image-reward --source flickr8k.parquet --split val
    python benchmarks/captions.py ratings runs/rlhf-image-reward --ratings ratings.jsonl

`answers`: greedy captions of held-out pictures: how alike what people wrote (mean cosine of sentence embeddings), how many name
an object that nobody mentions (CHAIR_s) and how many of the named objects that is (CHAIR_i; Rohrbach et al. 2018), words, and
with `--judge RUN` the mean score of a reward model. `judges`: which share of held-out candidate pairs a reward model ranks
as agreement with people's captions does. `ratings`: Kendall's tau-c, in points, between a reward model's scores and those
that people gave: JSONL rows with `image`, `caption` and `scores` (one or several people's); every rating counts once, as in
CLIPScore (Hessel et al. 2021, section 4.1). One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import mmgpt
from mmgpt.config import SourceConfig
from mmgpt.data.candidates import Captioned, rank_captions, read_captioned
from mmgpt.data.messages import user
from mmgpt.data.objects import count_made_up
from mmgpt.data.preferences import Preference
from mmgpt.data.similarity import SentenceEncoder
from mmgpt.errors import UsageError, run_cli
from mmgpt.evaluate.ranking import kendall_tau_c
from mmgpt.generate import Sampling
from mmgpt.model.heads import RewardModel


def answers(settings: argparse.Namespace, source: SourceConfig) -> dict[str, Any]:
    pictures = [item for item in read_captioned(source) if isinstance(item, Captioned)]
    prompts = [[user(settings.question, [picture.image])] for picture in pictures]
    encoder = SentenceEncoder()
    references = encoder([text for picture in pictures for text in picture.captions]).split(
        [len(picture.captions) for picture in pictures]
    )
    judge = RewardModel.from_pretrained(settings.judge) if settings.judge else None
    said: dict[str, list[str]] = {"people (the first of the captions, against the others)": [one.captions[0] for one in pictures]}
    for name in settings.models:
        found = mmgpt.load(name).generate(prompts, sampling=Sampling(max_new_tokens=settings.max_new_tokens))
        said[name] = [answer.text for answer in found]
    result: dict[str, Any] = {"pictures": len(pictures)}
    for name, texts in said.items():
        first = 1 if name.startswith("people") else 0
        vectors = encoder(texts)
        alike = [float((others[first:] @ vector).mean()) for others, vector in zip(references, vectors)]
        wrong = count_made_up(texts, [picture.captions[first:] for picture in pictures])
        result[name] = {
            "similarity": round(statistics.mean(alike), 4),
            "captions_with_made_up_objects": round(wrong.sentences, 4),
            "made_up_objects": round(wrong.instances, 4),
            "objects_a_caption": round(wrong.objects / wrong.captions, 2),
            "words": round(statistics.mean(len(text.split()) for text in texts), 1),
            "different": round(len(set(texts)) / len(texts), 3),
            "examples": texts[:5],
        }
        if judge is not None:
            result[name]["judged"] = round(float(judge.score(prompts, texts).mean()), 4)
    return result


def judges(settings: argparse.Namespace, source: SourceConfig) -> dict[str, Any]:
    ranked = [item for item in rank_captions(source) if isinstance(item, Preference)]
    result: dict[str, Any] = {"pictures": len(ranked), "pairs": sum(len(item.pairs) for item in ranked)}
    for name in settings.models:
        prompts = [item.prompt for item in ranked for _ in item.answers]
        scores = RewardModel.from_pretrained(name).score(prompts, [text for item in ranked for text in item.answers]).tolist()
        right = start = 0
        for item in ranked:
            right += sum(scores[start + better] > scores[start + worse] for better, worse in item.pairs)
            start += len(item.answers)
        result[name] = {"ranked_as_agreement_does": round(right / result["pairs"], 4)}
    return result


def ratings(settings: argparse.Namespace) -> dict[str, Any]:
    if settings.ratings is None:
        raise UsageError("ratings needs --ratings FILE: JSONL with image, caption and scores")
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
        model = RewardModel.from_pretrained(name)
        scores = model.score([[user(settings.question, [image])] for image, _, _ in rows], [text for _, text, _ in rows]).tolist()
        pairs = [(score, value) for score, (_, _, values) in zip(scores, rows) for value in values]
        result[name] = {"tau_c": round(100 * kendall_tau_c(*zip(*pairs)), 2)}
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "judges", "ratings"))
    parser.add_argument("models", nargs="+", help="run folders")
    parser.add_argument("--source", default="flickr8k.parquet", help="pictures with several captions each")
    parser.add_argument("--split", default=None)
    parser.add_argument("--limit", type=int, default=300, help="pictures")
    parser.add_argument("--candidates", type=int, default=6)
    parser.add_argument("--judge", help="a reward model that scores the captions")
    parser.add_argument("--ratings", type=Path)
    parser.add_argument("--question", default="Describe this image.")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    settings = parser.parse_args(arguments)
    source = SourceConfig(path=settings.source, split=settings.split, limit=settings.limit, question=settings.question)
    if settings.what == "ratings":
        result = ratings(settings)
    elif settings.what == "judges":
        source.candidates = settings.candidates
        result = judges(settings, source)
    else:
        result = answers(settings, source)
    print(json.dumps(result, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
