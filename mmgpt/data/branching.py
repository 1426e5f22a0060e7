"""Batches of prompts with several answers each: a prompt stands once, and all of its answers look back at it.

Letters in shapes: B rows, L tokens a row, N answers, P pairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmgpt.config import DataConfig
from mmgpt.data.features import ImageSource, merge_prepared
from mmgpt.data.loader import BatchLoader, open_images
from mmgpt.data.messages import Rejected
from mmgpt.data.packing import Batch, block_mask
from mmgpt.data.ranked import RankedItem
from mmgpt.data.rejections import RejectionReport


@dataclass
class PreferenceBatch(Batch):
    """A batch whose rows hold prompts, each followed by its answers.

    A prompt is a segment and so is each of its answers. Tokens of an answer see the prompt and their own answer, at the positions
    that they would have behind the prompt alone: the hidden states are those of one row an answer, and the prompt with its
    images is computed once (a causal model's prompt does not depend on what follows).

    Args:
        parent_ids: [B, L] long, in an answer the segment of its prompt, elsewhere 0.
        rows, columns: [N] long, where the end token of each answer stands.
        owners: [N] long, which prompt of the batch each answer is to.
        better, worse: [P] long, places among the N answers.
        weights: [P], what each pair counts: 1 / comparisons of its prompt.
        lengths: [N] long, tokens of each answer.
        token_rows, token_columns: [M] long, where the M tokens of all answers stand, those aside that they share with the prompt.
        token_sources: [M] long, in the same row the token whose state predicts each of them.
        token_answers: [M] long, the answer that each belongs to.
    """

    parent_ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    owners: torch.Tensor
    better: torch.Tensor
    worse: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor
    token_rows: torch.Tensor
    token_columns: torch.Tensor
    token_sources: torch.Tensor
    token_answers: torch.Tensor

    @property
    def separate(self) -> bool:
        return not self.packed

    def mask(self) -> torch.Tensor | None:
        return branch_mask(self.segment_ids, self.parent_ids) if self.packed else None


def branch_mask(segment_ids: torch.Tensor, parent_ids: torch.Tensor) -> torch.Tensor:
    """Who may see whom: causal inside a segment, and from a segment to its parent.

    Args:
        segment_ids: [B, L], 0 where there is padding.
        parent_ids: [B, L], the segment that a token's segment goes on from; 0 where there is none.

    Returns:
        [B, 1, L, L] bool, True where query (row) may look at key (column).
    """
    inherited = (parent_ids[:, :, None] == segment_ids[:, None, :]) & (parent_ids > 0)[:, :, None]
    return block_mask(segment_ids) | inherited[:, None]


def collate_answers(
    rows: Sequence[Sequence[RankedItem]], pad_id: int, *, share: bool = True, prompts: int | None = None
) -> PreferenceBatch:
    """Build a batch from rows of prompts with their answers.

    Args:
        rows: Prompts by row; no row leaves no token (then the batch holds one pad token and no answer).
        pad_id: Filler token.
        share: Let the answers to a prompt share it; otherwise each answer is a row of its own with a copy of the prompt, images
            included, whatever `rows` says.
        prompts: Prompts that the loss is divided by; None: those of this batch.

    Returns:
        A batch whose `images` are still references.
    """
    # A line of the batch as its segments: their tokens, the position of the first, and the segment they go on from.
    lines: list[list[tuple[list[int], int, int]]] = []
    images: list[Any] = []
    ends: list[tuple[int, int]] = []
    pairs: list[tuple[int, int, float]] = []
    lengths: list[int] = []
    owners: list[int] = []
    where: list[str] = []
    tokens_at: list[tuple[int, int, int, int]] = []
    for row in rows:
        if share:
            lines.append([])
        for item in row:
            first = len(ends)
            if share:
                lines[-1].append((item.shared, 0, 0))
                parent = len(lines[-1])
                source = _filled(lines[-1]) - 1
                images += item.images
            for branch in item.branches:
                if share:
                    lines[-1].append((branch, len(item.shared), parent))
                else:
                    lines.append([(item.shared + branch, 0, 0)])
                    images += item.images
                    source = len(item.shared) - 1
                end = _filled(lines[-1])
                for column in range(end - len(branch), end):
                    # The first token of an answer follows its prompt, wherever that stands; the others follow each other.
                    before = source if column == end - len(branch) else column - 1
                    tokens_at.append((len(lines) - 1, column, before, len(ends)))
                ends.append((len(lines) - 1, end - 1))
            weight = 1 / item.preference.compared
            pairs += [(first + better, first + worse, weight) for better, worse in item.preference.pairs]
            lengths += item.lengths
            owners += [len(where)] * len(item.branches)
            where.append(item.preference.where)
    shape = (max(1, len(lines)), max(map(_filled, lines), default=1))
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    position_ids, segment_ids, parent_ids = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
    for number, line in enumerate(lines):
        at = 0
        for segment, (tokens, start, parent) in enumerate(line, start=1):
            place = slice(at, at + len(tokens))
            input_ids[number, place] = torch.tensor(tokens, dtype=torch.long)
            position_ids[number, place] = torch.arange(start, start + len(tokens))
            segment_ids[number, place], parent_ids[number, place] = segment, parent
            at += len(tokens)
    count = len(where)
    return PreferenceBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        segment_ids=segment_ids,
        targets=torch.full(shape, -100, dtype=torch.long),
        images=images,
        where=where,
        target_count=count if prompts is None else prompts,
        samples=count,
        parent_ids=parent_ids,
        rows=torch.tensor([row for row, _ in ends], dtype=torch.long),
        columns=torch.tensor([column for _, column in ends], dtype=torch.long),
        owners=torch.tensor(owners, dtype=torch.long),
        better=torch.tensor([better for better, _, _ in pairs], dtype=torch.long),
        worse=torch.tensor([worse for _, worse, _ in pairs], dtype=torch.long),
        weights=torch.tensor([weight for _, _, weight in pairs], dtype=torch.float),
        lengths=torch.tensor(lengths, dtype=torch.long),
        token_rows=torch.tensor([place[0] for place in tokens_at], dtype=torch.long),
        token_columns=torch.tensor([place[1] for place in tokens_at], dtype=torch.long),
        token_sources=torch.tensor([place[2] for place in tokens_at], dtype=torch.long),
        token_answers=torch.tensor([place[3] for place in tokens_at], dtype=torch.long),
    )


def _filled(line: Sequence[tuple[list[int], int, int]]) -> int:
    """Tokens of a line's segments."""
    return sum(len(tokens) for tokens, _, _ in line)


class PreferenceLoader(BatchLoader):
    """`BatchLoader` of prompts with their answers: `data.batch_size` prompts a batch.

    Args:
        share: Let the answers to a prompt share it (`collate_answers`).
    """

    def __init__(
        self,
        items: Sequence[RankedItem],
        config: DataConfig,
        *,
        pad_id: int,
        images: ImageSource | None,
        report: RejectionReport,
        seed: int,
        share: bool = True,
        **more: Any,
    ):
        self.share = share
        super().__init__(items, config, pad_id=pad_id, images=images, report=report, seed=seed, **more)

    def measure(self) -> tuple[list[int], list[int]]:
        return [len(item) for item in self.items], [1] * len(self.items)

    def collate(
        self, rows: Sequence[Sequence[RankedItem]], rng: random.Random, divisor: int
    ) -> tuple[PreferenceBatch, list[Rejected]]:
        kept, opened, rejected = open_images(rows, self.images, rng, lambda item: (item.images, item.preference.where))
        batch = collate_answers(kept, self.pad_id, share=self.share, prompts=divisor)
        # An answer in a row of its own has its own copy of the prompt's images.
        pairs = zip((item for row in kept for item in row), opened)
        copies = [(part, 1 if self.share else len(item.branches)) for item, part in pairs if part is not None]
        batch.images = merge_prepared([part for part, count in copies for _ in range(count)])
        return batch, rejected
