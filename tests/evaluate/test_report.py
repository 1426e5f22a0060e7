"""Plots, samples.md and its pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmgpt.config import RunConfig
from mmgpt.data.messages import assistant, user
from mmgpt.evaluate.captioning import Answered, Score
from mmgpt.evaluate.report import _smooth, plot_metrics, write_report
from mmgpt.loop.metrics import MetricsFile


def metrics(folder: Path, steps: int) -> None:
    file = MetricsFile(folder / "metrics.csv")
    for step in range(steps):
        file.log_metrics({"train/loss": 5.0 / (step + 1), "train/accuracy": step / steps}, step)
    file.log_metrics({"val/loss": 1.0, "val/token_accuracy": 0.5}, steps - 1)
    file.flush()


def answered(folder: Path, count: int) -> list[Answered]:
    samples = []
    for number in range(count):
        picture = folder / f"in{number}.png"
        Image.new("RGB", (900, 30), (number, 0, 0)).save(picture)
        question = user("What\nis *this*?", [str(picture)])
        samples.append(Answered([question, assistant("red")], f"s{number}", "red", "red" if number % 2 else "blue\n\ngreen"))
    return samples


def test_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    metrics(run, 30)
    pictures = write_report(run, answered(tmp_path, 10), RunConfig(), score=Score(5, 10), seconds=12)
    assert pictures == [run / "examples" / f"{number}.jpg" for number in range(1, 9)]
    assert {path.name for path in run.iterdir()} == {"metrics.csv", "loss.png", "accuracy.png", "samples.md", "examples"}
    text = (run / "samples.md").read_text()
    assert "5 of 10 held-out answers are exact: **50.0%**" in text
    # Every link leads somewhere, and no line break of an answer ends its quotation.
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(links) == 10 and all((run / link).is_file() for link in links)
    assert "> blue green\n\nReference: red" in text and "> red\n\nExact: red" in text and "**What is *this*?**" in text
    for picture in pictures:
        with Image.open(picture) as image:
            assert max(image.size) <= 512


@pytest.mark.parametrize("steps", [1, 3, 200])
def test_plots_of_short_and_long_runs(tmp_path: Path, steps: int) -> None:
    metrics(tmp_path, steps)
    plot_metrics(tmp_path)
    for name in ("loss.png", "accuracy.png"):
        with Image.open(tmp_path / name) as image:
            colours = image.convert("RGB").getcolors(1 << 20)
            assert colours is not None
            shown = {colour for _, colour in colours}
        assert (31, 119, 180) in shown and (255, 127, 14) in shown  # both curves are there


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.integers(0, 12), st.floats(-3, 3))
@settings(max_examples=50, deadline=None)
def test_smoothing_keeps_lines_and_range(noise: list[float], reach: int, slope: float) -> None:
    line = [slope * i + 1 for i in range(len(noise))]
    assert _smooth(line, reach) == pytest.approx(line, abs=1e-9)
    assert all(min(noise) - 1e-9 <= value <= max(noise) + 1e-9 for value in _smooth(noise, reach))
