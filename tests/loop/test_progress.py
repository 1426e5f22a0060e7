"""The progress bar on a terminal, and the lines elsewhere."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console

from mmgpt.loop.progress import ProgressBar


class Trainer:
    """What the bar looks at."""

    estimated_stepping_batches = 40
    is_global_zero = True
    global_step = 0
    lightning_module = SimpleNamespace(automatic_optimization=True)
    callback_metrics: ClassVar = {
        "train/loss": torch.tensor(1.5),
        "train/samples_per_s": torch.tensor(12.34),
        "train/tokens_per_s": torch.tensor(5678.0),
    }


def steps(bar: ProgressBar, accumulate: int = 2) -> None:
    trainer: Any = Trainer()
    module: Any = None
    bar.on_train_start(trainer, module)
    for batch in range(trainer.estimated_stepping_batches * accumulate):
        trainer.global_step = (batch + 1) // accumulate
        bar.on_train_batch_end(trainer, module, None, None, batch)
    bar.on_train_end(trainer, module)


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.console = Console(file=io.StringIO(), force_terminal=False)
    steps(bar)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and len(set(lines)) == 10  # one a tenth, though every step is two batches
    assert lines[0] == "step 4/40  loss 1.500  12.3 samples/s  5678 tokens/s"
    assert lines[-1].startswith("step 40/40")


def test_bar_on_a_terminal() -> None:
    bar = ProgressBar()
    screen = io.StringIO()
    bar.console = Console(file=screen, force_terminal=True, width=120)
    steps(bar)
    shown = screen.getvalue()
    assert "40/40" in shown and "12.3 samples/s" in shown and "5678 tokens/s" in shown
    assert bar.bar is None
