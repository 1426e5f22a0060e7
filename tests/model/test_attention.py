"""Attention by samples against torch's own with a block mask: values, gradients, and whole models of every family."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, grads, make_batch, noise, talk, tiny_model
from torch.nn import functional as F

from mmgpt.data.packing import block_mask
from mmgpt.model import attention
from mmgpt.model.attention import Segments, attend
from mmgpt.model.language import SEGMENTED, by_segments, make_language


def segment_ids(rows):
    """Rows of sample lengths -> [B, L]."""
    ids = torch.zeros(len(rows), max(sum(row) for row in rows), dtype=torch.long)
    for row, lengths in enumerate(rows):
        at = 0
        for number, length in enumerate(lengths, start=1):
            ids[row, at : at + length] = number
            at += length
    return ids


def compare(rows, heads=6, kv_heads=2, width=8):
    ids = segment_ids(rows)
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randn(*ids.shape, count, width, generator=generator).transpose(1, 2).requires_grad_()

    query, key, value = draw(heads), draw(kv_heads), draw(kv_heads)
    output = attend(None, query, key, value, None, scaling=0.3, segments=Segments.of(ids))[0]
    repeated = [x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value)]
    expected = F.scaled_dot_product_attention(query, *repeated, block_mask(ids), scale=0.3).transpose(1, 2)
    real = ids > 0
    torch.testing.assert_close(output[real], expected[real], atol=1e-5, rtol=1e-5)
    weight = torch.randn(expected.shape, generator=generator) * real[..., None, None]
    found = torch.autograd.grad((output * weight).sum(), (query, key, value))
    for gradient, wanted in zip(found, torch.autograd.grad((expected * weight).sum(), (query, key, value))):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=4))
def test_equals_attention_under_a_block_mask(rows):
    compare(rows)


def test_one_long_sample_among_short_ones_is_a_group_of_its_own():
    rows = [[200, 3, 5], [4] * 30]
    segments = Segments.of(segment_ids(rows))
    assert segments.groups is not None and len(segments.groups) > 1
    # Few slots are filler, where one block would hold 33 x 200 of them.
    assert sum(len(group.take) for group in segments.groups) < 2 * sum(map(sum, rows))
    compare(rows)


def test_long_samples_go_through_the_fused_kernel(monkeypatch):
    monkeypatch.setattr(attention, "LONGEST", 16)
    monkeypatch.setattr(torch, "bmm", None)
    compare([[20, 30], [17]])


@pytest.mark.parametrize("family", sorted(SEGMENTED))
def test_every_architecture_that_is_let_in(family):
    """The whole model by segments equals the whole model under transformers' sdpa and a block mask."""
    if family not in ARCHITECTURES:
        settings_of = {**ARCHITECTURES["llama"], "model_type": family, "pad_token_id": 0}
    else:
        settings_of = {k: v for k, v in ARCHITECTURES[family].items() if k != "sliding_window"}
        if family == "mistral":
            settings_of["sliding_window"] = None
    model = tiny_model("llama")
    torch.manual_seed(1)
    model.language = make_language(settings_of, model.tokenizer)
    with torch.no_grad():
        for parameter in model.language.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.language.eval()
    answers = ("A pear.", "A plum, I think, on a plate.", "No.")
    talks = [talk([noise(n), "What is it?"], answer) for n, answer in enumerate(answers)]
    batch = make_batch(model, [talks[:2], talks[2:]])
    assert by_segments(model.language)
    found = model.loss(batch)
    found.loss.backward()
    gradients = grads(model)
    model.zero_grad(set_to_none=True)
    model.language.set_attn_implementation("sdpa")
    assert not by_segments(model.language)
    expected = model.loss(batch)
    expected.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-5)
    for name, gradient in grads(model).items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_sliding_windows_stay_with_the_mask(family):
    assert not by_segments(tiny_model(family).language)


def test_an_architecture_that_goes_its_own_way_is_an_error(monkeypatch):
    """Were segments ignored, documents would leak without a word."""
    model = tiny_model("llama")
    monkeypatch.setattr(model.language.config, "_attn_implementation", "sdpa")
    monkeypatch.setattr("mmgpt.model.multimodal.by_segments", lambda language: True)
    with pytest.raises(RuntimeError, match="SEGMENTED"):
        model(make_batch(model, [[talk("Hi", "Yes."), talk("Ho", "No.")]]))
