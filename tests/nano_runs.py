"""Runs of a few steps on drawn shapes, for the tests of training: in this process, or as a command."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
TIMING = ("train/samples_per_s", "train/tokens_per_s")

# A model of 20 thousand weights; the encoder and the projector learn whole, the decoder through adapters with dropout.
TINY = {
    "trainer.precision": "fp32",
    "trainer.accelerator": "cpu",
    "trainer.threads": 1,
    "trainer.progress": False,
    "model.vision.name": "timm:vit_tiny_patch16_224",
    "model.vision.layer": -1,
    "model.vision.options": {
        "pretrained": False, "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2,
    },
    "model.projector.kind": "mlp2x_gelu",
    "model.language.tokenizer": "bytes",
    "model.language.architecture": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    },
    "optimizer.lr.vision": 2e-3,
    "optimizer.lr.language": 2e-3,
    "data.train": [{"path": "shapes", "split": "train", "limit": 20}],
    "data.validation": [{"path": "shapes", "split": "val", "limit": 4}],
    "data.max_length": 96,
    "data.batch_size": 4,
    "evaluate.generate": 0,
    "evaluate.final": 0,
    "evaluate.examples": 0,
}  # fmt: skip


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        inner = result
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return result


def write_config(path: Path, **changes: Any) -> Path:
    """A configuration file of a tiny run; keys of `changes` have two underscores for a dot."""
    import yaml

    changed = {key.replace("__", "."): value for key, value in changes.items()}
    path.write_text(yaml.safe_dump(nested({**TINY, **changed})), encoding="utf-8")
    return path


def train(config: Path, *arguments: str) -> int:
    """`python -m mmgpt.train --config CONFIG ARGUMENTS` in this process, with its exit code."""
    from mmgpt.errors import run_cli
    from mmgpt.train import main

    return run_cli(lambda: main(["--config", str(config), *arguments]))


def command(*arguments: str, script: str | None = None) -> list[str]:
    """The command line of a training run; `script` replaces `-m mmgpt.train`."""
    return [sys.executable, *(["-c", script] if script else ["-m", "mmgpt.train"]), *arguments]


def start(*arguments: str, script: str | None = None, cwd: Path = REPOSITORY, **more: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command(*arguments, script=script),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment,
        **more,
    )


def keep_checkpoints(monkeypatch: Any, folder: Path) -> None:
    """Copy every checkpoint of a run, and metrics.csv as it was then, as a kill right after would have left them.

    They come to lie in `folder`/stepN, N being the rows of metrics.csv that the checkpoint knows of.
    """
    import shutil

    from mmgpt.loop.checkpoint import Checkpointer

    write = Checkpointer._write

    def wrapper(self: Checkpointer, checkpoint: dict[str, Any]) -> None:
        write(self, checkpoint)
        step = checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
        copy = folder / f"step{step}"
        (copy / "checkpoints").mkdir(parents=True)
        shutil.copy(self.path, copy / "checkpoints" / "last.ckpt")
        for name in ("metrics.csv", "config.yaml"):
            shutil.copy(self.folder.parent / name, copy / name)

    monkeypatch.setattr(Checkpointer, "_write", wrapper)


def killed_runs(folder: Path) -> list[Path]:
    """The folders that `keep_checkpoints` left, in the order of their steps."""
    return sorted(folder.iterdir(), key=lambda path: int(path.name.removeprefix("step")))


def metric_rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that hold times."""
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if name not in TIMING} for row in csv.DictReader(file)]


def run_state(folder: Path) -> dict[str, Any]:
    """Everything a run leaves that decides how it goes on: weights, optimizer, schedule, counters, generators, cursor."""
    import torch

    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    return {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "counters": (checkpoint["global_step"], checkpoint["epoch"]),
        "loops": checkpoint["loops"]["fit_loop"],
        "random": checkpoint["callbacks"],
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two states are not equal bit for bit."""
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        missing = [f"{where}.{key} (one side only)" for key in keys if key not in a or key not in b]
        return missing + [d for key in keys if key in a and key in b for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}[{i}]")]
    return [] if type(a) is type(b) and a == b else [f"{where}: {str(a)[:60]} / {str(b)[:60]}"]
