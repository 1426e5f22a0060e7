"""Converters against independent readers: transformers' GGUF loader and CLIP, the ONNX definition of dequantisation."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmgpt import convert


def byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def write_gguf(path: Path, *, tied: bool = True, pre: str = "smollm", model: str = "gpt2") -> torch.nn.Module:
    """A tiny random Llama in GGUF: one matrix in Q8_0, the others in float32."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = [*SPECIAL, *byte_alphabet(), "ĠĠ", "Ġa"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
    )
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in llama.parameters():
            weight.copy_(torch.randn_like(weight) * 0.2)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in llama.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        value = weight.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:
                value = value.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(value.shape)
        kind = None
        if "down_proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            value = gguf.quantize(value, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(value), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return llama


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_equals_transformers_reader(folders: tuple[Path, Path], tied: bool) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    source, target = folders
    original = write_gguf(source / "tiny.gguf", tied=tied)
    convert.llama_gguf(source, target)
    reference = AutoModelForCausalLM.from_pretrained(
        source, gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    stored = load_file(target / "model.safetensors")
    expected = reference.state_dict()
    assert ("lm_head.weight" in stored) is not tied
    for name, value in stored.items():
        assert value.dtype == (torch.float32 if name.endswith("norm.weight") else torch.float16)
        assert torch.equal(value, expected[name].to(value.dtype)), name
    ours = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, reference.eval()(ids).logits, atol=0.02)
        assert torch.allclose(ours(ids).logits, original(ids).logits, atol=0.1)
    assert ours.config.num_key_value_heads == 2 and ours.config.rms_norm_eps == 1e-5


