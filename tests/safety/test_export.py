"""Stage 2 as it is shipped gives the numbers of the module that was trained."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_training import tiny_encoder

from mmgpt.errors import UserError
from safety import fitting
from safety.export import export, fused, restore


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


def test_what_was_exported_can_be_trained_on(tmp_path: Path) -> None:
    made, file = encoder(tmp_path / "encoder"), tmp_path / "encoder.int8.onnx"
    export(made, file)
    again = fitting.encoder_module(tmp_path / "encoder", list(range(95)), 0).eval()
    restore(again, file)
    were = made.state_dict()
    # The two tables that do not depend on the token are shipped as their sum.
    places, kinds = (f"bert.embeddings.{name}_embeddings.weight" for name in ("position", "token_type"))
    were[places] = were[places] + were[kinds][0]
    for name, value in again.state_dict().items():
        if name == kinds:
            assert not value.any()
        else:  # int8 has 127 steps to an output's largest weight, the tables 255 to their whole range
            assert (value - were[name]).abs().max() <= 1.01 * (were[name].max() - were[name].min()) / 127 / 2 + 1e-6, name
    ids = torch.randint(95, (1, 20))
    with torch.no_grad():
        assert (again(ids) - made(ids)).abs().mean() < 0.1 * made(ids).std()


def test_files_that_cannot_be_trained_on_are_named(tmp_path: Path) -> None:
    made, file = encoder(tmp_path / "encoder"), tmp_path / "encoder.int8.onnx"
    with pytest.raises(UserError, match=r"encoder.int8.onnx cannot be trained on"):
        restore(made, file)
    file.write_bytes(b"no graph")
    with pytest.raises(UserError, match="cannot be trained on"):
        restore(made, file)
    export(made, file)
    shallow = fitting.encoder_module(tmp_path / "encoder", list(range(95)), 0)
    shallow.bert.config.num_hidden_layers = 1
    with pytest.raises(UserError, match="more than 1 layers"):
        restore(shallow, file)
    with pytest.raises(UserError, match="size mismatch"):
        restore(fitting.encoder_module(tmp_path / "encoder", list(range(90)), 0), file)
