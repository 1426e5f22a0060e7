"""From sources to batches: read, encode, plan, collate; an epoch can be taken up again at any batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

from mmgpt.config import DataConfig, SourceConfig
from mmgpt.data.features import ImageSource, Prepared, merge_prepared
from mmgpt.data.images import ImageError, image_key
from mmgpt.data.messages import LazyImage, Message, MessageError, Rejected, Sample, normalize
from mmgpt.data.packing import Batch, collate, plan_epoch
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import read_source
from mmgpt.data.split import hold_out
from mmgpt.data.template import Encoded
from mmgpt.errors import UserError

Encode = Callable[[Sequence[Message]], Encoded]
T = TypeVar("T")


@dataclass
class Item:
    """A sample ready for batches, with the conversation it was made of."""

    sample: Sample
    encoded: Encoded


def load_items(
    sources: Sequence[SourceConfig], encode: Encode, *, max_length: int, report: RejectionReport, seed: int
) -> tuple[list[Item], int]:
    """Read and encode sources whole.

    Returns:
        The usable samples and how many there were in all; the others are in `report`.
    """
    items: list[Item] = []
    total = 0
    for source in sources:
        for found in read_source(source, seed=seed):
            total += 1
            item = found if isinstance(found, Rejected) else make_item(found, encode, max_length)
            if isinstance(item, Rejected):
                report.add(item)
            else:
                items.append(item)
    return items, total


def make_item(sample: Sample, encode: Encode, max_length: int) -> Item | Rejected:
    """Encode one sample, or say why it cannot be learnt from."""
    try:
        encoded = encode(normalize(sample.messages, supervised=True))
    except MessageError as error:
        return Rejected(error.reason, sample.where, str(error))
    if len(encoded) > max_length:
        limits = "data.max_length, data.row_length and the language model's window"
        return Rejected("too_long", sample.where, f"{len(encoded)} tokens; {limits} leave room for {max_length}")
    return Item(sample, encoded)


def split_holdout(items: list[Item], share: float, seed: int, fold: int = 0) -> tuple[list[Item], list[Item]]:
    """Set a share of the samples aside for validation; samples with the same image or conversation start stay together."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(_origin(item.sample), []).append(item)
    train, held = ([item for name in side for item in groups[name]] for side in hold_out(groups, share, seed, fold))
    return train, held


def build_batch(
    rows: Sequence[Sequence[Item]], images: ImageSource | None, rng: random.Random, *, pad_id: int, target_count: int
) -> tuple[Batch, list[Rejected]]:
    """Open the images of a batch's samples and collate what is usable.

    Args:
        rows: Samples by row.
        images: Opens images, looks features up; None for text alone.
        rng: Draws augmentations.
        pad_id: Filler token.
        target_count: What the loss of the batch is divided by.

    Returns:
        The batch, and the samples left out because an image is broken. Where nothing is left, the batch holds one pad token and
        no target: it takes its place among the batches of its step, and every rank takes as many.
    """
    kept, prepared, rejected = open_images(rows, images, rng, lambda item: (item.encoded.images, item.sample.where))
    if not kept:
        blank = collate([[Encoded([pad_id], [False], [])]], pad_id, target_count=target_count)
        blank.images, blank.samples = merge_prepared([]), 0
        return blank, rejected
    where = [item.sample.where for row in kept for item in row]
    batch = collate([[item.encoded for item in row] for row in kept], pad_id, where=where, target_count=target_count)
    if batch.supervised == 0:
        raise UserError(f"no supervised token in a batch ({', '.join(where[:3])}): nothing can be learnt from it")
    batch.images = merge_prepared([part for part in prepared if part is not None])
    return batch, rejected


def open_images(
    rows: Sequence[Sequence[T]],
    images: ImageSource | None,
    rng: random.Random,
    describe: Callable[[T], tuple[Sequence[Any], str]],
) -> tuple[list[list[T]], list[Prepared | None], list[Rejected]]:
    """Open the images of samples, and leave out the samples whose images are broken.

    Args:
        rows: Samples by row.
        images: Opens images, looks features up; None opens nothing.
        rng: Draws augmentations.
        describe: A sample's images, and its place for messages.

    Returns:
        The rows that are left; for each of their samples in order what was opened (None: no image); and the samples left out.
    """
    kept: list[list[T]] = []
    prepared: list[Prepared | None] = []
    rejected: list[Rejected] = []
    for row in rows:
        usable = []
        for item in row:
            references, where = describe(item)
            try:
                opened = images.prepare(references, rng) if references and images is not None else None
            except UserError as error:
                rejected.append(Rejected(getattr(error, "reason", "broken_image"), where, str(error)))
            else:
                usable.append(item)
                prepared.append(opened)
        if usable:
            kept.append(usable)
    return kept, prepared, rejected


