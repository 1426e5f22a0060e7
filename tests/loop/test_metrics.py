"""metrics.csv: rows kept over a resume, written whole."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mmgpt.errors import UserError
from mmgpt.loop.metrics import MetricsFile, read_metrics


def test_rows_merge_by_step_and_columns_grow(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.log_metrics({"train/loss": 2.0}, 0)
    metrics.log_metrics({"train/loss": 1.0}, 1)
    metrics.log_metrics({"val/loss": 1.5}, 1)
    metrics.flush()
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"step": "0", "train/loss": "2", "val/loss": ""},
            {"step": "1", "train/loss": "1", "val/loss": "1.5"},
        ]
    assert read_metrics(tmp_path / "metrics.csv") == {"train/loss": [(0, 2.0), (1, 1.0)], "val/loss": [(1, 1.5)]}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_resume_keeps_the_steps_that_were_taken_and_drops_the_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path)
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step)
    first.finalize("failed")
    resumed = MetricsFile(path, resume_step=4)  # four steps taken: rows 0 to 3
    resumed.log_metrics({"train/loss": 40.0}, 4)
    resumed.flush()
    assert read_metrics(path)["train/loss"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert not MetricsFile(path).rows  # a new run starts anew


def test_the_file_is_not_written_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("mmgpt.loop.metrics.time.monotonic", lambda: now)
    metrics = MetricsFile(tmp_path / "metrics.csv")
    for step in range(3):
        metrics.log_metrics({"x": 1.0}, step)
        metrics.save()
    assert len(read_metrics(tmp_path / "metrics.csv")["x"]) == 1
    now = 110.0
    metrics.save()
    assert len(read_metrics(tmp_path / "metrics.csv")["x"]) == 3


def test_a_disk_that_refuses_is_one_message(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "gone" / "metrics.csv")
    metrics.log_metrics({"x": 1.0}, 0)
    with pytest.raises(UserError, match=r"cannot write .*metrics\.csv"):
        metrics.flush()
    metrics.finalize("failed")  # must not hide what made the run fail
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a metrics file"):
        MetricsFile(tmp_path / "other.csv", resume_step=3)
