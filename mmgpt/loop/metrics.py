"""metrics.csv: one row a logged step, kept whole over a resume."""

from __future__ import annotations

import csv
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mmgpt.errors import UserError

SECONDS_BETWEEN_WRITES = 2.0
"""The file is written whole, so that it is whole whenever it is read; doing that every step would grow slow."""


class MetricsFile(Logger):
    """Lightning logger that writes `path` and, unlike CSVLogger, goes on with the rows of the run it resumes.

    The row `step` holds what was measured in the optimizer step number `step`, counted from 0, and in the validation after
    it. Rows of steps that the checkpoint does not know of are dropped: those steps are taken again.

    Args:
        path: The file.
        resume_step: Optimizer steps that the checkpoint holds; None starts a new file.

    Raises:
        UserError: the file to go on with cannot be read.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None):
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, str]] = {}
        self._written = float("-inf")
        if resume_step is not None and path.is_file():
            try:
                with open(path, newline="", encoding="utf-8") as file:
                    rows = {int(row["step"]): dict(row) for row in csv.DictReader(file)}
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path} is not a metrics file of this project: {error!r}; move it away") from error
            self.rows = {step: row for step, row in rows.items() if step < resume_step}

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run folder holds config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = self.rows.setdefault(int(step or 0), {})
        row.update({name: f"{value:.6g}" for name, value in metrics.items()})

    @rank_zero_only
    def save(self) -> None:
        """Write the file, unless that was done a moment ago (Lightning calls this after every step)."""
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write the file now. Raises UserError where the disk refuses."""
        if not self.rows:
            return
        columns = ["step", *sorted({name for row in self.rows.values() for name in row} - {"step"})]
        fresh = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        try:
            with open(fresh, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows({**row, "step": step} for step, row in sorted(self.rows.items()))
            os.replace(fresh, self.path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise UserError(f"cannot write {self.path}: {error.strerror or error} (is the disk full?)") from error
        self._written = time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        try:
            self.flush()
        except UserError:
            if status == "success":
                raise
            # What made the run fail is the message to show.


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.csv as (step, value) pairs by name."""
    series: dict[str, list[tuple[int, float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    series.setdefault(name, []).append((int(row["step"]), float(value)))
    return series
