"""Checkpoints that a run can be killed at and resumed from, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mmgpt.errors import UserError
from mmgpt.loop.metrics import MetricsFile


class Stopped(UserError):
    """The run was asked to stop (Ctrl-C, SIGTERM); the message says what was saved."""

    exit_code = 130


class Checkpointer(L.Callback):
    """Writes `folder/last.ckpt` between two optimizer steps; the file is replaced whole or not at all.

    The states of the random generators travel with it. Where a checkpoint falls due at the last batch of an epoch, it is
    written after the epoch's validation, so that no validation is missed or taken twice. Ctrl-C and SIGTERM finish the
    step at hand, save, and stop; a second one stops at once.

    Args:
        folder: Where the checkpoint goes.
        every: Optimizer steps between checkpoints; None is once an epoch. The end of training always gets one.
    """

    def __init__(self, folder: Path, every: int | None):
        self.folder = folder
        self.every = every
        self._due = False
        self._saved_at = -1
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._random: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        return self.folder / "last.ckpt"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            # A process that was killed while it wrote leaves its temporary file behind.
            for stray in self.folder.glob(".last-*.ckpt"):
                stray.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.current.ready == 0:
            # Between two epochs there is nothing to restart; with `max_steps`, Lightning would skip the epoch's first validation.
            loop.restarting = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Before Lightning gives back what it found itself: afterwards its own handler would stay, which ends nothing.
        self._give_back_handlers()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._give_back_handlers()  # of a training that did not come to its end

    def _give_back_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            raise Stopped(f"stopped at once, without saving; {self._how_to_go_on()}")
        self._signal = number
        # Not `print`: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")

    def _how_to_go_on(self) -> str:
        if not self.path.is_file():
            return "there is no checkpoint yet"
        return f"go on with --config {self.folder.parent / 'config.yaml'} --resume true"

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._random is not None:
            _restore_random(self._random)
            self._random = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        self._due |= self.every is not None and logged_steps(trainer) % self.every == 0
        if trainer.is_last_batch:
            return  # `on_train_epoch_end` comes next
        stop = self._asked_to_stop(trainer)
        if self._due or stop:
            self.save(trainer, epoch_done=False)
        if stop:
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        out_of_steps = trainer.global_step == trainer.max_steps
        finished = out_of_steps or trainer.current_epoch + 1 == trainer.max_epochs
        stop = self._asked_to_stop(trainer)
        if self._due or self.every is None or finished or stop:
            self.save(trainer, epoch_done=trainer.is_last_batch or not out_of_steps)
        if stop:
            self._stop(trainer)

    def _asked_to_stop(self, trainer: L.Trainer) -> bool:
        """Whether any rank got a signal: all of them have to save together."""
        asked = self._signal is not None
        return trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked

    def _stop(self, trainer: L.Trainer) -> None:
        raise Stopped(f"stopped after step {logged_steps(trainer)}, everything is saved; {self._how_to_go_on()}")

    def save(self, trainer: L.Trainer, *, epoch_done: bool) -> None:
        """Write the checkpoint beside its place and rename it, after metrics.csv is up to date with it.

        Args:
            trainer: Between two optimizer steps.
            epoch_done: Whether the epoch is over, its validation included.

        Raises:
            UserError: the disk refuses; the checkpoint before this one is whole.
        """
        self._due = False
        if trainer.global_step == self._saved_at:
            return
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        settle_loops(checkpoint["loops"]["fit_loop"], steps=logged_steps(trainer), epoch_done=epoch_done)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                # Lightning logs a step after its last hook: by then this checkpoint counts it as taken.
                values = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("train/")}
                logger.log_metrics({"epoch": trainer.current_epoch, **values}, logged_steps(trainer) - 1)
                logger.flush()
        if trainer.is_global_zero:
            self._write(checkpoint)
        trainer.strategy.barrier()
        self._saved_at = trainer.global_step

    def _write(self, checkpoint: dict[str, Any]) -> None:
        fresh = self.folder / f".last-{os.getpid()}.ckpt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(fresh, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.path)
        except (OSError, RuntimeError) as error:
            fresh.unlink(missing_ok=True)
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise UserError(
                f"cannot save {self.path}: {reason} (is the disk full?). "
                + ("The checkpoint before it is whole: make room, then " if self.path.is_file() else "Make room; ")
                + self._how_to_go_on()
            ) from error
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise

    def state_dict(self) -> dict[str, Any]:
        return _random_states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict


def logged_steps(trainer: L.Trainer) -> int:
    """Rows of metrics.csv up to here: optimizer steps; iterations, where a stage takes several optimizer steps in each."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.batch_progress.total.ready


def settle_loops(fit_loop: dict[str, Any], *, steps: int, epoch_done: bool) -> None:
    """Bring the counters of Lightning's fit loop to where they stand between two batches, or between two epochs.

    Lightning dumps them as they are inside a hook, half counted, and on a resume guesses from the differences which hook it
    was. Saved at the last batch of an epoch, that guess leaves out the epoch's validation; saved at an epoch's end, it runs
    the end of the epoch again. Settled counters leave nothing to guess.

    Args:
        fit_loop: `checkpoint["loops"]["fit_loop"]`, changed in place.
        steps: Optimizer steps taken, or iterations of a stage that steps by itself (`logged_steps`).
        epoch_done: Whether the epoch is over.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    for scope in ("total", "current"):
        taken = 0 if epoch_done and scope == "current" else batches[scope]["ready"]
        batches[scope] = dict.fromkeys(batches[scope], taken)
        finished = epochs[scope]["ready"] - (0 if epoch_done else 1)
        epochs[scope].update(processed=finished, completed=finished)
    batches["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps


def _random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, in types that `torch.load(weights_only=True)` takes."""
    import numpy as np

    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [str(name), [int(key) for key in keys], *(float(x) if isinstance(x, float) else int(x) for x in rest)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random(states: dict[str, Any]) -> None:
    import numpy as np

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
