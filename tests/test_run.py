"""What a run does when it is stopped, killed, or the disk is full: real signals, real processes."""

from __future__ import annotations

import os
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from nano_runs import differences, metric_rows, run_state, start, train, write_config

from mmgpt.loop.checkpoint import Checkpointer
from mmgpt.stages.instruct import Instruct

# 20 samples, 5 batches of 4, 3 optimizer steps an epoch, 6 in all.
SETTINGS: dict[str, Any] = {
    "trainer__epochs": 2,
    "trainer__accumulate": 2,
    "trainer__checkpoint_every": 2,
    "model__language__lora": {"rank": 2, "dropout": 0.5},
}
HALF_WRITTEN = """
import io, sys, time, torch
from mmgpt.errors import run_cli
from mmgpt.train import main

save, calls = torch.save, 0

def slow(state, file, *more, **options):
    global calls
    calls += 1
    if calls == 1:
        return save(state, file, *more, **options)
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
    file.flush()
    print("half", flush=True)
    time.sleep(600)

torch.save = slow
sys.exit(run_cli(main))
"""
SLOW_STEPS = """
import sys, time
from mmgpt.errors import run_cli
from mmgpt.stages.instruct import Instruct
from mmgpt.train import main

step = Instruct.training_step

def slow(self, *batch):
    print(self.global_step, flush=True)
    time.sleep(0.3)
    return step(self, *batch)

Instruct.training_step = slow
sys.exit(run_cli(main))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Configuration and folder of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "config.yaml", **SETTINGS)
    assert train(config, "--run_dir", str(folder / "run")) == 0
    return config, folder / "run"


def assert_same_run(run: Path, whole: Path) -> None:
    assert not differences(run_state(whole), run_state(run))
    assert metric_rows(run) == metric_rows(whole)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


def test_run_folder_is_complete(whole: tuple[Path, Path]) -> None:
    names = {path.name for path in whole[1].iterdir()}
    assert names >= {"config.yaml", "metrics.csv", "loss.png", "accuracy.png", "samples.md", "checkpoints", "model"}
    assert not {name for name in names if name.startswith(".")}


def test_answers_that_are_not_counted_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "config.yaml", trainer__max_steps=1, evaluate__examples=3)
    assert train(config, "--run_dir", str(run)) == 0
    samples = (run / "samples.md").read_text()
    assert len(list((run / "examples").glob("*.jpg"))) == 3 and samples.count("![](examples/") == 3
    assert "Reference: " in samples or "Exact: " in samples
    assert "held-out answers are exact" not in samples and "exact answers on" not in capsys.readouterr().err


def test_kill_9_in_the_middle_of_a_checkpoint_write(tmp_path: Path, whole: tuple[Path, Path]) -> None:
    config, uninterrupted = whole
    run = tmp_path / "run"
    process = start("--config", str(config), "--run_dir", str(run), script=HALF_WRITTEN)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    strays = [path.name for path in (run / "checkpoints").iterdir() if path.name != "last.ckpt"]
    assert len(strays) == 1 and run_state(run)["counters"][0] == 2  # the one before is whole
    (run / ".model-killed").mkdir()  # an export cut short leaves such a folder
    assert train(config, "--run_dir", str(run), "--resume", "true") == 0
    assert_same_run(run, uninterrupted)


def test_ctrl_c_saves_and_names_the_command_that_goes_on(tmp_path: Path, whole: tuple[Path, Path]) -> None:
    config, uninterrupted = whole
    process = start("--config", str(config), "--run_dir", str(tmp_path / "run"), script=SLOW_STEPS)
    assert process.stdout is not None
    while process.stdout.readline() != "3\n":
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    command = re.search(r"stopped after step 4, everything is saved; go on with --config (\S+) --resume true\n$", errors)
    assert command, errors
    assert train(Path(command[1]), "--resume", "true") == 0
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("at_step", [0, 2])  # in the middle of an epoch; in its last step, with the validation to come
def test_sigterm_saves(
    tmp_path: Path,
    whole: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at_step: int,
) -> None:
    config, uninterrupted = whole
    step = Instruct.training_step

    def interrupted(self: Instruct, batch: Any, batch_idx: int) -> Any:
        if self.global_step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr(Instruct, "training_step", step)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Instruct, "training_step", interrupted)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert train(config, "--run_dir", str(tmp_path / "run")) == 130
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert f"stopped after step {at_step + 1}" in capsys.readouterr().err
    assert run_state(tmp_path / "run")["counters"][0] == at_step + 1
    assert train(config, "--run_dir", str(tmp_path / "run"), "--resume", "true") == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before  # a training that ends leaves none
    assert_same_run(tmp_path / "run", uninterrupted)


def test_second_ctrl_c_stops_at_once(
    tmp_path: Path, whole: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def twice(self: Instruct, batch: Any, batch_idx: int) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    monkeypatch.setattr(Instruct, "training_step", twice)
    assert train(whole[0], "--run_dir", str(tmp_path / "run")) == 130
    assert "stopped at once, without saving; there is no checkpoint yet" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_full_disk_while_saving(
    tmp_path: Path, whole: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, uninterrupted = whole
    write, limits = Checkpointer._write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_little_room(self: Checkpointer, checkpoint: dict[str, Any]) -> None:
        room = 20_000 if checkpoint["global_step"] == 4 else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            write(self, checkpoint)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "_write", with_little_room)
        assert train(config, "--run_dir", str(tmp_path / "run")) == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert re.search(r"error: cannot save .*last\.ckpt: .*is the disk full\?.*before it is whole.*--resume true", errors)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["last.ckpt"]
    assert run_state(tmp_path / "run")["counters"][0] == 2
    assert train(config, "--run_dir", str(tmp_path / "run"), "--resume", "true") == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_full_disk_while_exporting(
    tmp_path: Path, whole: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmgpt.run import Run

    config, uninterrupted = whole
    finish, limits = Run._finish, resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_little_room(self: Run, *arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            finish(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_finish", with_little_room)
        assert train(config, "--run_dir", str(tmp_path / "run")) == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors and "error: cannot save the model in" in errors and "--resume true" in errors
    assert not (tmp_path / "run" / "model").exists()
    assert train(config, "--run_dir", str(tmp_path / "run"), "--resume", "true") == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_finished_run_can_be_resumed_for_its_report(tmp_path: Path, whole: tuple[Path, Path]) -> None:
    config, run = whole
    before = run_state(run), metric_rows(run)
    (run / "samples.md").unlink()
    assert train(config, "--run_dir", str(run), "--resume", "true") == 0
    assert (run / "samples.md").is_file()
    assert not differences(before[0], run_state(run)) and metric_rows(run) == before[1]


def test_checkpoint_of_another_shape(
    tmp_path: Path, whole: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = whole
    stored = (run / "config.yaml").read_text()
    arguments = ("--run_dir", str(run), "--resume", "true")
    assert train(config, *arguments, "--model.projector.width", "24") == 1
    errors = capsys.readouterr().err
    assert re.search(r"error: \S+last\.ckpt does not fit this configuration: projector\S+ is \[.*\b16\b.*\] in .*\b24\b", errors)
    assert "model.projector.width (None -> 24)" in errors
    assert (run / "config.yaml").read_text() == stored

    # What fits, but is not the same run, is allowed with a warning.
    assert train(config, *arguments, "--data.batch_size", "2") == 0
    assert "warning: changed since the run began" in (errors := capsys.readouterr().err) and "data.batch_size (4 -> 2)" in errors


def test_broken_checkpoint(tmp_path: Path, whole: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    data = (whole[1] / "checkpoints" / "last.ckpt").read_bytes()
    (run / "checkpoints" / "last.ckpt").write_bytes(data[: len(data) // 2])
    assert train(whole[0], "--run_dir", str(run), "--resume", "true") == 1
    errors = capsys.readouterr().err
    assert "last.ckpt is not a whole checkpoint of this project" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_nano_configuration_learns(tmp_path: Path) -> None:
    """configs/nano/shapes.yaml as a user starts it: from nothing to a model that sees, in a minute on two free cores."""
    from mmgpt.loop.metrics import read_metrics

    process = start("--config", "configs/nano/shapes.yaml", "--run_dir", str(tmp_path / "nano"))
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    names = {path.name for path in (tmp_path / "nano").iterdir()}
    assert names >= {"config.yaml", "metrics.csv", "loss.png", "accuracy.png", "samples.md", "examples", "model"}
    assert read_metrics(tmp_path / "nano" / "metrics.csv")["val/token_accuracy"][-1][1] > 0.9
    share = re.search(r"exact answers on \d+ held-out samples: ([\d.]+)%", errors)
    assert share and float(share[1]) > 50  # blind guesses reach 19 %: one colour in 6, one shape in 3, one pair in 18
