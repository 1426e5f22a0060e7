"""Next-token logits with a KV cache: a lean decoder for the Llama family, transformers itself for the rest.

`Decoder.from_language` reads the weights of a transformers causal LM. For Llama, Mistral and Qwen2 the step is rebuilt
from few operations (one matrix for query, key and value, one for gate and up, one preallocated cache, rotary tables
computed once), in one of several weight formats. Every other architecture runs through its own forward and cache
behind the same two calls, `prefill` and `step`.

Letters in shapes: B rows, L positions, H hidden width, V vocabulary, K key/value heads, D width of a head.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn import functional as F

from mmgpt.errors import UsageError
from mmgpt.machine import has_bf16
from mmgpt.model import products
from mmgpt.model.products import Multiply

Weights = Literal["auto", "fp32", "bf16", "fp16", "int8"]

GROWTH = 256  # positions the cache grows by
REFINED = 16  # likeliest tokens whose logits are computed in fp32 where all others are in bf16
SLACK_ROWS = 0.75  # finished rows are dropped once at most this share is left: copying the cache costs about one step


class Decoder(ABC):
    """Prompt embeddings in, next-token logits out. Holds weights only; what is being generated lives in its cache."""

    @classmethod
    def from_language(cls, language: Module, weights: Weights = "auto", *, release: bool = False) -> Decoder:
        """A decoder of a transformers causal LM.

        `auto` keeps the model's own numbers, so that the text is that of the model: fp32 stays fp32, bf16 stays bf16
        where the machine multiplies it in hardware and is widened to fp32 where not. `bf16` on a CPU copies the matrices
        into the layout of its kernels. `int8` rounds them, but those behind the gates, to 8 bits with a scale for each
        output and keeps everything else in bf16 (CPUs with bf16 instructions). `fp16` stores half-precision weights and
        computes in fp32 (CPUs with fbgemm): for CPUs without bf16 instructions, with half the memory traffic of fp32 and
        nearly its logits.

        With `auto` and `fp32` in the model's own type nothing is copied twice: the fused matrices replace the storage of
        the model's parameters, which become views of them; later changes to the parameters are seen by the decoder.

        Args:
            language: `LlamaForCausalLM`, `GPT2LMHeadModel`, ...
            weights: Number format of the matrices.
            release: Drop the matrices of `language` that the decoder keeps in another format. The module can then
                neither run, train nor be saved; only its embedding and its output matrix stay.

        Raises:
            UsageError: the format is unknown, or not possible for this model or on this machine.
        """
        if weights not in get_args(Weights):
            raise UsageError(f"weights {weights!r} is not one of {', '.join(get_args(Weights))}")
        first = next(language.parameters())
        own = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(first.dtype, str(first.dtype))
        automatic = weights == "auto"
        if automatic:
            weights = "bf16" if own == "bf16" and has_bf16(first.device) else "fp32"
        if weights in ("bf16", "int8") and not has_bf16(first.device):
            raise UsageError(f"weights {weights} need bf16 instructions, which this machine lacks; use fp32 or fp16")
        if weights in ("fp16", "int8") and first.device.type != "cpu":
            raise UsageError(f"weights {weights} are for CPUs; on {first.device.type} use fp32 or bf16")
        obstacle = _obstacle(language)
        if obstacle is None:
            return LlamaDecoder(language, weights, release=release, share=automatic)
        if weights != own and not automatic:
            raise UsageError(f"weights {weights} need a Llama-like model ({obstacle}); use auto")
        return TransformersDecoder(language)

    @abstractmethod
    def prefill(self, embeds: Tensor, lengths: Tensor, reserve: int = GROWTH) -> tuple[Tensor, Any]:
        """Read the prompts.

        Args:
            embeds: Input embeddings [B, L, H], padded on the left; padding may hold anything finite.
            lengths: Real positions of each row [B].
            reserve: New tokens to make room for; the cache grows when there are more.

        Returns:
            Logits after the last position [B, V] in float32, and the cache that `step` takes.
        """

    @abstractmethod
    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """Append one token to every row: ids [B] -> logits [B, V] in float32. The cache is updated in place."""


@dataclass
class Cache:
    """Keys and values of the rows in flight.

    Attributes:
        data: [layers, B, 2 K, capacity, D]; the first K heads are keys.
        length: Positions in use, padding included.
        padding: Left padding of each row [B].
        mask: Added to the attention scores [B, 1, 1, capacity]; None where no row is padded.
    """

    data: Tensor
    length: int
    padding: Tensor
    mask: Tensor | None

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [B'] only, in this order."""
        self.data = self.data[:, rows]
        self.padding = self.padding[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def grow(self) -> None:
        """Make room for `GROWTH` more positions."""
        self.data = F.pad(self.data, (0, 0, 0, GROWTH))
        self.mask = None if self.mask is None else F.pad(self.mask, (0, GROWTH))

    @property
    def capacity(self) -> int:
        return self.data.shape[3]


@dataclass(frozen=True)
class Block:
    """One decoder layer."""

    norm1: Tensor
    qkv: Multiply
    out: Multiply
    norm2: Tensor
    gate_up: Multiply
    down: Multiply


class LlamaDecoder(Decoder):
    """Llama, Mistral without a sliding window, and Qwen2: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

    families: ClassVar[set[str]] = {"llama", "mistral", "qwen2"}

    def __init__(self, language: Any, weights: str, *, release: bool = False, share: bool = False):
        config, attention = language.config, language.model.layers[0].self_attn
        self.weights, self.share = weights, share
        self.dtype = torch.bfloat16 if weights in ("bf16", "int8") else torch.float32
        # One row's attention in bf16 is slower than in fp32 on a CPU, and oneDNN compiles a kernel for every new length.
        self.cached = torch.float32 if language.device.type == "cpu" else self.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.width, self.scale, self.eps = attention.head_dim, attention.scaling, config.rms_norm_eps
        self.activation = language.model.layers[0].mlp.act_fn
        self.rotary = language.model.rotary_emb
        self.embedding = language.get_input_embeddings().weight.detach()
        with torch.inference_mode(False), torch.no_grad():
            self.blocks = [self._block(layer, release) for layer in language.model.layers]
            self.norm = language.model.norm.weight.detach().float()
            self.head = self._matrix([language.lm_head], False)
            # Without a bias, as all of these families are; one that has it keeps its rounded logits.
            refined = self.dtype == torch.bfloat16 and language.lm_head.bias is None
            self.rows = language.lm_head.weight.detach() if refined else None
        self.cos = self.sin = self.norm.new_empty(0, 1, self.width, dtype=self.cached)

    def _block(self, layer: Any, release: bool) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        return Block(
            norm1=layer.input_layernorm.weight.detach().float(),
            qkv=self._matrix([attention.q_proj, attention.k_proj, attention.v_proj], release),
            out=self._matrix([attention.o_proj], release),
            norm2=layer.post_attention_layernorm.weight.detach().float(),
            gate_up=self._matrix([mlp.gate_proj, mlp.up_proj], release),
            # What comes out of the gate has outliers that multiply the rounding of some columns by a thousand (Sun et al. 2024):
            # rounded too, this matrix alone costs as many changed tokens as all others together.
            down=self._matrix([mlp.down_proj], release, whole=True),
        )

    def _matrix(self, linears: list[Linear], release: bool, *, whole: bool = False) -> Multiply:
        """Several linear layers on the same input as one product, in the decoder's format; `whole` is never rounded to int8."""
        first = linears[0].weight
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = torch.cat([bias.detach().to(self.dtype) for bias in biases]) if biases else None
        in_place = self.weights == "fp32" or (self.weights == "bf16" and (self.share or first.device.type != "cpu"))
        if in_place and first.dtype == self.dtype:
            return products.dense(products.fuse([linear.weight for linear in linears]), bias)
        weights = "bf16" if whole and self.weights == "int8" else self.weights
        # int8 is rounded from the model's own numbers, not from their bf16.
        dtype = first.dtype if weights == "int8" else self.dtype
        weight = torch.cat([linear.weight.detach().to(dtype) for linear in linears])
        if release:
            for linear in linears:
                linear.weight.data = first.data.new_empty(0)
        make = {"fp32": products.dense, "bf16": products.packed, "fp16": products.fp16, "int8": products.int8}
        return make[weights](weight, bias)

    @torch.inference_mode()
    def prefill(self, embeds: Tensor, lengths: Tensor, reserve: int = GROWTH) -> tuple[Tensor, Cache]:
        rows, length, hidden = embeds.shape
        padding = (length - lengths).to(embeds.device)
        capacity = length + min(reserve, GROWTH)
        shape = (len(self.blocks), rows, 2 * self.kv_heads, capacity, self.width)
        cache = Cache(self.cos.new_empty(shape), length, padding, None)
        column = torch.arange(capacity, device=embeds.device)
        causal = None
        if bool(padding.any()):
            hole = column < padding[:, None]
            cache.mask = self.cos.new_zeros(rows, 1, 1, capacity).masked_fill_(hole[:, None, None], float("-inf"))
            seen = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()
            # A padded position sees itself: a row of the softmax without any entry would be NaN.
            own = torch.eye(length, dtype=torch.bool, device=embeds.device)
            causal = (seen & ~hole[:, None, None, :length]) | own
        positions = (column[:length] - padding[:, None]).clamp_(min=0).flatten()
        groups = self.heads // self.kv_heads

        def attend(layer: int, qkv: Tensor) -> Tensor:
            heads = qkv.view(rows, length, -1, self.width).transpose(1, 2)
            cache.data[layer, :, :, :length] = heads[:, self.heads :]
            query, kv = heads.to(self.dtype).split((self.heads, 2 * self.kv_heads), dim=1)
            keys, values = kv.repeat_interleave(groups, dim=1).chunk(2, dim=1)
            mixed = F.scaled_dot_product_attention(query, keys, values, causal, is_causal=causal is None, scale=self.scale)
            return mixed.transpose(1, 2).reshape(rows * length, -1)

        x = embeds.float().reshape(rows * length, hidden)
        x = self._run(x, positions, attend)
        return self._logits(x.view(rows, length, hidden)[:, -1]), cache

    @torch.inference_mode()
    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        if cache.length == cache.capacity:
            cache.grow()
        end = cache.length + 1
        slots = cache.data[:, :, :, cache.length].unbind(0)
        keys = cache.data[:, :, : self.kv_heads, :end].unbind(0)
        values = cache.data[:, :, self.kv_heads :, :end].unbind(0)
        mask = None if cache.mask is None else cache.mask[..., :end]
        rows, heads = len(ids), self.heads
        attention = partial(F.scaled_dot_product_attention, attn_mask=mask, scale=self.scale)
        # The heads that share a key head stand as several queries of it: one step has no order among them to mask, and the
        # CPU kernel is faster so than with `enable_gqa` (16 rows, 250 positions: 274 us against 474, in bf16 353 against 4600).
        shared = (rows, self.kv_heads, heads // self.kv_heads, self.width)

        def attend(layer: int, qkv: Tensor) -> Tensor:
            slots[layer].copy_(qkv[:, heads:])
            query = qkv[:, :heads].view(shared)
            return attention(query, keys[layer], values[layer]).reshape(rows, -1)

        x = F.embedding(ids, self.embedding).float()
        x = self._run(x, cache.length - cache.padding, attend)
        cache.length = end
        return self._logits(x)

    def _run(self, x: Tensor, positions: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """All layers over tokens x [N, H] at their positions [N]."""
        # The sum over all layers is kept in fp32 whatever the products are in: rounding it to bf16 layer by layer is most of what
        # sets bf16 apart.
        cos, sin = self._rotations(positions)
        half, hidden, eps, activation = self.width // 2, (x.shape[-1],), self.eps, self.activation
        for layer, block in enumerate(self.blocks):
            qkv = block.qkv(F.rms_norm(x, hidden, block.norm1, eps).to(self.dtype)).to(self.cached).view(len(x), -1, self.width)
            qkv = torch.addcmul(qkv * cos, qkv.roll(half, -1), sin)
            x = x + block.out(attend(layer, qkv).to(self.dtype))
            gate, up = block.gate_up(F.rms_norm(x, hidden, block.norm2, eps).to(self.dtype)).chunk(2, -1)
            x = x + block.down(activation(gate).mul_(up))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (x.shape[-1],), self.norm, self.eps)
        logits = self.head(x.to(self.dtype)).float()
        if self.rows is not None:
            # A logit of 20 in bf16 is known to the next eighth: those that a choice is made among are computed again.
            likely = logits.topk(min(REFINED, logits.shape[-1]), sorted=False).indices
            exact = torch.bmm(F.embedding(likely, self.rows).float(), x[:, :, None])[..., 0]
            logits.scatter_(-1, likely, exact)
        return logits

    def _rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Factors [N, heads + 2 K, D] for query, key and value heads alike: a value is turned by no angle.

        Rotating a pair (a, b) by t is (a cos t - b sin t, b cos t + a sin t) (Su et al. 2021, eq. 34); with the halves of
        a head swapped by `roll`, that is x * cos + swapped * sin with the sign put into the first half of the sine.
        """
        needed = int(positions.max()) + 1
        if needed > len(self.cos):
            every = torch.arange(needed + GROWTH, device=self.norm.device)[None]
            cos, sin = self.rotary(self.cos, every)
            sign = torch.ones(self.width, device=sin.device, dtype=sin.dtype)
            sign[: self.width // 2] = -1
            self.cos, self.sin = cos[0, :, None], (sin[0] * sign)[:, None]
        shape = (len(positions), self.heads + self.kv_heads, self.width)
        turned, still = (self.cos.new_full((len(positions), self.kv_heads, self.width), fill) for fill in (1.0, 0.0))
        cos = torch.cat((self.cos[positions].expand(shape), turned), dim=1)
        return cos, torch.cat((self.sin[positions].expand(shape), still), dim=1)


class TransformersDecoder(Decoder):
    """Any causal LM of transformers through its own forward and cache."""

    def __init__(self, language: Any):
        self.language = language
        # transformers renames the argument model by model, and warns where it is called by the old name.
        self.cache_argument = "cache" if "cache" in inspect.signature(language.forward).parameters else "past_key_values"

    @torch.inference_mode()
    def prefill(self, embeds: Tensor, lengths: Tensor, reserve: int = GROWTH) -> tuple[Tensor, TransformersCache]:
        from transformers import DynamicCache

        padding = embeds.shape[1] - lengths.to(embeds.device)
        mask = (torch.arange(embeds.shape[1], device=embeds.device) >= padding[:, None]).long()
        cache = TransformersCache(DynamicCache(config=self.language.config), mask)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        return self._forward(cache, positions, inputs_embeds=embeds.to(self.language.dtype)), cache

    @torch.inference_mode()
    def step(self, ids: Tensor, cache: TransformersCache) -> Tensor:
        # A finished row that is still carried along may pass the window, where learned positions end.
        window = getattr(self.language.config, "max_position_embeddings", None)
        positions = cache.mask.sum(-1, keepdim=True).clamp(max=(window or 1 << 31) - 1)
        cache.mask = F.pad(cache.mask, (0, 1), value=1)
        return self._forward(cache, positions, input_ids=ids[:, None])

    def _forward(self, cache: TransformersCache, positions: Tensor, **inputs: Tensor) -> Tensor:
        training = self.language.training
        if training:
            self.language.eval()
        try:
            output = self.language(
                **inputs,
                attention_mask=cache.mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_argument: cache.data},
            )
        finally:
            if training:
                self.language.train()
        return output.logits[:, -1].float()


@dataclass
class TransformersCache:
    """transformers' own cache, and which of its positions are real [B, L]."""

    data: Any
    mask: Tensor

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [B'] only, in this order."""
        self.data.batch_select_indices(rows)
        self.mask = self.mask[rows]


def _obstacle(language: Any) -> str | None:
    """Why a model cannot run as a `LlamaDecoder`; None where it can."""
    config = language.config
    if config.model_type not in LlamaDecoder.families or not type(language).__name__.endswith("ForCausalLM"):
        return f"this is {type(language).__name__}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return "this one has a sliding window"
    if config.model_type == "mistral" and config.sliding_window is not None:
        return "this one has a sliding window"
    if language.model.rotary_emb.rope_type in ("dynamic", "longrope"):
        return "the rotary frequencies of this one change with the length"
    linears = [module for name, module in language.named_modules() if name.endswith(("_proj", "lm_head"))]
    if any(type(linear) is not Linear for linear in linears):
        return "this one has adapters or other changed layers: merge them first"
    return None
