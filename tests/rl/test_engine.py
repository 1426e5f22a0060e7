"""The vLLM engine against this project's own decoder, with a stand-in for vLLM that reads what it is given with transformers.

vLLM itself runs on GPUs only: what is tested is everything that goes into it and comes out of it.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import enliven, noise, tiny_model
from transformers import AutoModelForCausalLM

from mmgpt.data.messages import user
from mmgpt.errors import UsageError
from mmgpt.rl.engine import VllmEngine, merged_weights, write_merged
from mmgpt.rl.rollout import draw

COLD = 1e-4  # the likeliest token, whatever the random numbers
PROMPTS: list[Any] = [[user("a")], [user("what is it?", [noise(1)])], [user("a longer question than the others, by far")]]


class SamplingParams(SimpleNamespace):
    pass


class Served:
    """What vLLM calls the model."""

    def __init__(self, language: Any):
        self.language = language

    def load_weights(self, weights: Any) -> None:
        there = dict(self.language.named_parameters())
        given = dict(weights)
        assert given.keys() == there.keys()
        with torch.no_grad():
            for name, weight in given.items():
                there[name].copy_(weight)


class LLM:
    """Reads the folder, and answers one prompt after another by whole forwards."""

    def __init__(self, model: str, **settings: Any):
        assert settings["enable_prompt_embeds"] and settings["skip_tokenizer_init"] and not settings["enable_prefix_caching"]
        assert settings["logprobs_mode"] == "processed_logprobs"
        self.settings = settings
        self.language = AutoModelForCausalLM.from_pretrained(model).eval()

    def apply_model(self, function: Any) -> list[Any]:
        return [function(Served(self.language))]

    def generate(self, prompts: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
        return [SimpleNamespace(outputs=[self._answer(one["prompt_embeds"], how)]) for one, how in zip(prompts, settings)]

    @torch.no_grad()
    def _answer(self, embeds: Any, how: Any) -> Any:
        generator = torch.Generator().manual_seed(how.seed)
        ids: list[int] = []
        chances = []
        while len(ids) < how.max_tokens and not (ids and ids[-1] in how.stop_token_ids):
            logits = self.language(inputs_embeds=embeds[None]).logits[0, -1].double()
            for token, bias in (how.logit_bias or {}).items():
                logits[token] += bias
            spread = (logits / how.temperature).log_softmax(-1)
            ids.append(int(torch.multinomial(spread.exp(), 1, generator=generator)))
            chances.append({ids[-1]: SimpleNamespace(logprob=float(spread[ids[-1]]))})
            embeds = torch.cat([embeds, self.language.get_input_embeddings()(torch.tensor(ids[-1:]))])
        return SimpleNamespace(token_ids=tuple(ids), logprobs=chances)


@pytest.fixture
def stand_in(monkeypatch):
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)


def adapted(family: str = "llama") -> Any:
    model = tiny_model(family)
    model.config.language.lora.rank = 2
    model.add_adapters()
    enliven(model, seed=1, scale=0.1)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_likeliest_answers_are_the_decoders(stand_in, family):
    """With pictures and adapters; and again after the adapters learnt something."""
    model = adapted(family)
    engine = VllmEngine(model)
    for seed in (2, 3):
        own = draw(model, PROMPTS, samples=2, max_new_tokens=8, temperature=COLD, seed=0)
        other = draw(model, PROMPTS, samples=2, max_new_tokens=8, temperature=COLD, seed=0, engine=engine)
        assert torch.equal(own.tokens, other.tokens) and torch.equal(own.mask, other.mask)
        assert own.texts == other.texts and torch.equal(own.ended, other.ended)
        enliven(model, seed=seed, scale=0.3)


def test_drawn_answers_have_the_probabilities_that_the_training_forward_sees(stand_in):
    from test_rollout import again

    model = adapted()
    rollout = draw(model, PROMPTS, samples=3, max_new_tokens=8, temperature=0.8, seed="run/0", engine=VllmEngine(model))
    with torch.no_grad():
        assert torch.allclose(again(model, rollout, 0.8).log_probs, rollout.log_probs, atol=1e-4)
    assert len(set(rollout.texts)) > 3, "every answer has random numbers of its own"
    once_more = draw(model, PROMPTS, samples=3, max_new_tokens=8, temperature=0.8, seed="run/0", engine=VllmEngine(model))
    assert once_more.texts == rollout.texts


def test_merged_weights_are_those_of_the_adapted_model(tmp_path):
    model = adapted()
    write_merged(model.language, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.language.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    assert {name for name, _ in merged_weights(model.language)} == {name for name, _ in plain.named_parameters()}


def test_without_vllm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"pip install 'mmgpt\[vllm\]'"):
        VllmEngine(tiny_model(vision=False))
