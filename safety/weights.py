"""The folder that is shipped: what belongs in it, whether it is whole, and its seal.

    linear.npz  encoder.int8.onnx  tokenizer.json  calibration.json

calibration.json names the size and the sha256 of every other file, and holds a sha256 of itself without that line: whatever
was cut off, swapped or edited is noticed before it is used. `python -m safety.weights FOLDER` seals a folder again after a
change that was meant.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "weights"
FILES = ("linear.npz", "encoder.int8.onnx", "tokenizer.json")
CALIBRATION = "calibration.json"


class WeightsError(Exception):
    """The weights cannot be used; `reason` is a code of `verdict.REASONS`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def read(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files' bytes, and the calibration, both checked.

    Raises:
        WeightsError: with reason `weights_missing`, `weights_truncated`, `weights_altered` or `weights_unreadable`.
    """
    raw = _bytes(folder / CALIBRATION)
    try:
        calibration = json.loads(raw)
        expected, sizes, sealed = calibration["files"], calibration["sizes"], calibration["seal"]
        complete = set(FILES) <= set(expected) and set(FILES) <= set(sizes)
    except (ValueError, KeyError, TypeError) as error:
        reason = "weights_truncated" if not raw.rstrip().endswith(b"}") else "weights_unreadable"
        raise WeightsError(reason, f"{folder / CALIBRATION} is no sealed calibration: {error!r}") from error
    if not complete or sealed != _seal(calibration):
        raise WeightsError("weights_altered", f"{folder / CALIBRATION} is not as it was sealed")
    found: dict[str, bytes] = {}
    for name in FILES:
        data = found[name] = _bytes(folder / name)
        if len(data) < sizes[name]:
            raise WeightsError("weights_truncated", f"{folder / name} has {len(data)} of {sizes[name]} bytes")
        if hashlib.sha256(data).hexdigest() != expected[name]:
            raise WeightsError("weights_altered", f"{folder / name} has another sha256 than calibration.json says")
    return found, calibration


def seal(folder: Path) -> str:
    """Write sizes, hashes and the seal into a folder's calibration.json. Returns the seal."""
    path = folder / CALIBRATION
    calibration = json.loads(path.read_text(encoding="utf-8"))
    calibration["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    calibration["sizes"] = {name: (folder / name).stat().st_size for name in FILES}
    calibration["seal"] = _seal(calibration)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(calibration, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return str(calibration["seal"])


def _seal(calibration: dict[str, Any]) -> str:
    content = {key: value for key, value in calibration.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsError("weights_missing", f"there is no {path}") from error
    except OSError as error:
        raise WeightsError("weights_unreadable", f"{path} cannot be read: {error}") from error


if __name__ == "__main__":
    print(seal(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
