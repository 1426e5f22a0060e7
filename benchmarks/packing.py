"""Packed rows against padded batches: training throughput on conversations as long as Flickr8k's captions make them.

    python benchmarks/packing.py [--samples 256] [--rounds 3] [--image_tokens 49] [--turns 5]

Three ways to batch the same samples, the same model, the same features: `packed` (whole samples packed into rows, attention
blocked between them), `padded` (the ordinary way: shuffled, every batch padded to its longest sample) and `grouped` (batches of
like length). They take turns, and the best epoch of each counts. Only real tokens are counted, so that tokens a second compare as
samples a second do. Before it starts, the loss of the first batch is computed packed and padded: they must be equal.
One JSON object on stdout; progress on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from typing import Any

import torch

from mmgpt import machine
from mmgpt.config import LanguageConfig, ModelConfig, OptimizerConfig, PartRates
from mmgpt.data.packing import Batch, collate, plan_epoch
from mmgpt.data.template import Encoded
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.model.language import load_language, load_tokenizer
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.model.projector import Projector, make_projector
from mmgpt.stages.optimizer import freeze, make_optimizer

CAPTION_TOKENS = {
    2: 5, 3: 19, 4: 111, 5: 367, 6: 799, 7: 1822, 8: 2552, 9: 2963, 10: 3478, 11: 3524, 12: 3629, 13: 3283, 14: 2920, 15: 2404,
    16: 1842, 17: 1440, 18: 1052, 19: 831, 20: 556, 21: 445, 22: 277, 23: 206, 24: 134, 25: 98, 26: 71, 27: 57, 28: 36, 29: 28,
    30: 12, 31: 10, 32: 8, 33: 6, 34: 6, 35: 3, 36: 3, 38: 2, 43: 1,
}  # fmt: skip
"""Captions by length in tokens of SmolLM2: the 35,000 captions of 7,000 Flickr8k photographs, counted."""

QUESTIONS = ["Describe this image.", "What is in this photograph?", "Write a caption.", "What else do you see?", "Go on."]
PATCHES, WIDTH = (14, 14), 768  # of CLIP ViT-B/16
PROJECTORS = {196: ("mlp2x_gelu", 1), 49: ("pixel_shuffle", 2), 4: ("pixel_shuffle", 7)}


class Conversations:
    """Samples of one image and 1 to `turns` questions, answered by captions: lengths from the histogram, random tokens."""

    def __init__(self, tokenizer: Tokenizer, count: int, image_tokens: int, turns: int, seed: int):
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        self.samples = [self._sample(image_tokens, turns) for _ in range(count)]
        # In half precision, as the feature cache keeps them.
        features = torch.randn(count, PATCHES[0] * PATCHES[1], WIDTH, generator=torch.Generator().manual_seed(seed))
        self.features = features.half()

    def _sample(self, image_tokens: int, turns: int) -> Encoded:
        control, encode = self.tokenizer.control, self.tokenizer.encode
        opened, closed, line = control("<|im_start|>"), control("<|im_end|>"), encode("\n")
        number = self.rng.randint(1, turns)
        answers = self.rng.choices(list(CAPTION_TOKENS), weights=list(CAPTION_TOKENS.values()), k=number)
        ids: list[int] = []
        supervised: list[bool] = []

        def add(tokens: list[int], learnt: bool = False) -> None:
            ids.extend(tokens)
            supervised.extend([learnt] * len(tokens))

        for turn, length in enumerate(answers):
            image = [] if turn else [self.tokenizer.image_id] * image_tokens
            add([opened, *encode("user\n"), *image, *encode(QUESTIONS[turn % len(QUESTIONS)]), closed, *line])
            add([opened, *encode("assistant\n")])
            add([*(self.rng.randrange(1000, 40000) for _ in range(length)), closed], learnt=True)
            add(line)
        return Encoded(ids, supervised, [])

    def batch(self, rows: list[list[int]]) -> Batch:
        """Collate rows of sample numbers, features in place."""
        batch = collate([[self.samples[index] for index in row] for row in rows], self.tokenizer.pad_id)
        batch.images = self.features[[index for row in rows for index in row]]
        return batch


def build(options: argparse.Namespace) -> MultimodalGPT:
    """Language model and projector; the encoder is left out, its features are there already."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings = LanguageConfig()
    tokenizer = load_tokenizer(settings)
    language: Any = load_language(settings, tokenizer)
    if options.layers:
        language.model.layers = language.model.layers[: options.layers]
        language.config.num_hidden_layers = len(language.model.layers)
    kind, factor = PROJECTORS[options.image_tokens]
    config = ModelConfig(vision=None)
    config.projector.kind, config.projector.factor = kind, factor  # type: ignore[assignment]
    torch.manual_seed(0)
    projector: Projector = make_projector(config.projector, grid=PATCHES, width=WIDTH, hidden=language.config.hidden_size)
    return MultimodalGPT(config, tokenizer, language, None, projector)


