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


class Stopped(UserError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state."""

    exit_code = 130


class Checkpointer(L.Callback):
    """Writes `folder/last.ckpt` between two optimizer steps; the file is replaced whole or not at all.

    Random states travel with it. Ctrl-C and SIGTERM finish the step at hand, save, and stop.

    Args:
        folder: Where the checkpoint goes.
        every: Optimizer steps between checkpoints; None is once an epoch.
    """

    def __init__(self, folder: Path, every: int | None):
        self.folder = folder
        self.every = every
        self._saved_at = -1
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}
        self._random: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        return self.folder / "last.ckpt"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _note(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # asked twice: stop at once, without saving
        self._signal = number

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._random is not None:
            _restore_random(self._random)
            self._random = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if not between_steps:
            return
        due = self.every is not None and trainer.global_step % self.every == 0
        if due or self._signal is not None:
            self.save(trainer)
        if self._signal is not None:
            raise Stopped(f"stopped after step {trainer.global_step}; go on with --run_dir {self.folder.parent} --resume true")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every is None:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint beside its place and rename it. Raises UserError where the disk refuses."""
        if trainer.global_step == self._saved_at:
            return
        fresh = self.folder / f".last-{os.getpid()}.ckpt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            if trainer.is_global_zero:
                with open(fresh, "wb") as file:
                    torch.save(checkpoint, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(fresh, self.path)
        except (OSError, RuntimeError) as error:
            fresh.unlink(missing_ok=True)
            raise UserError(f"cannot save {self.path}: {error} (is the disk full?); the checkpoint before it is whole") from error
        trainer.strategy.barrier()
        self._saved_at = trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return _random_states()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random = state_dict


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
