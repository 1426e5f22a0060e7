"""The decoder against transformers' own forward, on tiny random models."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mmgpt.errors import UsageError
from mmgpt.machine import has_bf16
from mmgpt.model import decoder as decoder_module
from mmgpt.model.decoder import Decoder, LlamaDecoder, TransformersDecoder
from mmgpt.model.products import quantize

BASE = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**{**BASE, "max_position_embeddings": 512, **options}))


MODELS = {
    "plain": lambda: llama(),
    "grouped": lambda: llama(num_key_value_heads=2, tie_word_embeddings=True),
    "one kv head, biases": lambda: llama(num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "wide heads, large eps": lambda: llama(head_dim=16, rms_norm_eps=0.3, hidden_act="gelu"),
    "rope theta": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    "rope linear": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}),
    "rope llama3": lambda: llama(rope_parameters=LLAMA3),
    "rope yarn": lambda: llama(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**BASE, num_key_value_heads=3, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**BASE, num_key_value_heads=2)),
}
OTHERS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4, n_positions=128)),
    "rope dynamic": lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    "window": lambda: MistralForCausalLM(MistralConfig(**BASE, num_key_value_heads=3, sliding_window=8)),
}


def build(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        # The small initial weights make every token about as likely; these do not.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def padded(model, rows):
    """Left-padded embeddings of id rows, with noise where the padding is, and the lengths."""
    length = max(len(row) for row in rows)
    embeds = torch.randn(len(rows), length, model.config.hidden_size)
    with torch.no_grad():
        for index, row in enumerate(rows):
            embeds[index, length - len(row) :] = model.get_input_embeddings()(row)
    return embeds, torch.tensor([len(row) for row in rows])


def random_rows(*lengths):
    torch.manual_seed(1)
    return [torch.randint(97, (length,)) for length in lengths]


def full(model, ids):
    with torch.no_grad():
        return model(ids[None]).logits[0, -1]


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_cached_and_padded_equals_full_forward(name):
    model = build({**MODELS, **OTHERS}[name])
    rows = random_rows(11, 4, 1, 7)
    expected = [[full(model, row)] for row in rows]
    following = torch.randint(97, (4, 6))
    for index, row in enumerate(rows):
        for count in range(1, 7):
            expected[index].append(full(model, torch.cat((row, following[index, :count]))))
    decoder = Decoder.from_language(model)
    assert isinstance(decoder, LlamaDecoder if name in MODELS else TransformersDecoder)
    logits, cache = decoder.prefill(*padded(model, rows), reserve=2)
    for count in range(7):
        torch.testing.assert_close(logits, torch.stack([row[count] for row in expected]), atol=1e-5, rtol=1e-5)
        if count < 6:
            logits = decoder.step(following[:, count], cache)


@pytest.mark.parametrize("name", ["grouped", "gpt2"])
def test_dropped_rows_change_nothing_for_the_others(name):
    model = build({**MODELS, **OTHERS}[name])
    decoder = Decoder.from_language(model)
    rows = random_rows(9, 3, 5)
    tokens = torch.tensor([5, 6, 7])
    whole, cache = decoder.prefill(*padded(model, rows))
    whole = decoder.step(tokens, cache)
    _, fewer = decoder.prefill(*padded(model, rows))
    fewer.keep(torch.tensor([2, 0]))
    torch.testing.assert_close(decoder.step(tokens[[2, 0]], fewer), whole[[2, 0]], atol=1e-5, rtol=1e-5)


def test_cache_grows(monkeypatch):
    monkeypatch.setattr(decoder_module, "GROWTH", 3)
    model = build(MODELS["grouped"])
    decoder = Decoder.from_language(model)
    rows = random_rows(4, 2)
    tokens = torch.randint(97, (2, 11))
    _, cache = decoder.prefill(*padded(model, rows), reserve=1)
    for column in tokens.T:
        logits = decoder.step(column, cache)
    expected = torch.stack([full(model, torch.cat((row, new))) for row, new in zip(rows, tokens)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (cache.length, cache.capacity) == (15, 17)


def test_two_caches_of_one_decoder_do_not_meet():
    model = build(MODELS["plain"])
    decoder = Decoder.from_language(model)
    first, second = random_rows(5, 8)
    logits, one = decoder.prefill(*padded(model, [first]))
    _, two = decoder.prefill(*padded(model, [second]))
    token = logits.argmax(-1)
    decoder.step(torch.tensor([3]), two)
    torch.testing.assert_close(decoder.step(token, one)[0], full(model, torch.cat((first, token))), atol=1e-5, rtol=1e-5)


def test_parameters_become_views_and_stay_a_working_model(tmp_path):
    model = build(MODELS["grouped"])
    ids = random_rows(6)[0]
    before, state = full(model, ids), {name: value.clone() for name, value in model.state_dict().items()}
    first, second = Decoder.from_language(model), Decoder.from_language(model)
    attention = model.model.layers[0].self_attn
    storage = attention.q_proj.weight.untyped_storage().data_ptr()
    assert attention.v_proj.weight.untyped_storage().data_ptr() == storage
    torch.testing.assert_close(full(model, ids), before, atol=1e-6, rtol=1e-6)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    # A training step after the decoder was built reaches it, whichever call built the views.
    model(ids[None], labels=ids[None]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.allclose(full(model, ids), before, atol=1e-3)
    for decoder in (first, second):
        logits, _ = decoder.prefill(*padded(model, [ids]))
        torch.testing.assert_close(logits[0], full(model, ids), atol=1e-5, rtol=1e-5)


fbgemm = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs fbgemm")


bf16 = pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="needs a CPU with bf16 instructions")


@fbgemm
@pytest.mark.parametrize("name", ["grouped", "one kv head, biases"])
def test_stored_in_half_precision(name):
    model = build(MODELS[name])
    rows = random_rows(12, 5)
    expected = torch.stack([full(model, torch.cat((row, torch.tensor([9])))) for row in rows])
    decoder = Decoder.from_language(model, "fp16")
    _, cache = decoder.prefill(*padded(model, rows))
    logits = decoder.step(torch.tensor([9, 9]), cache)
    assert 0 < (logits - expected).abs().max() < 0.02 * expected.std()
    assert (logits - expected).std() < 2e-3 * expected.std()


@fbgemm
def test_release_drops_the_matrices():
    model = build(MODELS["grouped"])
    ids = random_rows(6)[0]
    expected, _ = Decoder.from_language(model, "fp16").prefill(*padded(model, [ids]))
    decoder = Decoder.from_language(model, "fp16", release=True)
    assert model.model.layers[0].mlp.up_proj.weight.numel() == 0
    torch.testing.assert_close(decoder.prefill(*padded(model, [ids]))[0], expected)


@bf16
@pytest.mark.parametrize("weights", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["grouped", "one kv head, biases", "wide heads, large eps", "qwen2"])
def test_bf16_and_int8_against_the_rounded_model_in_fp32(name, weights):
    model = build(MODELS[name])
    decoder = Decoder.from_language(model, weights)
    matrices = {part: module for part, module in model.named_modules() if part.endswith(("_proj", "lm_head"))}
    with torch.no_grad():
        for part, matrix in matrices.items():
            values, scales = quantize(matrix.weight)
            rounded = weights == "int8" and not part.endswith("down_proj")
            matrix.weight.data = values * scales[:, None].float() if rounded else matrix.weight.bfloat16().float()
    rows = random_rows(11, 4, 1, 7, 3)  # more than the int8 kernel takes at once
    following = torch.randint(97, (5, 4))
    logits, cache = decoder.prefill(*padded(model, rows))
    for count in range(5):
        expected = torch.stack([full(model, torch.cat((row, new[:count]))) for row, new in zip(rows, following)])
        assert (logits - expected).std() < 0.02 * expected.std()
        if count == 2:
            cache.keep(torch.tensor([3, 0, 2]))
            rows, following, logits = [rows[index] for index in (3, 0, 2)], following[[3, 0, 2]], logits[[3, 0, 2]]
        if count < 4:
            logits = decoder.step(following[:, count], cache)


@bf16
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_batched_equals_single_in_bf16_and_int8(weights):
    model = build(MODELS["grouped"])
    decoder = Decoder.from_language(model, weights)
    rows = random_rows(9, 2, 5, 6, 1, 3)
    tokens = torch.randint(97, (6,))
    _, cache = decoder.prefill(*padded(model, rows))
    together = decoder.step(tokens, cache)
    for row, token, logits in zip(rows, tokens, together):
        _, cache = decoder.prefill(*padded(model, [row]))
        alone = decoder.step(token[None], cache)[0]
        assert (alone - logits).std() < 0.02 * logits.std()


@bf16
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_release_leaves_the_tied_embedding(weights):
    model = build(MODELS["grouped"])
    ids = random_rows(6)[0]
    expected, _ = Decoder.from_language(model, weights).prefill(*padded(model, [ids]))
    decoder = Decoder.from_language(model, weights, release=True)
    assert model.model.layers[0].self_attn.q_proj.weight.numel() == 0
    assert model.get_input_embeddings().weight.shape == (97, 48)
    logits, cache = decoder.prefill(*padded(model, [ids]))
    torch.testing.assert_close(logits, expected)
    decoder.step(torch.tensor([5]), cache)


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_without_bf16_instructions_its_formats_are_refused(weights, monkeypatch):
    monkeypatch.setattr(decoder_module, "has_bf16", lambda device: False)
    with pytest.raises(UsageError, match=f"weights {weights} need bf16 instructions"):
        Decoder.from_language(build(MODELS["grouped"]), weights)


@pytest.mark.parametrize("name", ["grouped", "gpt2"])
def test_bf16_model_on_any_machine(name):
    model = build({**MODELS, **OTHERS}[name]).bfloat16()
    ids = random_rows(6)[0]
    embeds = model.get_input_embeddings()(ids)[None].detach()
    logits, _ = Decoder.from_language(model, "auto").prefill(embeds, torch.tensor([6]))
    expected = full(model.float(), ids)
    assert (logits[0] - expected).abs().max() < 0.1 * expected.std()


def test_impossible_formats_are_refused():
    with pytest.raises(UsageError, match="'int4' is not one of auto"):
        Decoder.from_language(build(MODELS["plain"]), "int4")
    with pytest.raises(UsageError, match="GPT2LMHeadModel"):
        Decoder.from_language(build(OTHERS["gpt2"]), "fp16")


@pytest.mark.parametrize("name", OTHERS)
def test_transformers_own_forward_is_called_without_a_warning(name, recwarn):
    model = build(OTHERS[name])
    decoder = TransformersDecoder(model)
    logits, cache = decoder.prefill(model.get_input_embeddings()(torch.tensor([[3, 5, 7]])), torch.tensor([3]))
    decoder.step(logits.argmax(-1), cache)
    assert cache.data.get_seq_length() == 4
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, FutureWarning)] == []


def test_adapters_go_through_transformers():
    from peft import LoraConfig, inject_adapter_in_model

    model = build(MODELS["grouped"])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)
    model.eval()
    ids = random_rows(6)[0]
    decoder = Decoder.from_language(model)
    assert isinstance(decoder, TransformersDecoder)
    logits, _ = decoder.prefill(*padded(model, [ids]))
    torch.testing.assert_close(logits[0], full(model, ids), atol=1e-5, rtol=1e-5)