def plans(data: Conversations, options: argparse.Namespace, epoch: int) -> dict[str, list[list[list[int]]]]:
    """Batches of rows of samples for each way of batching; `padded` has the samples of `packed` in the same batches."""
    lengths = [len(sample) for sample in data.samples]
    common: dict[str, Any] = dict(batch_size=options.batch_size, row_length=options.row_length, seed=0, epoch=epoch)
    packed = plan_epoch(lengths, batching="packed", **common)
    return {
        "packed": packed,
        "padded": [[[index] for row in batch for index in row] for batch in packed],
        "grouped": plan_epoch(lengths, batching="grouped", **common),
    }


class Training:
    """Steps of the stage `instruct` (or `align`) without a loop around them."""

    def __init__(self, model: MultimodalGPT, stage: str, bf16: bool):
        self.model = model
        self.bf16 = bf16
        # Too small a rate to change anything: every epoch does the same work on the same weights.
        rates = {"vision": 0.0, "projector": 1e-8, "language": 1e-8 if stage == "instruct" else 0.0}
        freeze(model, rates)
        if bf16 and stage == "align":
            model.language.to(torch.bfloat16)
        config = OptimizerConfig(lr=PartRates(**rates))
        self.optimizer, _ = make_optimizer(model, config, rates, total_steps=1)

    def loss(self, batch: Batch) -> torch.Tensor:
        automatic = torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with automatic:
            return self.model.loss(batch).loss / batch.target_count

    def epoch(self, data: Conversations, plan: list[list[list[int]]]) -> float:
        """Train on every batch once; returns the seconds, collating included."""
        started = time.perf_counter()
        for rows in plan:
            self.loss(data.batch(rows)).backward()
            torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started


def check(model: MultimodalGPT, data: Conversations, ways: dict[str, list[list[list[int]]]]) -> float:
    """The largest relative difference between the first batch's loss packed and padded. Stops where they are not equal."""
    with torch.no_grad():
        packed, padded = (float(model.loss(data.batch(ways[name][0])).loss) for name in ("packed", "padded"))
    difference = abs(packed - padded) / padded
    if difference > 1e-4:
        raise SystemExit(f"the loss of the first batch is {packed:.5f} packed and {padded:.5f} padded: not the same computation")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5, help="most questions about one image")
    parser.add_argument("--image_tokens", type=int, choices=PROJECTORS, default=49)
    parser.add_argument("--batch_size", type=int, default=16, help="samples of a batch, in all three ways")
    parser.add_argument("--row_length", type=int, default=512, help="tokens of a packed row at most")
    parser.add_argument("--stage", choices=("instruct", "align"), default="instruct")
    parser.add_argument("--layers", type=int, help="keep only the first layers of the language model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    machine.set_threads(options.threads)
    bf16 = machine.pick_precision(options.precision, torch.device("cpu")) == "bf16-mixed"
    model = build(options)
    data = Conversations(model.tokenizer, options.samples, options.image_tokens, options.turns, seed=0)
    lengths = [len(sample) for sample in data.samples]
    difference = check(model, data, plans(data, options, 0))
    training = Training(model, options.stage, bf16)
    found: dict[str, dict[str, float]] = {}
    for turn in range(options.rounds):
        ways = plans(data, options, turn)
        if turn == 0:
            training.epoch(data, ways["padded"][:1])  # warms up
        for name, plan in ways.items():
            places = sum(len(rows) * max(sum(lengths[i] for i in row) for row in rows) for rows in plan)
            seconds = training.epoch(data, plan)
            speed = options.samples / seconds
            share = sum(lengths) / places
            print(f"round {turn}: {name} {speed:.2f} samples/s, {share:.1%} real tokens", file=sys.stderr, flush=True)
            if name not in found or speed > found[name]["samples_per_second"]:
                found[name] = {
                    "samples_per_second": speed,
                    "tokens_per_second": sum(lengths) / seconds,
                    "real_tokens": share,
                }
    speeds = {name: row["samples_per_second"] for name, row in found.items()}
    report = {
        **{name: {key: round(value, 3) for key, value in row.items()} for name, row in found.items()},
        "ratio": {
            "packed_over_padded": round(speeds["packed"] / speeds["padded"], 2),
            "packed_over_grouped": round(speeds["packed"] / speeds["grouped"], 2),
            "grouped_over_padded": round(speeds["grouped"] / speeds["padded"], 2),
        },
        "loss_difference": difference,
        "tokens_per_sample": {"mean": round(sum(lengths) / len(lengths), 1), "min": min(lengths), "max": max(lengths)},
        "stage": options.stage,
        "precision": "bf16" if bf16 else "fp32",
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
