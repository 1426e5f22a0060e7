"""metrics.csv: one row a logged step, kept whole over a resume."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsFile(Logger):
    """Lightning logger that writes `path` and, unlike CSVLogger, goes on with the rows of the run it resumes.

    Rows of steps behind the checkpoint that a run resumes from are dropped: those steps are taken again.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None):
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, str]] = {}
        if resume_step is not None and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                self.rows = {int(row["step"]): dict(row) for row in csv.DictReader(file) if int(row["step"]) <= resume_step}

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
        if not self.rows:
            return
        columns = ["step", *sorted({name for row in self.rows.values() for name in row} - {"step"})]
        fresh = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        with open(fresh, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows({**row, "step": step} for step, row in sorted(self.rows.items()))
        os.replace(fresh, self.path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.csv as (step, value) pairs by name."""
    series: dict[str, list[tuple[int, float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    series.setdefault(name, []).append((int(row["step"]), float(value)))
    return series
