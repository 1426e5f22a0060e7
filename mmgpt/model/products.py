"""The matrix products of a decoder: x W^T + b with W [out, in] kept in the format that reads it fastest.

A step of one row does one multiplication a weight, so its time is that of reading the weights. Figures below: microseconds
a product at one row and one thread, 3072 x 576, on a CPU with AVX512-BF16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgpt.errors import UsageError

Multiply = Callable[[Tensor], Tensor]  # x [N, in] -> [N, out]

FEW_ROWS = 4  # up to here the int8 kernel is the faster one; 8 rows take it 1.3 times, 200 rows 3 times as long as bf16
INT8_MAX = 127  # symmetric: -128 stays unused
INT8_BLOCK = 16  # inputs the int8 kernel reads at a time; it does not stop at the end of a row that is no multiple
INT8_ALIGNED = 32  # bytes; the kernel crashes on rows that start elsewhere


def fuse(parts: list[Tensor]) -> Tensor:
    """Matrices stacked along the output, as one tensor that the parameters become views of. Free when they already are."""
    if len(parts) == 1:
        return parts[0].detach()
    first, rows = parts[0].detach(), sum(len(part) for part in parts)
    place = first.data_ptr()
    joined = first.is_contiguous()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        joined = joined and same and part.is_contiguous() and part.data_ptr() == place
        place += part.numel() * part.element_size()
    if joined:
        return first.as_strided((rows, first.shape[1]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts])):
        part.data = view
    return whole


def dense(weight: Tensor, bias: Tensor | None) -> Multiply:
    """In the type of `weight`, read where it lies.

    On a CPU, oneDNN's product reads the matrix at memory speed where MKL's does not (fp32, measured on AVX2, one row: 1.3x; 16
    rows: 1.2 to 1.6x).
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        product = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: product(x, weight, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def packed(weight: Tensor, bias: Tensor | None) -> Multiply:
    """In bf16 on a CPU, from a copy in the blocked layout of oneDNN.

    Without, oneDNN brings the matrix into that layout in every product: 222 us against 111.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return dense(weight, bias)
    blocked = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, blocked, bias, "none", [], "")


def fp16(weight: Tensor, bias: Tensor | None) -> Multiply:
    """Stored in half precision, everything computed in fp32.

    Raises:
        UsageError: this build of torch has no fbgemm.
    """
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise UsageError("weights fp16 need a torch build with fbgemm (x86); use fp32 or bf16")
    halves = torch.ops.quantized.linear_prepack_fp16(weight, bias)
    product = torch.ops.quantized.linear_dynamic_fp16.default
    return lambda x: product(x, halves)


def int8(weight: Tensor, bias: Tensor | None) -> Multiply:
    """Weights of 8 bits with a scale for each output, activations in bf16, sums in fp32: 95 us against 111 in bf16, and half
    of that with two threads (57 against 90).

    Only the weights are rounded: activations have outliers that 8 bits for the whole row would drown the rest in (Dettmers
    et al. 2022, section 3). More than `FEW_ROWS` rows are bound by arithmetic, not by reading, and go through bf16 with the same
    rounded weights, so that a row gets the same numbers alone and in a batch but for the rounding of bf16.
    """
    values, scales = quantize(weight)
    many = packed(values.to(torch.bfloat16) * scales[:, None], bias)
    if weight.shape[1] % INT8_BLOCK:
        return many
    product = torch.ops.aten._weight_int8pack_mm.default

    def multiply(x: Tensor) -> Tensor:
        if len(x) > FEW_ROWS:
            return many(x)
        if not x.is_contiguous() or x.data_ptr() % INT8_ALIGNED:
            x = x.clone(memory_format=torch.contiguous_format)
        y = product(x, values, scales)
        return y if bias is None else y + bias

    return multiply


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [out, in] ~ values * scales[:, None]: int8 [out, in] and bf16 [out].

    The scale is rounded to bf16 before the division, so its rounding adds no error of its own.
    """
    weight = weight.float()
    scales = (weight.abs().amax(1) / INT8_MAX).clamp_(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
    values = (weight / scales[:, None].float()).round_().clamp_(-INT8_MAX, INT8_MAX)
    return values.to(torch.int8), scales
