"""Prompts to be answered: what remains of any source when the answers are left away, a few for each iteration."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mmgpt.config import SourceConfig
from mmgpt.data.images import ImageError, open_image
from mmgpt.data.messages import Message, MessageError, Rejected, Sample, images_of
from mmgpt.data.preferences import asked_in
from mmgpt.data.ranked import prompt_key
from mmgpt.data.readers import Row
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import MADE_UP, check_counts, read_rows, read_source, samples_of
from mmgpt.data.template import Encoded


@dataclass(frozen=True)
class Prompt:
    """A conversation whose next turn is the assistant's, and where it came from."""

    messages: list[Message]
    where: str


def read_prompts(source: SourceConfig, seed: int = 0) -> Iterator[Prompt | Rejected]:
    """The prompts of a source in its order: of conversations, captions, preferences, or rows with a `prompt`.

    Raises:
        UsageError: where the path, a column, the split is not there.
    """
    check_counts(source)
    if source.path in MADE_UP and not os.path.exists(source.path):
        for sample in read_source(source, seed=seed):
            yield _before_answer(sample) if isinstance(sample, Sample) else sample
        return
    count = 0
    for row in read_rows(source):
        for found in [row] if isinstance(row, Rejected) else prompts_of(row, source, seed):
            if isinstance(found, Prompt):
                if count == source.limit:
                    return
                count += 1
            yield found


def prompts_of(row: Row, source: SourceConfig, seed: int) -> Iterator[Prompt | Rejected]:
    """The prompts of one row: one, or one a sample where it holds several."""
    try:
        asked = asked_in(row)
    except MessageError as error:
        yield Rejected(error.reason, row.where, str(error))
        return
    if asked is not None:
        yield Prompt(asked, row.where)
        return
    for sample in samples_of(row, source, str(seed)):
        yield _before_answer(sample) if isinstance(sample, Sample) else sample


def _before_answer(sample: Sample) -> Prompt | Rejected:
    last = max(place for place, message in enumerate(sample.messages) if message["role"] == "assistant")
    if not any(message["role"] == "user" for message in sample.messages[:last]):
        return Rejected("empty_prompt", sample.where, "nobody asks anything before the answer")
    return Prompt(list(sample.messages[:last]), sample.where)


def load_prompts(
    sources: Sequence[SourceConfig],
    encode: Callable[..., Encoded],
    *,
    max_length: int,
    report: RejectionReport,
    seed: int,
) -> tuple[list[Prompt], int]:
    """Read sources whole, each prompt once, however many answers there are to it. Pictures are opened, to know that they can be.

    Args:
        sources: What to read.
        encode: `MultimodalGPT.encode`.
        max_length: Tokens that a prompt may have, so that an answer fits behind it.
        report: Takes what cannot be used.
        seed: Draws one of several questions.

    Returns:
        The prompts, and how many rows there were in all.
    """
    found: dict[str, Prompt] = {}
    total = 0
    for source in sources:
        for prompt in read_prompts(source, seed):
            total += 1
            if isinstance(prompt, Prompt) and prompt_key(prompt.messages) not in found:
                checked = _checked(prompt, encode, max_length)
                if isinstance(checked, Prompt):
                    found[prompt_key(prompt.messages)] = checked
                else:
                    report.add(checked)
            elif isinstance(prompt, Rejected):
                report.add(prompt)
    return list(found.values()), total


def _checked(prompt: Prompt, encode: Callable[..., Encoded], max_length: int) -> Prompt | Rejected:
    try:
        length = len(encode(prompt.messages, prompt=True))
        for image in images_of(prompt.messages):
            open_image(image)
    except (MessageError, ImageError) as error:
        return Rejected(getattr(error, "reason", "broken_image"), prompt.where, str(error))
    if length > max_length:
        return Rejected("too_long", prompt.where, f"the prompt has {length} tokens, there is room for {max_length}")
    return prompt


class PromptLoader:
    """The prompts of one iteration after another: all of them in random order, then all again in another.

    Its state is one number, so that a resumed run sees the prompts that were left.

    Args:
        prompts: The prompts.
        iterations: How many there will be.
        batch_size: Prompts of an iteration on this process.
        seed: Of the order.
        rank, world: This process and how many there are; each takes its share of every iteration.
    """

    def __init__(self, prompts: Sequence[Prompt], iterations: int, batch_size: int, *, seed: int, rank: int = 0, world: int = 1):
        self.prompts = prompts
        self.iterations = iterations
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world = rank, world
        self.position = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self) -> Iterator[list[Prompt]]:
        while self.position < self.iterations:
            self.position += 1
            yield self.batch(self.position - 1)

    def batch(self, iteration: int) -> list[Prompt]:
        """The prompts of an iteration, counted from 0."""
        start = (iteration * self.world + self.rank) * self.batch_size
        return [self.prompts[self._place(number)] for number in range(start, start + self.batch_size)]

    def _place(self, number: int) -> int:
        turn, place = divmod(number, len(self.prompts))
        if self._order[0] != turn:
            order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{turn}").shuffle(order)
            self._order = turn, order
        return self._order[1][place]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