def _origin(sample: Sample) -> str:
    """What tells a sample's first image from others, the same in every process; where there is none, the sample's own place."""
    if not sample.images:
        return sample.where
    first = sample.images[0]
    if isinstance(first, str | PurePath | LazyImage):
        return first.name if isinstance(first, LazyImage) and not isinstance(first, PurePath) else str(first)
    try:
        return image_key(first)
    except ImageError:
        return sample.where


class BatchLoader:
    """Batches of one epoch after another, in an order that is a function of seed and epoch alone.

    Its state is two numbers (epoch, batches already given out), so a resumed run sees just the batches that were left.

    Args:
        items: The samples.
        config: Batching, sizes, workers.
        pad_id: Filler token.
        images: Opens images, looks features up.
        report: Where samples whose image turns out to be broken are counted.
        seed: Seeds the order.
        shuffle: False keeps one fixed order (validation).
        accumulate: Batches of one optimizer step: their losses share one divisor.
        rank, world: This process and how many there are; each takes its share of every step.
    """

    def __init__(
        self,
        items: Sequence[Any],
        config: DataConfig,
        *,
        pad_id: int,
        images: ImageSource | None,
        report: RejectionReport,
        seed: int,
        shuffle: bool = True,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.items = items
        self.config = config
        self.pad_id = pad_id
        self.images = images
        self.report = report
        self.seed = seed
        self.shuffle = shuffle
        self.accumulate = accumulate
        self.rank, self.world = rank, world
        self.epoch = 0
        self.position = 0
        self.lengths, self.weights = self.measure()
        self._plans: dict[int, list[list[list[int]]]] = {}

    def measure(self) -> tuple[list[int], list[int]]:
        """Of each sample: the tokens it takes in a row, and what it adds to the divisor of its step's loss."""
        encoded = [item.encoded for item in self.items]
        return [len(sample) for sample in encoded], [sum(sample.supervised[1:]) for sample in encoded]

    def _plan(self, epoch: int) -> list[list[list[int]]]:
        """All ranks' batches of an epoch; a remainder that would leave ranks without work is dropped in training."""
        if epoch not in self._plans:
            batches = plan_epoch(
                self.lengths,
                batching=self.config.batching,
                batch_size=self.config.batch_size,
                row_length=max(self.config.row_length or self.config.max_length, *self.lengths, 0),
                seed=self.seed,
                epoch=epoch if self.shuffle else 0,
            )
            if self.shuffle and self.world > 1:
                batches = batches[: len(batches) // self.world * self.world]
            self._plans = {epoch: batches}
        return self._plans[epoch]

    def __len__(self) -> int:
        """Batches of one epoch on this rank."""
        return len(self._plan(self.epoch)[self.rank :: self.world])

    def __iter__(self) -> Iterator[Batch]:
        import torch
        from torch.utils.data import DataLoader

        if self.position >= len(self):
            # The last epoch was given out whole, but nobody asked for a batch behind its end.
            self.epoch, self.position = self.epoch + 1, 0
        plan, epoch = self._plan(self.epoch), self.epoch
        jobs = [(epoch, number) for number in range(self.rank, len(plan), self.world)][self.position :]
        workers = self.config.workers
        # A generator of its own: by default DataLoader draws a seed from the global one, which a resumed run must not.
        loader: Any = DataLoader(
            _Jobs(self, jobs),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),
        )
        for batch, rejected in loader:
            for sample in rejected:
                self.report.add(sample)
            if rejected:
                self.report.check(len(self.items), self.config.max_bad)
            self.position += 1
            yield batch

    def build(self, epoch: int, number: int) -> tuple[Batch, list[Rejected]]:
        """Batch `number` of an epoch, and the samples that had to be left out of it."""
        plan = self._plan(epoch)
        group = self.accumulate * self.world
        step = plan[number // group * group : (number // group + 1) * group]
        rows = [[self.items[index] for index in row] for row in plan[number]]
        divisor = sum(self.weights[index] for rows in step for row in rows for index in row)
        return self.collate(rows, random.Random(f"{self.seed}/{epoch}/{number}"), divisor)

    def collate(
        self, rows: Sequence[Sequence[Any]], rng: random.Random, divisor: int
    ) -> tuple[Batch, list[Rejected]]:
        """A batch of rows of samples, and the samples that had to be left out of it."""
        return build_batch(rows, self.images, rng, pad_id=self.pad_id, target_count=divisor)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class _Jobs:
    """The batches still to build, as a map-style data set."""

    def __init__(self, loader: BatchLoader, jobs: list[tuple[int, int]]):
        self.loader, self.jobs = loader, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[Batch, list[Rejected]]:
        return self.loader.build(*self.jobs[index])
