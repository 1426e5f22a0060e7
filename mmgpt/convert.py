"""Published models -> the layouts that mmgpt reads: safetensors with a config.json. `mmgpt.published` converts data sets.

Each converter is `convert(source, target)`: it reads the folder `source`, writes into the empty folder `target`, executes
nothing that it reads, and raises `ConversionError` where the files are not what it knows.

    language      config.json, model.safetensors (names of transformers' LlamaForCausalLM), tokenizer.json, tokenizer_config.json
    vision        config.json (architecture, library, image_size, mean, std, interpolation), model.safetensors (timm's names)
    text encoder  the files of a transformers model
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

CLIP_VIT_B16: dict[str, Any] = {
    "architecture": "vit_base_patch16_clip_quickgelu_224",
    "library": "timm",
    "image_size": 224,
    "mean": CLIP_MEAN,
    "std": CLIP_STD,
    "interpolation": "bicubic",
}
DINOV2_VIT_S14: dict[str, Any] = {
    "architecture": "vit_small_patch14_dinov2",
    "library": "timm",
    "image_size": 518,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "interpolation": "bicubic",
}


class ConversionError(ValueError):
    """A file is not what the converter knows; says which file or tensor."""


# Language models


def llama_gguf(source: Path, target: Path) -> None:
    """A Llama in GGUF, quantised or not -> `LlamaForCausalLM`, dense, with its tokenizer.

    The matrices are stored in float16, the norms in float32: see `language_dtype`.
    """
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(str(only(source, "*.gguf")))
    meta = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.ggml.")}
    if meta["general.architecture"] != "llama":
        raise ConversionError(f"GGUF architecture {meta['general.architecture']!r} is not llama")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layers, heads = meta["llama.block_count"], meta["llama.attention.head_count"]
    kv_heads = meta.get("llama.attention.head_count_kv", heads)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    state: dict[str, torch.Tensor] = {}
    for name in _llama_names(layers, tied="output.weight" not in tensors):
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",)) or name]
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _halves(weight, heads if name.endswith("q_proj.weight") else kv_heads)
        value = torch.from_numpy(weight.copy())
        state[name] = value.to(language_dtype(name)).contiguous()
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    ids = {key: reader.fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("bos", "eos")}
    head_dim = meta.get("llama.rope.dimension_count", meta["llama.embedding_length"] // heads)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": len(tokens),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": meta["llama.context_length"],
        # GGUF keeps it in float32; six digits undo the widening (9.999999747e-06 is 1e-05).
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": meta.get("llama.rope.freq_base", 10000.0)},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
    }
    _write_json(target / "config.json", config)
    _gguf_tokenizer(reader, target, max_length=meta["llama.context_length"])


def language_dtype(name: str) -> torch.dtype:
    """Float type that a tensor of a converted language model is stored in: float16, and float32 for the norms.

    SmolLM2-135M from Q4_1: float16 moves a weight by at most 2.0e-3 (4.1e-4 of its tensor's largest), bfloat16 by 1.4e-2.
    On 20 prompts the greedy text of 16 tokens is that of float32 with either; the most likely next token is the same at all
    prompt positions with float16, at 99.86 % with bfloat16, which takes as much space.
    """
    import torch

    return torch.float32 if name.endswith("norm.weight") else torch.float16


def _llama_names(layers: int, *, tied: bool) -> Iterable[str]:
    yield "model.embed_tokens.weight"
    for layer in range(layers):
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{part}.weight"
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{part}.weight"
        for part in ("gate_proj", "up_proj", "down_proj"):
            yield f"model.layers.{layer}.mlp.{part}.weight"
    yield "model.norm.weight"
    if not tied:
        yield "lm_head.weight"


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K, [heads * dim, hidden]: rotary pairs (0, 1), (2, 3), ... of GGUF -> (0, dim/2), (1, dim/2 + 1), ..."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _gguf_tokenizer(reader: Any, target: Path, *, max_length: int) -> None:
    """Byte-level BPE of a GGUF -> tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def field(name: str, default: Any = None) -> Any:
        found = reader.fields.get(f"tokenizer.{name}")
        return default if found is None else found.contents()

    if field("ggml.model") != "gpt2":
        raise ConversionError(f"GGUF tokenizer {field('ggml.model')!r} is not byte-level BPE (gpt2)")
    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field("ggml.merges")]
    bpe = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(bpe)
    split: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    if field("ggml.pre") == "smollm":
        # SmolLM splits digits off first: without it a run of blanks before a number comes out as other tokens.
        split.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif field("ggml.pre", "gpt-2") not in ("gpt-2", "default"):
        raise ConversionError(f"unknown pre-tokenizer {field('ggml.pre')!r} in the GGUF")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF token_type: 1 normal, 3 control
    types = field("ggml.token_type", [1] * len(tokens))
    special_tokens = [token for token, kind in zip(tokens, types) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    tokenizer.save(str(target / "tokenizer.json"))
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {role: field(f"ggml.{key}_token_id") for role, key in roles.items()}
    config = {role: tokens[index] for role, index in special.items() if index is not None}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if template := field("chat_template"):
        config["chat_template"] = template
    _write_json(target / "tokenizer_config.json", config)


def transformers_folder(source: Path, target: Path) -> None:
    """The files of a transformers model that is published as safetensors: copied, nothing else is taken."""
    folder = only(source, "config.json").parent
    if not any(folder.glob("*.safetensors")):
        raise ConversionError("the model has no *.safetensors; pickled weights are not loaded")
    if not (folder / "tokenizer.json").exists():
        raise ConversionError("the model has no tokenizer.json")
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not hidden and path.suffix in (".json", ".safetensors", ".txt", ".jinja"):
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


# Vision encoders


def clip_onnx(source: Path, target: Path) -> None:
    """Image tower of CLIP ViT-B/16, int8 ONNX with transformers' names -> timm."""
    write_vision(target, clip_to_timm(onnx_weights(only(source, "*.onnx"))), CLIP_VIT_B16)


def clip_transformers(source: Path, target: Path) -> None:
    """Image tower of CLIP ViT-B/16 out of transformers' `CLIPModel` (the text tower is left behind) -> timm."""
    write_vision(target, clip_to_timm(_safetensors(source)), CLIP_VIT_B16)


def dinov2_onnx(source: Path, target: Path) -> None:
    """DINOv2 ViT-S/14, fp32 ONNX with timm's names but anonymous matrices and position embedding -> timm."""
    path = only(source, "*.onnx")
    found = onnx_weights(path)
    state = {name.removeprefix("model."): value for name, value in found.items() if name.startswith("model.")}
    state["pos_embed"] = _onnx_position_embedding(path)
    write_vision(target, state, DINOV2_VIT_S14)


def write_vision(target: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    """Write config.json and model.safetensors after checking that timm's architecture takes exactly these tensors.

    Args:
        state: Tensors by timm's names, any float type; stored as float32 (float16 moves CLIP's last features by 0.6 %).
        config: The keys named at the top of this module.
    """
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):
        model = timm.create_model(config["architecture"], pretrained=False, num_classes=0)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ConversionError(f"the weights do not fit {config['architecture']}: {', '.join(wrong[:4])} ({len(wrong)} in all)")
    save_file(
        {name: value.to(torch.float32).contiguous() for name, value in state.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    _write_json(target / "config.json", dict(config))


def clip_to_timm(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of transformers' CLIP image tower -> timm's VisionTransformer; q, k and v are stacked into one matrix."""
    import torch

    renames = (
        ("pre_layrnorm.", "norm_pre."),
        ("post_layernorm.", "norm."),
        ("encoder.layers.", "blocks."),
        ("layer_norm", "norm"),
        ("self_attn.out_proj.", "attn.proj."),
        ("embeddings.patch_embedding.", "patch_embed.proj."),
    )
    out: dict[str, torch.Tensor] = {}
    tower = {n.removeprefix("vision_model."): value for n, value in state.items() if n.startswith("vision_model.")}
    for name, value in tower.items():
        if name == "embeddings.class_embedding":
            out["cls_token"] = value.reshape(1, 1, -1)
        elif name == "embeddings.position_embedding.weight":
            out["pos_embed"] = value[None]
        elif match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            qkv = [tower[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            out[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = torch.cat(qkv)
        elif not re.search(r"[kv]_proj\.|position_ids$", name):
            for old, new in renames:
                name = name.replace(old, new)
            out[name] = value
    return out


def onnx_weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights of an ONNX graph by parameter name, dequantised, linear matrices as torch keeps them ([out, in]).

    Exporters fold a linear layer's transposed matrix into an anonymous constant. Its name is recovered from the bias that is
    added to the product: `x @ constant -> ... -> + fc1.bias` makes it `fc1.weight`. Quantised matrices (`MatMulInteger`) are
    (q - zero_point) * scale with one zero point and one scale an output column (ONNX operator specification).
    """
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def bias_after(node: Any) -> str | None:
        for _ in range(4):  # MatMulInteger is followed by a cast and the multiplication by both scales
            following = users.get(node.output[0], [])
            if len(following) != 1:
                return None
            node = following[0]
            if node.op_type == "Add":
                return next((name for name in node.input if name in constants and name.endswith(".bias")), None)
            if node.op_type not in ("Cast", "Mul"):
                return None
        return None

    weights = {
        name: torch.from_numpy(value.copy())
        for name, value in constants.items()
        if "::" not in name and name.endswith((".weight", ".bias", ".gamma", "class_embedding", "cls_token"))
    }
    for node in graph.node:
        if node.op_type not in ("MatMul", "MatMulInteger") or node.input[1] not in constants:
            continue
        bias = bias_after(node)
        if bias is None:
            continue  # CLIP's projection into the space shared with text: no bias, not part of the encoder
        matrix = constants[node.input[1]]
        if node.op_type == "MatMulInteger":
            zero_point = constants[node.input[3]].astype("int32")
            scale = constants[node.input[1].removesuffix("_quantized") + "_scale"]
            matrix = (matrix.astype("int32") - zero_point).astype("float32") * scale
        weights[bias.removesuffix("bias") + "weight"] = torch.from_numpy(matrix.T.copy())
    return weights


def _onnx_position_embedding(path: Path) -> torch.Tensor:
    """DINOv2's position embedding, [1, 1 + patches, dim]: the class token's row joined to the patch rows."""
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        # The exporter stores equal tensors once: an Identity stands for the second name.
        if node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    rows = [v for n, v in constants.items() if n.startswith("onnx::Reshape") and v.ndim == 3 and v.shape[0] == 1]
    first = [v for n, v in constants.items() if n.startswith("onnx::Concat") and v.ndim == 3 and v.shape[:2] == (1, 1)]
    if len(rows) != 1 or len(first) != 1:
        raise ConversionError(f"{path.name}: no position embedding found")
    return torch.cat([torch.from_numpy(first[0].copy()), torch.from_numpy(rows[0].copy())], dim=1)


def _safetensors(source: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(source.rglob("*.safetensors"))
    if not files:
        raise ConversionError("the model has no *.safetensors; pickled weights are not loaded")
    return {name: value for path in files for name, value in load_file(path).items()}


# Files


def only(source: Path, pattern: str) -> Path:
    """The file below `source` that matches `pattern`; the topmost one where several do."""
    found = sorted(source.rglob(pattern), key=lambda path: (len(path.parts), path))
    if not found:
        raise ConversionError(f"no {pattern} among the published files")
    return found[0]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    function.__name__: function for function in (llama_gguf, transformers_folder, clip_onnx, clip_transformers, dinov2_onnx)
}
