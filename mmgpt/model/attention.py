"""Causal attention inside each sample of a batch, by plain matrix products: on CPUs, the fast way to train on short samples.

`scaled_dot_product_attention` on a CPU spends more time in its backward pass than all linear layers of a small decoder, and with
a block mask it also computes what the mask throws away. Here the samples of a batch are gathered side by side, [S, M, ...],
whether they stood in packed rows or in rows of their own, and are multiplied as they are: no sample meets another, and the heads
that share a key are stacked into one product.

Letters in shapes: B rows of L positions, S samples of at most M tokens, H query heads, K key heads, G = H / K, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "mmgpt_segments"
"""What transformers knows this attention by."""

LONGEST = 1024
"""Samples of more tokens go through the fused kernel, which does not keep [M, M] probabilities for the backward pass."""


@dataclass
class Group:
    """Samples of like length.

    Args:
        take: [S * M] where in the batch [B * L] each token stands; the slots behind a sample's end repeat its last token.
            They change nothing: causal attention never looks ahead.
        put: [B * L] where among the slots each token of the batch stands, -1 for those of other groups and padding.
        samples: S.
    """

    take: Tensor
    put: Tensor
    samples: int


@dataclass
class Segments:
    """Where the samples of a batch stand.

    Args:
        groups: Samples by length; None where every row holds one sample, which needs no gathering.
        calls: Attention layers that made use of it: proof that an architecture did not go its own way.
    """

    groups: list[Group] | None
    calls: int = 0

    @classmethod
    def of(cls, segment_ids: Tensor) -> Segments:
        """Read `Batch.segment_ids` [B, L]: 0 where there is padding, else 1, 2, ... for the samples of a row."""
        if not bool((segment_ids > 1).any()):
            return cls(None)
        rows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None]
        names = (rows * (segment_ids.max() + 1) + segment_ids).flatten()
        places = (segment_ids.flatten() > 0).nonzero()[:, 0]
        lengths = names[places].unique_consecutive(return_counts=True)[1]
        starts = lengths.cumsum(0) - lengths
        longest = int(lengths.max())
        if len(lengths) * longest**2 <= 2 * int((lengths**2).sum()):
            kinds = torch.zeros_like(lengths)
        else:
            kinds = lengths.float().log2().ceil().long()  # at most half of a slot's tokens are filler then
        groups = []
        for kind in kinds.unique().tolist():
            mine = kinds == kind
            count, start = lengths[mine, None], starts[mine, None]
            offset = torch.arange(int(count.max()), device=places.device)
            take = places[start + torch.minimum(offset, count - 1)]
            real = offset < count
            put = torch.full_like(names, -1)
            put[take[real]] = real.flatten().nonzero()[:, 0]
            groups.append(Group(take.flatten(), put, len(count)))
        return cls(groups)


class _Take(torch.autograd.Function):
    """x [N, ...] -> x[take] [T, ...]; its gradient is a gather as well, where autograd would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, put: Tensor) -> Tensor:
        ctx.save_for_backward(put)
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (put,) = ctx.saved_tensors
        return _put(gradients[0], put), None, None


class _Put(torch.autograd.Function):
    """y [T, ...] -> x [N, ...] with x[take] = y and zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, take: Tensor, put: Tensor) -> Tensor:
        ctx.save_for_backward(take, put)
        return _put(y, put)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        take, put = ctx.saved_tensors
        # Filler slots were not put anywhere: without this their repeated token would get its gradient several times.
        filler = put[take] != torch.arange(len(take), device=take.device)
        return gradients[0].index_select(0, take).masked_fill_(_as(filler, gradients[0]), 0), None, None


def _put(y: Tensor, put: Tensor) -> Tensor:
    absent = put < 0
    return y.index_select(0, put.clamp(min=0)).masked_fill_(_as(absent, y), 0)


def _as(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.dim() - 1))


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T scale) v for every sample, each position looking at itself and what stands before it.

    Args:
        query: [S, M, H, D].
        key, value: [S, M, K, D].
        scale: Factor of the scores.
        dropout: Share of the probabilities that is set to zero.

    Returns:
        [S, M, H, D].
    """
    samples, length, heads, width = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    if length > LONGEST:
        q, k, v = query.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale).transpose(1, 2)
    q = (query * scale).view(samples, length, kv_heads, groups, width).permute(0, 2, 3, 1, 4)
    q = q.reshape(samples * kv_heads, groups * length, width)
    k, v = (x.transpose(1, 2).reshape(samples * kv_heads, length, width) for x in (key, value))
    ahead = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    bias = torch.zeros(length, length, dtype=q.dtype, device=q.device).masked_fill_(ahead, float("-inf"))
    scores = torch.bmm(q, k.transpose(1, 2)).view(-1, groups, length, length)
    shares = (scores + bias).softmax(-1).view(-1, groups * length, length)
    mixed = torch.bmm(F.dropout(shares, dropout) if dropout else shares, v)
    return mixed.view(samples, kv_heads, groups, length, width).permute(0, 3, 1, 2, 4).reshape(query.shape)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; without `segments` (generation, for one) it is transformers' own sdpa.

    Args:
        module: The attention layer.
        query: [B, H, L, D].
        key, value: [B, K, L, D].
        attention_mask: Read where there are no segments.
        scaling: Factor of the scores.
        dropout: Share of the probabilities that is set to zero.
        segments: The batch's.

    Returns:
        [B, L, H, D], and no weights.
    """
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **more
        )
    segments.calls += 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Rotary positions may have widened query and key; under autocast the products are in the value's type all the same.
    q, k, v = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        if segments.groups is None:
            return causal(q, k, v, scale, dropout), None
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        total: Any = None
        for group in segments.groups:
            q, k, v = (_Take.apply(x, group.take, group.put).unflatten(0, (group.samples, -1)) for x in flat)  # type: ignore[no-untyped-call]
            mixed = _Put.apply(causal(q, k, v, scale, dropout).flatten(0, 1), group.take, group.put)  # type: ignore[no-untyped-call]
            total = mixed if total is None else total + mixed
    return total.view(query.transpose(1, 2).shape), None


def register() -> str:
    """Make this attention known to transformers; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
