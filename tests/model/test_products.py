"""Every product against the same one in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.machine import has_bf16
from mmgpt.model import products

bf16 = pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="needs a CPU with bf16 instructions")
fbgemm = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs fbgemm")


def exact(x, weight, bias=None):
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def test_fuse_copies_once_only():
    whole = torch.randn(7, 4)
    parts = [torch.nn.Parameter(part.clone()) for part in whole.split([2, 4, 1])]
    fused = products.fuse(parts)
    assert torch.equal(fused, whole)
    assert products.fuse(parts).data_ptr() == fused.data_ptr() == parts[0].data_ptr()
    assert torch.equal(products.fuse([parts[1], parts[0]]), whole[[2, 3, 4, 5, 0, 1]])


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_dense_in_fp32(rows):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(31, 24), torch.randn(31), torch.randn(rows, 24)
    torch.testing.assert_close(products.dense(weight, bias)(x).double(), exact(x, weight, bias), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(products.dense(weight, None)(x).double(), exact(x, weight), atol=1e-5, rtol=1e-5)


@bf16
@pytest.mark.parametrize("outputs, inputs", [(31, 24), (96, 64), (5, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_and_int8_at_any_number_of_rows(outputs, inputs, bias):
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs) * torch.rand(outputs, 1)
    offset = torch.randn(outputs).bfloat16() if bias else None
    values, scales = products.quantize(weight)
    rounded = {"packed": weight.bfloat16(), "int8": values * scales[:, None].float()}
    for name, given_weight in (("packed", weight.bfloat16()), ("int8", weight)):
        multiply = getattr(products, name)(given_weight, offset)
        for rows in (1, 2, products.FEW_ROWS, products.FEW_ROWS + 1, 40):
            # A part of a wider tensor, as the decoder passes.
            x = torch.randn(rows, inputs + 3).bfloat16()[:, :inputs]
            expected = exact(x, rounded[name], offset)
            error = (multiply(x).double() - expected).abs().max()
            assert error < 0.01 * expected.abs().max(), (name, rows)


@bf16
@given(st.integers(0, 2**31), st.floats(-20, 8), st.integers(1, 40))
def test_quantizing_errs_by_half_a_step(seed, magnitude, inputs):
    weight = torch.randn(6, inputs, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude
    weight[3] = 0
    values, scales = products.quantize(weight)
    assert values.dtype == torch.int8 and values.abs().max() <= products.INT8_MAX
    error = (values.double() * scales.double()[:, None] - weight.double()).abs()
    # The largest weight of a row may lie beyond 127 steps by what the scale lost when it was rounded to bf16.
    assert (error <= scales.double()[:, None] * (0.5 + products.INT8_MAX * 2.0**-8)).all()
    assert (error.flatten().sort().values[: -len(weight)] <= scales.max().double() * 0.501).all()
    assert not values[3].any()


@fbgemm
def test_a_row_in_half_precision_never_depends_on_its_neighbours():
    torch.manual_seed(0)
    multiply = products.fp16(torch.randn(40, 32), torch.randn(40))
    row = torch.randn(1, 32)
    alone = multiply(row)
    for scale in (1e-6, 1.0, 1e6):
        batch = torch.cat((torch.randn(2, 32) * scale, row, torch.zeros(1, 32)))
        torch.testing.assert_close(multiply(batch)[2:3], alone, atol=1e-6, rtol=1e-6)
