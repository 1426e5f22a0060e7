"""Checkpoints: counters between two batches, states of the random generators."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import torch

from mmgpt.loop.checkpoint import Checkpointer, _random_states, _restore_random, settle_loops


def counters(ready: int, behind: int = 0) -> dict[str, int]:
    return {"ready": ready, "started": ready, "processed": ready - behind, "completed": ready - behind}


def fit_loop() -> dict[str, Any]:
    """As Lightning dumps it inside a hook of the second epoch's fourth batch, five batches an epoch."""
    return {
        "epoch_progress": {"total": counters(2, 1), "current": counters(2, 1)},
        "epoch_loop.batch_progress": {"total": {**counters(9), "completed": 8}, "current": {**counters(4), "completed": 3},
                                      "is_last_batch": True},
        "epoch_loop.state_dict": {"_batches_that_stepped": 3},
    }  # fmt: skip


def test_counters_in_the_middle_of_an_epoch() -> None:
    state = fit_loop()
    settle_loops(state, steps=4, epoch_done=False)
    assert state["epoch_loop.batch_progress"] == {"total": counters(9), "current": counters(4), "is_last_batch": False}
    assert state["epoch_progress"] == {"total": counters(2, 1), "current": counters(2, 1)}
    assert state["epoch_loop.state_dict"] == {"_batches_that_stepped": 4}


def test_counters_between_epochs() -> None:
    state = fit_loop()
    settle_loops(state, steps=5, epoch_done=True)
    assert state["epoch_loop.batch_progress"] == {"total": counters(9), "current": counters(0), "is_last_batch": False}
    assert state["epoch_progress"] == {"total": counters(2), "current": counters(2)}


def test_generators_go_on_where_they_were_saved() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draw()
    file = io.BytesIO()
    torch.save(_random_states(), file)
    expected = draw(), draw()
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    file.seek(0)
    _restore_random(torch.load(file, weights_only=True))
    assert (draw(), draw()) == expected


def test_stray_temporary_files_are_removed(tmp_path: Any) -> None:
    class Trainer:
        is_global_zero = True

    (tmp_path / ".last-123.ckpt").write_bytes(b"half")
    (tmp_path / "last.ckpt").write_bytes(b"whole")
    Checkpointer(tmp_path, None).on_fit_start(Trainer(), None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