def test_gguf_tokenizer(folders: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    source, target = folders
    write_gguf(source / "tiny.gguf")
    convert.llama_gguf(source, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.tokenize("x<|im_end|>") == ["x", "<|im_end|>"]
    # Digits are split off first, so the two blanks in front stay one token (a plain byte-level split gives two).
    assert tokenizer.tokenize("b  12") == ["b", "ĠĠ", "1", "2"]
    text = "Ünï 🙂\n\t日本 3.14"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_start|>", "<|im_end|>", 64)
    assert json.loads((target / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("wrong", [{"pre": "qwen2"}, {"model": "llama"}])
def test_gguf_with_another_tokenizer_is_refused(folders: tuple[Path, Path], wrong: dict[str, str]) -> None:
    source, target = folders
    write_gguf(source / "tiny.gguf", **wrong)
    with pytest.raises(convert.ConversionError, match="tokenizer"):
        convert.llama_gguf(source, target)


def test_transformers_folder_takes_safetensors_only(folders: tuple[Path, Path]) -> None:
    source, target = folders
    inner = source / "package" / "model"
    (inner / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", "pytorch_model.bin", "run.py", ".hidden.json"):
        (inner / name).write_text("{}")
    with pytest.raises(convert.ConversionError, match="pickle"):
        convert.transformers_folder(source, target)
    save_file({"w": torch.zeros(1)}, inner / "model.safetensors")
    convert.transformers_folder(source, target)
    copied = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert copied == {"config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors"}


def test_clip_names_give_the_same_features_in_timm(tmp_path: Path) -> None:
    from timm.layers import QuickGELU
    from timm.models.vision_transformer import VisionTransformer
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    with torch.no_grad():
        for weight in clip.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    clip.save_pretrained(tmp_path)
    state = convert.clip_to_timm(load_file(tmp_path / "model.safetensors"))
    ours = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
        mlp_ratio=2,
        num_classes=0,
        pre_norm=True,
        act_layer=QuickGELU,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
    ).eval()
    ours.load_state_dict(state, strict=True)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = clip.vision_model(pixel_values=pixels, output_hidden_states=True)
        _, found = ours.forward_intermediates(pixels, norm=False, output_fmt="NLC", return_prefix_tokens=True)
        for index, (patches, prefix) in enumerate(found):
            hidden = torch.cat([prefix, patches], dim=1)
            assert torch.allclose(hidden, expected.hidden_states[index + 1], atol=1e-5)
        assert torch.allclose(ours(pixels), expected.pooler_output, atol=1e-5)


def onnx_file(path: Path) -> dict[str, np.ndarray]:
    """x @ A + fc1.bias in fp32, then a quantised product + fc2.bias, then a projection without a bias."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    arrays = {
        "onnx::MatMul_1": rng.normal(size=(4, 6)).astype("float32"),
        "fc1.bias": rng.normal(size=6).astype("float32"),
        "norm.weight": rng.normal(size=6).astype("float32"),
        "onnx::MatMul_2_quantized": rng.integers(-128, 128, size=(6, 5)).astype("int8"),
        "onnx::MatMul_2_scale": rng.uniform(0.01, 0.1, size=5).astype("float32"),
        "onnx::MatMul_2_zero_point": rng.integers(-100, 100, size=5).astype("int8"),
        "fc2.bias": rng.normal(size=5).astype("float32"),
        "onnx::MatMul_3": rng.normal(size=(5, 3)).astype("float32"),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"]),
        helper.make_node("Add", ["fc1.bias", "a"], ["b"]),
        helper.make_node("Mul", ["b", "norm.weight"], ["b2"]),
        helper.make_node("DynamicQuantizeLinear", ["b2"], ["bq", "bs", "bz"]),
        helper.make_node("Mul", ["bs", "onnx::MatMul_2_scale"], ["scales"]),
        helper.make_node("MatMulInteger", ["bq", "onnx::MatMul_2_quantized", "bz", "onnx::MatMul_2_zero_point"], ["c"]),
        helper.make_node("Cast", ["c"], ["d"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["d", "scales"], ["e"]),
        helper.make_node("Add", ["e", "fc2.bias"], ["f"]),
        helper.make_node("MatMul", ["f", "onnx::MatMul_3"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 3])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), str(path))
    return arrays


def test_onnx_weights_names_from_biases_and_dequantises(tmp_path: Path) -> None:
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    arrays = onnx_file(tmp_path / "m.onnx")
    weights = convert.onnx_weights(tmp_path / "m.onnx")
    assert set(weights) == {"fc1.weight", "fc1.bias", "norm.weight", "fc2.weight", "fc2.bias"}
    assert np.array_equal(weights["fc1.weight"].numpy(), arrays["onnx::MatMul_1"].T)
    # ONNX's own DequantizeLinear, one scale and zero point a column.
    node = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1)
    quantised = {key: arrays[f"onnx::MatMul_2_{name}"] for key, name in (("q", "quantized"), ("s", "scale"), ("z", "zero_point"))}
    (expected,) = ReferenceEvaluator(node).run(None, quantised)
    assert np.allclose(weights["fc2.weight"].numpy(), expected.T, atol=1e-6)


def test_write_vision_checks_every_tensor(folders: tuple[Path, Path]) -> None:
    import timm

    _, target = folders
    config = {"architecture": "test_vit", "library": "timm", "image_size": 160}
    state = timm.create_model("test_vit", pretrained=False, num_classes=0).state_dict()
    convert.write_vision(target, {name: value.half() for name, value in state.items()}, config)
    assert json.loads((target / "config.json").read_text()) == config
    assert {value.dtype for value in load_file(target / "model.safetensors").values()} == {torch.float32}
    with pytest.raises(convert.ConversionError, match=r"pos_embed"):
        convert.write_vision(target, {**state, "pos_embed": state["pos_embed"][:, 1:]}, config)
    with pytest.raises(convert.ConversionError, match=r"norm\.bias"):
        convert.write_vision(target, {name: value for name, value in state.items() if name != "norm.bias"}, config)


def test_clip_without_safetensors_is_refused(folders: tuple[Path, Path]) -> None:
    source, target = folders
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(convert.ConversionError, match="pickle"):
        convert.clip_transformers(source, target)
