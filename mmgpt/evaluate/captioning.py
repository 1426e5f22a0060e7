"""Answers to held-out questions: shown while training runs, and counted when it is over."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import lightning as L

from mmgpt.config import EvaluateConfig
from mmgpt.data.messages import Message, text_of

if TYPE_CHECKING:
    from torch import Tensor

    from mmgpt.data.features import ImageSource
    from mmgpt.data.loader import Item
    from mmgpt.model.multimodal import MultimodalGPT


@dataclass(frozen=True)
class Answered:
    """A held-out sample with the model's answer beside the reference."""

    messages: list[Message]
    where: str
    reference: str
    answer: str

    @property
    def exact(self) -> bool:
        return fold(self.answer) == fold(self.reference)


@dataclass(frozen=True)
class Score:
    """Share of exact answers."""

    correct: int
    total: int

    @property
    def share(self) -> float:
        return self.correct / max(1, self.total)

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval of the share (Wilson 1927), 95 % by default."""
        n, p = max(1, self.total), self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / (1 + z * z / n)
        return middle - half, middle + half


def fold(text: str) -> str:
    """What counts as the same answer: case, spacing and punctuation at the ends aside."""
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    return re.sub(r"\s+", " ", text).strip(" .!,;:\"'")


def prompt_of(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """Split a conversation before its last answer: what is asked, and the reference."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return list(messages[:last]), text_of(messages[last])


def answer_items(
    model: MultimodalGPT, items: Sequence[Item], config: EvaluateConfig, *, images: ImageSource | None = None
) -> list[Answered]:
    """Let the model answer samples freely and greedily.

    Args:
        model: The model.
        items: Samples with a reference answer.
        config: Length limit and batch size.
        images: Where features of a frozen encoder come from, if they are cached.
    """
    from mmgpt.generate import Sampling, generate

    pairs = [prompt_of(item.sample.messages) for item in items]
    before = model.image_source
    # A frozen encoder's features are asked for with references only, and always there.
    model.image_source = cast("Callable[[Sequence[Any]], Tensor]", images) if images is not None and images.frozen else None
    try:
        sampling = Sampling(max_new_tokens=config.max_new_tokens)
        answers = generate(model, [prompt for prompt, _ in pairs], sampling, batch_size=config.batch_size)
    finally:
        model.image_source = before
    return [
        Answered(item.sample.messages, item.sample.where, reference, answer.text)
        for item, (_, reference), answer in zip(items, pairs, answers)
    ]


def exact_match(
    model: MultimodalGPT, items: Sequence[Item], config: EvaluateConfig, *, images: ImageSource | None = None
) -> tuple[Score, list[Answered]]:
    """Share of answers that equal the reference (`fold`), on at most `config.final` samples spread over all."""
    chosen = list(items)
    if config.final is not None and len(chosen) > config.final:
        chosen = [chosen[i * len(chosen) // config.final] for i in range(config.final)]
    answered = answer_items(model, chosen, config, images=images)
    return Score(sum(answer.exact for answer in answered), len(answered)), answered


class SampleAnswers(L.Callback):
    """Prints the model's answers to a few validation samples after each validation."""

    def __init__(self, items: Sequence[Item], config: EvaluateConfig):
        count = min(len(items), config.generate)
        self.items = [items[i * len(items) // count] for i in range(count)]
        self.config = config

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Under FSDP a rank holds a shard of the weights: generation would need all ranks at every token.
        if trainer.sanity_checking or not trainer.is_global_zero or "fsdp" in type(trainer.strategy).__name__.lower():
            return
        stage: Any = pl_module
        model: MultimodalGPT = stage.model
        training = {name: module.training for name, module in model.named_children()}
        model.eval()
        for answered in answer_items(model, self.items, self.config, images=stage.images):
            print(f"  {answered.where}: {answered.answer!r}  (reference {answered.reference!r})", file=sys.stderr)
        for name, was in training.items():
            getattr(model, name).train(was)
