"""Stage 2 as it is shipped gives the numbers of the module that was trained."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tiny_training import tiny_encoder

from safety import fitting
from safety.export import export, fused


def encoder(folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    made = fitting.encoder_module(tiny_encoder(folder), list(range(95)), 0).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def test_fewer_operations_give_the_same_numbers(tmp_path: Path) -> None:
    made = encoder(tmp_path / "encoder")
    lean = fused(made)
    for length in (2, 3, 17, 32):
        ids = torch.randint(95, (1, length))
        with torch.no_grad():
            torch.testing.assert_close(lean(ids), made(ids), atol=1e-5, rtol=1e-4)


def test_the_int8_graph_is_near_and_reads_any_length(tmp_path: Path) -> None:
    made = encoder(tmp_path / "encoder")
    export(made, tmp_path / "encoder.int8.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.int8.onnx"), providers=["CPUExecutionProvider"])
    found, expected = [], []
    for length in (2, 5, 24, 32):
        ids = torch.randint(95, (1, length))
        found.append(session.run(None, {"ids": ids.numpy()})[0])
        with torch.no_grad():
            expected.append(made(ids).numpy())
    gap, spread = np.abs(np.concatenate(found) - np.concatenate(expected)), np.concatenate(expected).std()
    assert gap.mean() < 0.1 * spread
