"""The decoder-only language model: any of transformers', pretrained or from scratch."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmgpt.config import LanguageConfig
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.errors import UsageError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmgpt.model.attention import Segments


def load_tokenizer(config: LanguageConfig) -> Tokenizer:
    """The tokenizer a configuration names: `bytes`, or the one beside the weights."""
    if config.tokenizer == "bytes" or (config.tokenizer is None and config.architecture is not None):
        return Tokenizer.bytes()
    from mmgpt import artifacts

    return Tokenizer.load(artifacts.resolve(config.tokenizer or config.name, kind="language"))


def load_language(config: LanguageConfig, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The language model a configuration names, in single precision; in another where it is only to answer.

    Raises:
        UserError: the part cannot be found or read.
    """
    if config.architecture is not None:
        return make_language(config.architecture, tokenizer)
    from transformers import AutoModelForCausalLM

    from mmgpt import artifacts

    folder = Path(artifacts.resolve(config.name, kind="language"))
    try:
        with _no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
            )
    except Exception as error:
        raise UserError(f"{folder} is not a language model that transformers reads: {error}") from error
    language, found = loaded
    if found["missing_keys"]:
        # transformers only warns, and leaves them random.
        raise UserError(f"{folder} lacks weights: {', '.join(sorted(found['missing_keys'])[:3])}; copy it again")
    for parameter in language.parameters():
        if parameter.dim() == 1:
            # In a half-precision file the norms are stored in single: read in place, they alone would keep all of it mapped.
            parameter.data = parameter.data.clone()
    return with_attention(language)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Without transformers' bar: reading takes a second, and stderr is for what a person has to know."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def make_language(architecture: dict[str, Any], tokenizer: Tokenizer, *, initialize: bool = True) -> PreTrainedModel:
    """A GPT from a transformers configuration, without pretrained weights.

    Weights are N(0, 0.02), and the projections back into the residual stream N(0, 0.02 / sqrt(2 layers)) (GPT-2, Radford et
    al. 2019, section 2.3), whatever the architecture.

    Args:
        architecture: Arguments of the configuration, `model_type` among them; a missing `vocab_size` is the tokenizer's.
        tokenizer: Gives the vocabulary its size.
        initialize: Draw the weights; without, the caller loads them.

    Raises:
        UsageError: transformers knows no such architecture or argument.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": tokenizer.text_vocabulary, **architecture}
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise UsageError("model.language.architecture needs model_type, for example llama or gpt2")
    settings.update(bos_token_id=None, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    try:
        config = AutoConfig.for_model(model_type, **settings)
        if initialize:
            _reject_unknown(AutoConfig.for_model(model_type), architecture)
        language = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except UsageError:
        raise
    except Exception as error:
        # transformers checks a configuration with exception types of its own.
        raise UsageError(f"model.language.architecture: {error}") from error
    if initialize:
        scaled = 0.02 / math.sqrt(2 * config.num_hidden_layers)
        for name, parameter in language.named_parameters():
            if parameter.dim() >= 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight"))
                nn.init.normal_(parameter, std=scaled if residual else 0.02)
    return with_attention(language)


SEGMENTED = {"llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "olmo2", "phi3"}
"""Architectures whose attention is softmax(q k^T scale) v and nothing else, and is called through transformers' registry."""


def with_attention(language: PreTrainedModel) -> PreTrainedModel:
    """Let attention go by samples (`mmgpt.model.attention`) where the architecture allows it, else leave it to sdpa."""
    if language.config.model_type in SEGMENTED:
        from mmgpt.model import attention

        language.set_attn_implementation(attention.register())
    return language


def by_segments(language: PreTrainedModel) -> bool:
    """Whether a forward should be given `Segments`: on a CPU, without a sliding window."""
    from mmgpt.model import attention

    settings: Any = language.config
    kinds = set(getattr(settings, "layer_types", None) or [])
    window = getattr(settings, "sliding_window", None) is not None and kinds != {"full_attention"}
    cpu = next(language.parameters()).device.type == "cpu"
    return cpu and not window and settings._attn_implementation == attention.NAME


def _reject_unknown(defaults: Any, architecture: dict[str, Any]) -> None:
    """transformers takes any argument: a misspelt one would leave its default, the size of a 7B model, in place."""
    for name in architecture.keys() - {"model_type"}:
        if not hasattr(defaults, name):
            near = difflib.get_close_matches(name, defaults.to_dict(), 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UsageError(f"model.language.architecture: {defaults.model_type} has no argument {name}{hint}")


def width_of(language: PreTrainedModel) -> int:
    """Width H of an input embedding."""
    embedding: Any = language.get_input_embeddings()
    return int(embedding.embedding_dim)


def logits_of(language: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Final hidden states [..., H] -> next-token logits [..., V] in fp32."""
    logits = language.get_output_embeddings()(hidden).float()
    cap = getattr(language.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def hidden_states(
    language: PreTrainedModel,
    embeds: torch.Tensor,
    position_ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    segments: Segments | None = None,
) -> torch.Tensor:
    """Run the decoder blocks.

    Args:
        language: The language model.
        embeds: [B, L, H].
        position_ids: [B, L]; None counts from 0 in every row.
        mask: [B, 1, L, L] bool (`packing.block_mask`), or None for plain causal attention, which has the faster kernel and is
            right wherever a row holds one sample with its padding behind it.
        segments: Where the samples stand; takes the place of `mask` (see `by_segments`).

    Returns:
        [B, L, H], behind the final norm.
    """
    base: Any = language.base_model
    if segments is not None:
        # Any 4-D mask keeps transformers from making one of its own.
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
        out = base(
            inputs_embeds=embeds, position_ids=position_ids, attention_mask=unread, use_cache=False, segments=segments
        ).last_hidden_state
        if segments.calls < language.config.num_hidden_layers:
            raise RuntimeError(f"{type(base).__name__} attended past the samples of its batch; see language.SEGMENTED")
        return out
    masks = None if mask is None else _layer_masks(language.config, mask)
    # With a cache transformers would rebuild its own mask and leak between packed samples.
    return base(inputs_embeds=embeds, position_ids=position_ids, attention_mask=masks, use_cache=False).last_hidden_state


def shares_prompts(language: PreTrainedModel) -> bool:
    """Whether answers in one row may share their prompt: a sliding window counts places in a row, not positions."""
    return getattr(language.config, "sliding_window", None) is None


def _layer_masks(config: Any, mask: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask as each kind of layer needs it: transformers narrows only masks of its own making to a sliding window."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is None or kinds == {"full_attention"}:
        return mask
    place = torch.arange(mask.shape[-1], device=mask.device)
    near = mask & (place[:, None] - place[None, :] < window)
    return near if kinds == {"sliding_attention"} else {"full_attention": mask, "sliding_attention": near}
