"""A run that was killed and resumed equals the run that was never killed, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nano_runs import differences, keep_checkpoints, killed_runs, metric_rows, run_state, train, write_config

# 20 samples, 5 batches of 4, 3 optimizer steps an epoch (the last of one batch), 9 steps in all.
SETTINGS: dict[str, Any] = {
    "trainer__epochs": 3,
    "trainer__accumulate": 2,
    "trainer__checkpoint_every": 2,
    "model__language__lora": {"rank": 2, "dropout": 0.5},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "grouped": {"data__batching": "grouped"},
    # Steps, not epochs, end the run, in the middle of the third epoch.
    "max_steps": {"trainer__max_steps": 7, "trainer__checkpoint_every": 1},
    # Checkpoints at the ends of epochs; validation only in every second one.
    "epochs": {"trainer__checkpoint_every": None, "trainer__validate_every": 2},
    # Clipping beside a fused optimizer under mixed precision, which Lightning alone refuses.
    "bf16": {"trainer__precision": "bf16", "trainer__epochs": 2, "trainer__checkpoint_every": 1},
    "stream": {"data__stream": True, "trainer__max_steps": 6, "trainer__epochs": 1},
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The uninterrupted run, and a folder with what a kill after each checkpoint would have left."""
    folder = tmp_path_factory.mktemp(request.param)
    config = write_config(folder / "config.yaml", **{**SETTINGS, **VARIANTS[request.param]})
    with pytest.MonkeyPatch.context() as patch:
        keep_checkpoints(patch, folder / "killed")
        assert train(config, "--run_dir", str(folder / "whole")) == 0
    return config, folder


def test_resumed_equals_uninterrupted(whole: tuple[Path, Path]) -> None:
    config, folder = whole
    expected, rows = run_state(folder / "whole"), metric_rows(folder / "whole")
    killed = killed_runs(folder / "killed")
    assert len(killed) >= 3
    for run in killed:
        assert train(config, "--run_dir", str(run), "--resume", "true") == 0
        assert not differences(expected, run_state(run)), run.name
        assert metric_rows(run) == rows, run.name


def test_uninterrupted_run_logs_every_step_and_validation(whole: tuple[Path, Path]) -> None:
    folder = whole[1]
    rows = metric_rows(folder / "whole")
    assert [int(row["step"]) for row in rows] == list(range(len(rows)))
    validated = [int(row["step"]) for row in rows if row.get("val/loss")]
    expected = {"packed": [2, 5, 8], "grouped": [2, 5, 8], "max_steps": [2, 5], "epochs": [5], "bf16": [2, 5], "stream": [5]}
    assert validated == expected[folder.name.removesuffix("0")]
