"""Samples into rows, rows into batches: whole samples only, and none of them sees another."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmgpt.data.template import Encoded

if TYPE_CHECKING:
    import torch


@dataclass
class Batch:
    """Rows of token ids with everything a forward pass needs. B rows, L tokens a row, M images of P patches.

    Args:
        input_ids: [B, L] long.
        position_ids: [B, L] long, counted from 0 in every sample.
        segment_ids: [B, L] long, 0 where there is padding, else 1, 2, ... for the samples of a row.
        targets: [B, L] long, the id to predict AT each position (the next token), -100 where nothing is learnt.
        images: Image references in the order of their placeholders (row by row), or features / pixels made of them.
        where: Which sample stands where, for messages about it.
        target_count: Supervised tokens that the loss is divided by; the whole accumulation's where there are several batches.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segment_ids: torch.Tensor
    targets: torch.Tensor
    images: Any
    where: list[str]
    target_count: int
    samples: int

    @property
    def tokens(self) -> int:
        return int((self.segment_ids > 0).sum())

    @property
    def supervised(self) -> int:
        return int((self.targets >= 0).sum())

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one sample (then attention needs a block mask, not just a causal one)."""
        return bool((self.segment_ids > 1).any())

    @property
    def separate(self) -> bool:
        """Whether no segment sees another, so that attention may go through them one by one."""
        return True

    def mask(self) -> torch.Tensor | None:
        """Who may see whom (`block_mask`); None where plain causal attention is right."""
        return block_mask(self.segment_ids) if self.packed else None

    def to(self, device: torch.device) -> Batch:
        import torch

        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return type(self)(**{**vars(self), **moved})


def balanced_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack samples into as few rows as their total allows, filled as evenly as can be.

    A batch is padded to its fullest row, so rows of equal length waste less than rows filled to the brim with one left over.
    Longest-processing-time-first (Graham 1969): longest sample first, each into the emptiest row; one more row where that
    overflows.

    Args:
        lengths: Tokens of each sample; none may exceed `capacity`.
        capacity: Tokens of a row.

    Returns:
        Rows as lists of indices; every index appears once.

    Raises:
        ValueError: a sample is longer than a row.
    """
    if max(lengths, default=0) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into a row of {capacity}")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = -(-sum(lengths) // capacity)
    while True:
        heap = [(0, row) for row in range(count)]
        rows: list[list[int]] = [[] for _ in range(count)]
        for index in order:
            filled, row = heapq.heappop(heap)
            rows[row].append(index)
            heapq.heappush(heap, (filled + lengths[index], row))
        if max((filled for filled, _ in heap), default=0) <= capacity:
            return [row for row in rows if row]
        count += 1


def plan_epoch(
    lengths: Sequence[int], *, batching: str, batch_size: int, row_length: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """Decide which samples meet in which batch of one epoch.

    `packed`: the epoch's shuffled samples are cut into windows of `batch_size` samples, and each window becomes one batch of
    rows of at most `row_length` tokens. `grouped`: windows of 50 batches are sorted by length, so that padding wastes little.

    Returns:
        Batches of rows of sample indices, a function of the arguments alone (that is what makes a resume exact).
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches: list[list[list[int]]] = []
    if batching == "packed":
        for start in range(0, len(order), batch_size):
            window = order[start : start + batch_size]
            rows = balanced_rows([lengths[i] for i in window], row_length)
            batches.append([[window[i] for i in row] for row in rows])
        return batches
    span = 50 * batch_size
    for start in range(0, len(order), span):
        window = sorted(order[start : start + span], key=lambda i: lengths[i])
        batches.extend([[i] for i in window[at : at + batch_size]] for at in range(0, len(window), batch_size))
    rng.shuffle(batches)
    return batches


def collate(
    rows: Sequence[Sequence[Encoded]], pad_id: int, *, where: Iterable[str] = (), target_count: int | None = None
) -> Batch:
    """Build a batch from rows of encoded samples.

    Positions restart in every sample, and the first token of a sample is nobody's target.

    Returns:
        A `Batch` whose `images` are still references.
    """
    import torch

    length = max(sum(len(sample) for sample in row) for row in rows)
    shape = (len(rows), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    segment_ids = torch.zeros(shape, dtype=torch.long)
    targets = torch.full(shape, -100, dtype=torch.long)
    images: list[Any] = []
    for row_index, row in enumerate(rows):
        at = 0
        for number, sample in enumerate(row, start=1):
            end = at + len(sample)
            ids = torch.tensor(sample.ids, dtype=torch.long)
            input_ids[row_index, at:end] = ids
            position_ids[row_index, at:end] = torch.arange(len(sample))
            segment_ids[row_index, at:end] = number
            learnt = torch.tensor(sample.supervised, dtype=torch.bool)
            targets[row_index, at : end - 1] = torch.where(learnt[1:], ids[1:], -100)
            images.extend(sample.images)
            at = end
    batch = Batch(input_ids, position_ids, segment_ids, targets, images, list(where), 0, sum(len(row) for row in rows))
    batch.target_count = batch.supervised if target_count is None else target_count
    return batch


def block_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Who may see whom: causal inside a sample, nothing across samples.

    Args:
        segment_ids: [B, L], 0 where there is padding.

    Returns:
        [B, 1, L, L] bool, True where query (row) may look at key (column). A padding token sees itself, so that no row of the
        softmax is empty (an empty one is NaN).
    """
    import torch

    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return (same & causal)[:, None]
