"""The progress bar: steps, loss, samples and tokens a second."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmgpt.loop.checkpoint import logged_steps


class ProgressBar(L.Callback):
    """A rich bar over the whole run on a terminal; a line every tenth of it elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.shown = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.total = int(trainer.estimated_stepping_batches)
        self.shown = logged_steps(trainer)
        if not self.console.is_terminal or not trainer.is_global_zero:
            return
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("training", total=self.total, completed=self.shown, note="")
        self.bar.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = trainer.callback_metrics
        step = logged_steps(trainer)
        if step == self.shown:
            return  # in the middle of an accumulation
        self.shown = step
        known = [name for name in ("loss", "score", "kl") if f"train/{name}" in metrics]
        shown = [f"{name} {float(metrics[f'train/{name}']):.3f}" for name in known]
        rates = ("samples_per_s", "samples/s", ".1f"), ("tokens_per_s", "tokens/s", ".0f")
        shown += [f"{float(metrics.get(f'train/{name}', 0)):{digits}} {unit}" for name, unit, digits in rates]
        note = "  ".join(shown)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
        elif trainer.is_global_zero and (step % max(1, self.total // 10) == 0 or step == self.total):
            print(f"step {step}/{self.total}  {note}", file=sys.stderr, flush=True)

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()
