"""`python -m mmgpt.train`: what it refuses, in one clear message and with the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from nano_runs import REPOSITORY, train, write_config

TEXT_ONLY = {"model__vision": None, "trainer__max_steps": 1, "data__validation": [], "data__max_length": 200}


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """The error that was printed; there is one, and no traceback."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert errors.count("error: ") == 1, errors
    return errors.split("error: ")[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.yaml", trainer__max_steps=1, run_dir=str(tmp_path / "run"))


def write_lines(path: Path, good: int, bad: int) -> Path:
    sample = json.dumps({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]})
    lines = [sample] * good
    for number in range(bad):
        lines.insert(number * good // max(1, bad), '{"messages": [{"role": "us')
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.epoch", "3"], "unknown key trainer.epoch: did you mean trainer.epochs?"),
        (["--epochs", "3"], "unknown key epochs: did you mean trainer.epochs?"),
        (["--trainer.epochs", "many"], "trainer.epochs: expected int, got many"),
        (["--data.batching", "packet"], "data.batching: expected one of 'packed', 'grouped', got packet"),
        (["--config", "nowhere.yaml"], "there is no configuration file nowhere.yaml; the project's own are"),
        (["--trainer.accelerator", "toaster"], "toaster"),
        (["--data.train", "[{path: nowhere.jsonl}]"], "nowhere.jsonl"),
        (["--data.train", "[]"], "data.train names no source"),
        (["--resume", "true"], "nothing to resume"),
        (["--trainer.epochs", "0"], "trainer.epochs is 0, but must be at least 1"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps is -1, but must be at least 1"),
        (["--data.batch_size", "0"], "data.batch_size is 0, but must be at least 1"),
        (["--data.holdout", "1"], "data.holdout is 1.0, but must be at least 0 and below 1"),
        (["--data.fold", "1", "--data.holdout", "0", "--data.validation", "[]"], "data.fold 1 says which part of data.train"),
        (["--data.max_bad", "7"], "data.max_bad is 7.0, but must be from 0 to 1"),
        (["--optimizer.lr.projector", "-1"], "optimizer.lr.projector is -1.0, but must be at least 0"),
        (["--optimizer.lr.projector", ".inf"], "optimizer.lr.projector is inf, but must be at least 0"),
        (["--optimizer.betas", "[0.9, 1]"], "optimizer.betas is 1.0, but must be at least 0 and below 1"),
        (["--optimizer.eps", "0"], "optimizer.eps is 0.0, but must be above 0"),
    ],
)
def test_wrong_usage(config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert train(config, *arguments) == 2
    assert expected in message(capsys)
    run = config.parent / "run"
    assert not run.exists() or {path.name for path in run.iterdir()} <= {"config.yaml"}


def test_limits_name_keys_that_exist_and_the_defaults_keep_them() -> None:
    from mmgpt.config import LIMITS, RunConfig, check_values
    from mmgpt.train import known_keys

    assert set(LIMITS) <= set(known_keys(RunConfig))
    check_values(RunConfig())


def test_a_source_on_the_command_line_inherits_nothing(tmp_path: Path) -> None:
    from mmgpt.config import SourceConfig
    from mmgpt.train import parse

    config = write_config(tmp_path / "tiny.yaml", data__train=[{"path": "shapes", "split": "train", "limit": 3}])
    for given in (["--data.train", "[{path: photos}]"], ["--data.train=[{path: photos}]"]):
        assert parse(["--config", str(config), *given]).data.train == [SourceConfig(path="photos")]
    assert parse(["--config", str(config)]).data.train == [SourceConfig(path="shapes", split="train", limit=3)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer:\n  epochs: 1\n batch: [\n", "broken.yaml:3: not valid YAML"),
        ("- a\n- b\n", "must be a mapping with keys of stage, run_dir"),
        ("", "the file is empty, but must be a mapping"),
        ("trainer: 3\n", "trainer is 3, but must be a mapping with keys of epochs"),
        ("model:\n  vision:\n    lora: {rnk: 3}\n", "unknown key model.vision.lora.rnk: did you mean model.vision.lora.rank?"),
        ("trainer:\n  epoch: 1\n", "unknown key trainer.epoch: did you mean trainer.epochs?"),
        ("data:\n  train: [{path: shapes, splitt: train}]\n", "unknown key data.train.splitt: did you mean data.train.split?"),
        ("data:\n  train:\n  - path: 3\n    limit: few\n", "data.train"),
        ("model:\n  vision: {layer: last}\n", "layer: expected int"),
    ],
)
def test_broken_configuration_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert train(path, "--run_dir", str(tmp_path / "run")) == 2
    error = message(capsys)
    assert expected in error and len(error) < 400
    assert not (tmp_path / "run").exists()


def test_printed_configuration_is_a_configuration_and_starts_fast(tmp_path: Path) -> None:
    """What --print_config prints can be given back; neither it nor a wrong argument loads a heavy library."""
    from mmgpt.train import parse

    script = (
        "import sys\nfrom mmgpt.train import main\n"
        "try: code = main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(code or (f'loaded {heavy}' if heavy else 0))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "--config", "nano/shapes", "--trainer.epochs", "3", "--print_config"],
        capture_output=True, text=True, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert parse(["--config", str(printed)]) == parse(["--config", "nano/shapes", "--trainer.epochs", "3"])
    assert yaml.safe_load(result.stdout)["trainer"]["epochs"] == 3


def test_existing_run_is_not_overwritten_by_accident(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config.parent / "run"
    assert train(config) == 0
    stored = (run / "metrics.csv").stat().st_mtime_ns
    capsys.readouterr()
    assert train(config) == 2
    error = message(capsys)
    assert "--overwrite true" in error and "--resume true" in error
    assert (run / "metrics.csv").stat().st_mtime_ns == stored
    assert train(config, "--overwrite", "true") == 0
    assert (run / "metrics.csv").stat().st_mtime_ns != stored
    # The stored configuration is that of the run, and removes nothing when it is used again.
    assert yaml.safe_load((run / "config.yaml").read_text())["overwrite"] is False


def test_other_folders_are_never_removed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = config.parent / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_bytes(b"x")
    assert train(config, "--run_dir", str(photos), "--overwrite", "true") == 2
    assert "is not a run folder" in message(capsys)
    assert (photos / "one.jpg").exists()


def test_unwritable_run_folder(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "file").write_text("")
    assert train(config, "--run_dir", str(config.parent / "file" / "run")) == 1
    assert "cannot write to the run folder" in message(capsys)
    assert train(config, "--run_dir", str(config.parent / "file")) == 1
    assert "cannot write to the run folder" in message(capsys)


def test_show_batch_leaves_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config, "--show_batch", "true") == 0
    printed = capsys.readouterr().out
    assert "4 samples in" in printed and "supervised (green)" in printed and "image tokens]" in printed
    assert not (config.parent / "run").exists()
    lines = write_lines(config.parent / "lines.jsonl", good=999, bad=1)
    broken = write_config(
        config.parent / "broken.yaml", run_dir=str(config.parent / "run"), data__train=[{"path": str(lines)}], **TEXT_ONLY
    )
    assert train(broken, "--show_batch", "true") == 0
    assert not (config.parent / "run").exists()


def test_one_broken_line_in_a_thousand_is_reported_and_trained_around(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", good=999, bad=1)
    path = write_config(tmp_path / "c.yaml", run_dir=str(tmp_path / "run"), data__train=[{"path": str(lines)}], **TEXT_ONLY)
    assert train(path) == 0
    errors = capsys.readouterr().err
    assert "1 bad sample left out" in errors and "bad_samples.jsonl" in errors
    reported = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert [record["where"] for record in reported] == [f"{lines}:1"]


def test_a_sample_longer_than_a_packed_row_is_a_bad_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", good=19, bad=0)
    long = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4" * 120}]}
    lines.write_text(lines.read_text() + json.dumps(long) + "\n")
    run = tmp_path / "run"
    settings = {**TEXT_ONLY, "run_dir": str(run), "data__train": [{"path": str(lines)}], "data__max_bad": 0.1}
    path = write_config(tmp_path / "c.yaml", **settings, data__row_length=90)
    assert train(path) == 0
    assert "1 too_long" in capsys.readouterr().err
    assert "data.row_length" in (run / "bad_samples.jsonl").read_text()
    assert train(path, "--overwrite", "true", "--data.batching", "grouped") == 0
    assert "too_long" not in capsys.readouterr().err


def test_more_than_one_percent_bad_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", good=97, bad=3)
    path = write_config(tmp_path / "c.yaml", run_dir=str(tmp_path / "run"), data__train=[{"path": str(lines)}], **TEXT_ONLY)
    assert train(path) == 1
    error = message(capsys)
    assert "3 of 100 samples are bad" in error and "data.max_bad" in error and f"{lines}:1" in error
    # Repaired data and the same command: a run that never took a step is not in the way.
    write_lines(lines, good=100, bad=0)
    assert train(path) == 0
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


def test_nothing_to_learn_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tmp_path / "questions.jsonl"
    lines.write_text(json.dumps({"messages": [{"role": "user", "content": "2+2?"}]}) + "\n")
    path = write_config(tmp_path / "c.yaml", run_dir=str(tmp_path / "run"), data__train=[{"path": str(lines)}], **TEXT_ONLY)
    assert train(path) == 1
    assert "1 of 1 samples are bad" in message(capsys)
    assert train(path, "--data.max_bad", "1") == 1
    assert "no usable sample among 1" in message(capsys)


def test_every_part_frozen(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = [f"--optimizer.lr.{part}=0" for part in ("vision", "projector", "language")]
    assert train(config, *rates) == 2
    assert "every part is frozen" in message(capsys)


@pytest.mark.parametrize(("logger", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_missing_logger_package(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logger: str, module: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in (module, "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert train(config, "--trainer.logger", logger) == 2
    assert "mmgpt[loggers]" in message(capsys)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that stands for a full disk")
def test_a_full_disk_behind_stdout_is_one_message() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [sys.executable, "-c", "from mmgpt.errors import run_cli\nraise SystemExit(run_cli(lambda: print('parts')))"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment,
        )  # fmt: skip
    assert (result.returncode, result.stderr) == (1, "error: cannot write to stdout: No space left on device\n")
