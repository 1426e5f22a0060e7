"""Finding a trained model to ask, without loading anything."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path


def newest_run(folders: Iterable[Path]) -> Path | None:
    """The exported model that was written last among those in some folders' runs that accept images.

    Args:
        folders: Folders that hold run folders (`runs`); ones that do not exist are skipped.

    Returns:
        The folder of the model (`runs/quickstart/model`), or None where no run has one that accepts images.
    """
    found: list[tuple[float, Path]] = []
    for folder in folders:
        for config in folder.glob("*/model/config.json"):
            try:
                if accepts_images(config) and (config.parent / "model.safetensors").is_file():
                    found.append((config.stat().st_mtime, config.parent))
            except OSError:
                # A run that is being replaced while we look.
                continue
    return max(found)[1] if found else None


def holds_model(folder: Path) -> bool:
    """Whether a folder is an exported model, or a run's that has one in `model/`."""
    places = (folder / "model", folder)
    return any((place / "config.json").is_file() and (place / "model.safetensors").is_file() for place in places)


def accepts_images(config: Path) -> bool:
    """Whether an exported config.json describes a model with an image encoder; False for a file that is none."""
    try:
        description = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(description, dict) and description.get("vision") is not None
