"""Batches from sources that are read as they come: too large to index, or tars that can only be read forwards."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from mmgpt.config import DataConfig, SourceConfig
from mmgpt.data.features import ImageSource
from mmgpt.data.loader import Encode, Item, build_batch, make_item
from mmgpt.data.messages import Rejected
from mmgpt.data.packing import Batch, balanced_rows
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import read_source
from mmgpt.errors import UserError

SHUFFLE_BUFFER = 1000
"""Samples (text and image references, not pixels) among which the next one is drawn."""


class StreamLoader:
    """As many batches as the run has forwards; the sources start anew when they end.

    The order is a function of seed and sources, so the state is one number: batches given out. A resumed run reads up to there
    again, without opening images.

    Args:
        sources: What to read, one after the other in every pass.
        encode: Conversation -> ids.
        config: Batching and sizes; `packed` and `grouped` both work within one batch here.
        total: Batches of the whole run.
        pad_id, images, report, seed, accumulate, rank, world: As in `BatchLoader`.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        encode: Encode,
        config: DataConfig,
        *,
        total: int,
        max_length: int,
        pad_id: int,
        images: ImageSource | None,
        report: RejectionReport,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.sources = sources
        self.encode = encode
        self.config = config
        self.total = total
        self.max_length = max_length
        self.pad_id = pad_id
        self.images = images
        self.report = report
        self.seed = seed
        self.accumulate = accumulate
        self.rank, self.world = rank, world
        self.position = 0
        self.met = 0

    def __len__(self) -> int:
        return self.total

    def _samples(self) -> Iterator[Item]:
        """Usable samples without end, shuffled within a buffer."""
        rng = random.Random(f"stream/{self.seed}")
        buffer: list[Item] = []
        turn = 0
        while True:
            usable = 0
            for source in self.sources:
                for found in read_source(source, seed=self.seed + turn):
                    self.met += 1
                    item = found if isinstance(found, Rejected) else make_item(found, self.encode, self.max_length)
                    if isinstance(item, Rejected):
                        self._reject(item)
                        continue
                    usable += 1
                    buffer.append(item)
                    if len(buffer) > SHUFFLE_BUFFER:
                        yield buffer.pop(rng.randrange(len(buffer)))
            if usable == 0:
                raise UserError(f"no usable sample in {', '.join(source.path for source in self.sources)}")
            rng.shuffle(buffer)
            yield from buffer
            buffer = []
            turn += 1

    def _reject(self, rejected: Rejected) -> None:
        self.report.add(rejected)
        if self.met >= 200:  # a share of fewer says little
            self.report.check(self.met, self.config.max_bad)

    def __iter__(self) -> Iterator[Batch]:
        samples = self._samples()
        size = self.config.batch_size
        start = self.position
        for first in range(0, self.total, self.accumulate):
            # All ranks read all samples and keep their own: the count of targets in a step is then the same everywhere.
            step = [[next(samples) for _ in range(size)] for _ in range(self.accumulate * self.world)]
            targets = sum(sum(item.encoded.supervised[1:]) for window in step for item in window)
            for number, window in enumerate(step[self.rank :: self.world], start=first):
                if number < start or number >= self.total:
                    continue
                self.position = number + 1
                yield self._build(window, number, targets)

    def _build(self, window: Sequence[Item], number: int, targets: int) -> Batch:
        lengths = [len(item.encoded) for item in window]
        capacity = self.config.row_length or self.config.max_length
        packed = self.config.batching == "packed"
        rows = balanced_rows(lengths, capacity) if packed else [[i] for i in range(len(window))]
        rng = random.Random(f"{self.seed}/{number}/{self.rank}")
        batch, rejected = build_batch(
            [[window[i] for i in row] for row in rows], self.images, rng, pad_id=self.pad_id, target_count=targets
        )
        for sample in rejected:
            self._reject(sample)
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
