"""Answers drawn by vLLM instead of this project's own decoder: for GPUs, where its batching is the faster.

The engine runs in this process beside the policy (`pip install mmgpt[vllm]`). Before every draw it is given the policy's weights,
adapters merged; prompts come as embeddings, so that pictures need no support of its own. What is learnt from the answers does not
depend on who drew them: their probabilities are taken again by the training forward (`mmgpt.stages.ppo`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmgpt.errors import UsageError
from mmgpt.model.adapters import merged_weight

if TYPE_CHECKING:
    from mmgpt.model.multimodal import MultimodalGPT


class VllmEngine:
    """vLLM in this process.

    Args:
        model: The policy.
        memory: Share of the GPU's memory that the engine may take; the policy and what it learns with need the rest.

    Raises:
        UsageError: vLLM is not installed.
    """

    def __init__(self, model: MultimodalGPT, memory: float = 0.3):
        # Weights are handed over as tensors, which takes an engine in this process.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise UsageError(
                f"ppo.engine vllm: {error}; install it with `pip install 'mmgpt[vllm]'`, or leave ppo.engine at own"
            ) from error
        self._vllm = vllm
        kinds = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
        kind = torch.bfloat16 if model.device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        self.dtype = kind
        with tempfile.TemporaryDirectory() as folder:
            write_merged(model.language, Path(folder))
            self.engine = vllm.LLM(
                model=folder,
                skip_tokenizer_init=True,
                enable_prompt_embeds=True,
                enable_prefix_caching=False,  # what it keeps is of weights that are no longer there
                dtype=kinds[kind],
                max_model_len=model.context,
                gpu_memory_utilization=memory,
                logprobs_mode="processed_logprobs",  # at the temperature, as the tokens are drawn
            )

    def draw(
        self,
        model: MultimodalGPT,
        prompts: Sequence[Tensor],
        owners: Sequence[int],
        limits: Sequence[int],
        seeds: Sequence[int],
        temperature: float,
    ) -> list[tuple[list[int], list[float]]]:
        """Draw answers from the policy as it is now.

        Args:
            model: The policy.
            prompts: Input embeddings of each prompt, [L, H].
            owners: For each answer, its prompt.
            limits: Most tokens of each answer.
            seeds: Of each answer.
            temperature: Divides the logits.

        Returns:
            For each answer its tokens, the end token included where it was drawn, and their log-probabilities.
        """
        self.engine.apply_model(lambda served: _load(served, model.language))
        end, image = model.tokenizer.eos_id, model.tokenizer.image_id
        forbidden = {image: -100.0} if image < model.language.get_output_embeddings().weight.shape[0] else None
        settings = [
            self._vllm.SamplingParams(
                temperature=temperature,
                max_tokens=limit,
                seed=seed,
                stop_token_ids=[end],
                logprobs=0,
                logit_bias=forbidden,
                detokenize=False,
            )
            for limit, seed in zip(limits, seeds)
        ]
        asked = [{"prompt_embeds": prompts[owner].detach().to(self.dtype).cpu()} for owner in owners]
        found = [answer.outputs[0] for answer in self.engine.generate(asked, settings, use_tqdm=False)]
        return [
            (list(one.token_ids), [float(step[token].logprob) for token, step in zip(one.token_ids, one.logprobs)])
            for one in found
        ]


def _load(served: Any, language: Any) -> None:
    served.load_weights(merged_weights(language))


def merged_weights(language: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a language model as they would be without adapters, by the names that transformers stores them under."""
    from peft.tuners.lora import LoraLayer

    adapted = {f"{name}.base_layer.weight": layer for name, layer in language.named_modules() if isinstance(layer, LoraLayer)}
    for name, weight in language.named_parameters():
        if ".lora_" not in name:
            layer = adapted.get(name)
            yield name.replace(".base_layer.", "."), weight.detach() if layer is None else merged_weight(layer)


def write_merged(language: Any, folder: Path) -> None:
    """Write a language model without its adapters as transformers and vLLM read it: config.json and model.safetensors."""
    from safetensors.torch import save_file

    weights = {name: weight.contiguous().cpu() for name, weight in merged_weights(language)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = type(language.config).from_dict(language.config.to_dict())
    config.architectures = [type(language).__name__]
    config.save_pretrained(folder)
