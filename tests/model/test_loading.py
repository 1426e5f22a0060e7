"""`mmgpt.load` in every precision."""

import pytest
import torch
from tiny_models import noise, tiny_model

import mmgpt
from mmgpt.data.messages import user
from mmgpt.errors import UsageError
from mmgpt.generate import Sampling
from mmgpt.machine import has_bf16

bf16 = pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="needs a CPU with bf16 instructions")
fbgemm = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs fbgemm")


def first_logits(model, conversation):
    prompt = model.embed_prompts([conversation])[0]
    return model.decoder.prefill(prompt[None], torch.tensor([len(prompt)]))[0][0]


@pytest.mark.parametrize(
    "precision, error",
    [
        ("fp32", 0.0),
        pytest.param("bf16", 0.05, marks=bf16),
        pytest.param("int8", 0.05, marks=bf16),
        pytest.param("fp16", 0.005, marks=fbgemm),
    ],
)
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_every_precision_answers_nearly_as_fp32(family, precision, error, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    conversation = [user("What is this?", [noise(1)])]
    exact = mmgpt.load(tmp_path, device="cpu", precision="fp32")
    loaded = mmgpt.load(tmp_path, device="cpu", precision=precision)
    expected, logits = first_logits(exact, conversation), first_logits(loaded, conversation)
    assert (logits - expected).std() <= error * expected.std()
    # Where the language model is a copy, its own matrices are gone.
    assert (loaded.language.model.layers[0].mlp.up_proj.weight.numel() == 0) == (precision != "fp32")
    answer = loaded.generate([conversation] * 6, sampling=Sampling(max_new_tokens=5))
    assert {row.answer_tokens for row in answer} <= set(range(1, 6))


def test_an_unknown_precision_names_those_there_are(tmp_path):
    with pytest.raises(UsageError, match="choose auto, fp32, bf16, fp16 or int8"):
        mmgpt.load(tmp_path, precision="int4")
