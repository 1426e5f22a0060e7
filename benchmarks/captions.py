"""Captions of models, measured against what people wrote about the same pictures.

    python benchmarks/captions.py runs/rlhf-image-captions runs/rlhf-image --source flickr8k.parquet --split val

Greedy captions of held-out pictures: how alike what people wrote (mean cosine of sentence embeddings), how many name an object
that nobody mentions (CHAIR_s) and how many of the named objects that is (CHAIR_i; Rohrbach et al. 2018), objects and words a
caption, and with `--judge RUN` the mean score of a reward model. Beside them, the first of people's captions against the
others. One JSON object on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import mmgpt
from mmgpt.config import SourceConfig
from mmgpt.data.candidates import Captioned, read_captioned
from mmgpt.data.messages import user
from mmgpt.data.objects import count_made_up
from mmgpt.data.similarity import SentenceEncoder
from mmgpt.errors import UserError, run_cli
from mmgpt.generate import Sampling
from mmgpt.model.heads import RewardModel

PEOPLE = "people"


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    source = SourceConfig(path=settings.source, split=settings.split, limit=settings.limit)
    pictures = [item for item in read_captioned(source) if isinstance(item, Captioned)]
    if not pictures:
        raise UserError(f"{settings.source} holds no picture with several captions")
    prompts = [[user(settings.question, [picture.image])] for picture in pictures]
    encoder = SentenceEncoder()
    counts = [len(picture.captions) for picture in pictures]
    references = encoder([text for picture in pictures for text in picture.captions]).split(counts)
    judge = RewardModel.from_pretrained(settings.judge) if settings.judge else None
    said: dict[str, list[str]] = {PEOPLE: [picture.captions[0] for picture in pictures]}
    for name in settings.models:
        found = mmgpt.load(name).generate(prompts, sampling=Sampling(max_new_tokens=settings.max_new_tokens))
        said[name] = [answer.text for answer in found]
    result: dict[str, Any] = {"pictures": len(pictures)}
    for name, texts in said.items():
        # A person's caption is compared with the others, not with itself.
        first = 1 if name == PEOPLE else 0
        alike = [float((others[first:] @ vector).mean()) for others, vector in zip(references, encoder(texts))]
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="run folders")
    parser.add_argument("--source", default="flickr8k.parquet", help="pictures with several captions each")
    parser.add_argument("--split", default=None)
    parser.add_argument("--limit", type=int, default=300, help="pictures")
    parser.add_argument("--judge", help="a reward model that scores the captions")
    parser.add_argument("--question", default="Describe this image.")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    print(json.dumps(measure(parser.parse_args(arguments)), indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
