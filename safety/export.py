"""Stage 2 as it is shipped: one int8 ONNX graph of few, large operations; and back, to train on from there."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from safety.classifier import Transformer


def fused(encoder: Any) -> torch.nn.Module:
    """The encoder for one text at a time, ids [1, T] -> logits [1, 1 + K]: the same numbers by fewer operations.

    Query, key and value are one product, the scale of the scores is inside the weights of the query, there is no mask, and the
    two embeddings that do not depend on the token are one table: on a text of twenty tokens an operation costs more to start than
    to do.

    Args:
        encoder: Of `fitting.encoder_module`, in evaluation mode.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            bert, config = encoder.bert, encoder.bert.config
            table = bert.embeddings
            self.words = table.word_embeddings.weight
            self.places = nn.Parameter((table.position_embeddings.weight + table.token_type_embeddings.weight[0]).detach())
            self.norm, self.layers, self.head = table.LayerNorm, bert.encoder.layer, encoder.head
            self.heads, self.width = config.num_attention_heads, config.hidden_size
            scale = (self.width // self.heads) ** -0.5
            parts = [layer.attention.self for layer in self.layers]
            weights = [torch.cat([part.query.weight * scale, part.key.weight, part.value.weight]) for part in parts]
            biases = [torch.cat([part.query.bias * scale, part.key.bias, part.value.bias]) for part in parts]
            self.weights = nn.ParameterList([weight.t().contiguous().detach() for weight in weights])
            self.biases = nn.ParameterList([bias.detach() for bias in biases])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            ids = ids[0]
            x = self.norm(self.words[ids] + self.places[torch.arange(ids.shape[0], device=ids.device)])
            for layer, weight, bias in zip(self.layers, self.weights, self.biases):
                qkv = (x @ weight + bias).reshape(-1, 3, self.heads, self.width // self.heads)
                query, key, value = qkv.permute(1, 2, 0, 3).unbind(0)
                mixed = torch.softmax(query @ key.transpose(1, 2), -1) @ value
                out = layer.attention.output
                x = out.LayerNorm(out.dense(mixed.transpose(0, 1).reshape(-1, self.width)) + x)
                x = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)
            return self.head(torch.cat([x.mean(0), x.amax(0)]))[None]

    return Fused().eval()


def export(encoder: torch.nn.Module, target: Path) -> None:
    """Write the encoder as int8 ONNX: weights with one scale an output, activations by the text that is read."""
    import tempfile

    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        full = Path(folder) / "encoder.onnx"
        torch.onnx.export(
            fused(encoder),
            (torch.ones(1, 24, dtype=torch.long),),
            str(full),
            dynamo=False,
            input_names=["ids"],
            output_names=["logits"],
            dynamic_axes={"ids": {1: "tokens"}},
            opset_version=17,
        )
        logging.getLogger().setLevel(logging.ERROR)  # the quantiser advises a preprocessing that changes nothing here
        quantize_dynamic(full, target, weight_type=QuantType.QInt8, per_channel=True, extra_options={"MatMulConstBOnly": True})


def restore(encoder: torch.nn.Module, file: Path) -> None:
    """The reverse of `export`: put the weights of a file into an encoder, each within half a step of the one that was rounded.

    Args:
        encoder: Of `fitting.encoder_module`, of the same sizes and with as many tokens.

    Raises:
        UserError: `export` wrote no such file, or one of another encoder.
    """
    import onnx
    import torch
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    from mmgpt.errors import UserError

    inside: Any = encoder
    config = inside.bert.config
    try:
        held = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(file)).graph.initializer}
        value = {name: torch.from_numpy(array.copy()) for name, array in held.items() if array.dtype == np.float32}
        for name in [name.removesuffix("_quantized") for name in held if name.endswith("_quantized")]:
            whole = held[f"{name}_quantized"].astype(np.float32) - held[f"{name}_zero_point"].astype(np.float32)
            value[name.removesuffix("_Transposed")] = torch.from_numpy(whole * held[f"{name}_scale"])
        [head] = [name for name in value if f"{name}_quantized" in held and "MatMul" in name]  # the one weight without a name
        table, kinds = "bert.embeddings", ("weight", "bias")
        state = {f"{table}.LayerNorm.{kind}": value[f"norm.{kind}"] for kind in kinds}
        state |= {f"{table}.word_embeddings.weight": value["words"], f"{table}.position_embeddings.weight": value["places"]}
        state[f"{table}.token_type_embeddings.weight"] = torch.zeros(config.type_vocab_size, config.hidden_size)
        state |= {"head.weight": value[head].t(), "head.bias": value["head.bias"]}
        scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        for n in range(config.num_hidden_layers):
            layer = f"bert.encoder.layer.{n}"
            thirds = value[f"weights.{n}"].t().chunk(3), value[f"biases.{n}"].chunk(3)
            for part, weight, bias in zip(("query", "key", "value"), *thirds):
                by = scale if part == "query" else 1.0
                state |= {f"{layer}.attention.self.{part}.weight": weight / by, f"{layer}.attention.self.{part}.bias": bias / by}
            for part in ("attention.output.dense", "intermediate.dense", "output.dense"):
                state[f"{layer}.{part}.weight"] = value[f"layers.{n}.{part}.weight"].t()
                state[f"{layer}.{part}.bias"] = value[f"layers.{n}.{part}.bias"]
            for part in ("attention.output.LayerNorm", "output.LayerNorm"):
                state |= {f"{layer}.{part}.{kind}": value[f"layers.{n}.{part}.{kind}"] for kind in kinds}
        if f"weights.{config.num_hidden_layers}" in value:
            raise ValueError(f"it has more than {config.num_hidden_layers} layers")
        encoder.load_state_dict(state)
    except (OSError, KeyError, ValueError, RuntimeError, DecodeError) as error:
        raise UserError(f"{file} cannot be trained on: {error!r:.300}") from error


def full_precision(encoder: torch.nn.Module, transformer: Transformer, texts: list[str]) -> np.ndarray:
    """What `transformer.logits` would give without quantisation, float32 [N, 1 + K]."""
    import torch

    rows = []
    with torch.inference_mode():
        for encoding in transformer.tokenizer.encode_batch(texts, add_special_tokens=False):
            pieces = [[transformer.ends[0], *ids, transformer.ends[1]] for ids in transformer.pieces(encoding.ids)]
            rows.append(torch.stack([encoder(torch.tensor([ids]))[0] for ids in pieces]).amax(0).float().numpy())
    return np.stack(rows)
