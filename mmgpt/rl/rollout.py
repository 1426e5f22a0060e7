"""Answers drawn from the policy, with what is needed to learn from them.

Drawing goes through the decoder with a cache (`draw`), learning through the model's own forward (`replay`); both see the same
distribution: the whole vocabulary at the sampling temperature, without the image token, which no answer can hold.

Letters in shapes: N answers, T tokens of the longest of them, n of them in a minibatch, H width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmgpt.data.messages import Message, normalize
from mmgpt.data.packing import Batch, collate
from mmgpt.data.template import Encoded
from mmgpt.errors import UsageError, UserError
from mmgpt.model.language import logits_of
from mmgpt.rl.losses import entropy_of, log_probs_of

if TYPE_CHECKING:
    from mmgpt.model.decoder import Decoder
    from mmgpt.model.multimodal import MultimodalGPT
    from mmgpt.rl.engine import VllmEngine


@dataclass
class Rollout:
    """Answers to prompts, several to each.

    Args:
        prompts: [N] conversations; the answers to one stand together.
        encoded: [N] their tokens and images.
        tokens: [N, T] long, what was drawn; the pad id behind the end of an answer.
        mask: [N, T] bool, True on what was drawn, the end token included.
        log_probs: [N, T], of the tokens under the distribution they were drawn from, as the decoder saw it; 0 outside of `mask`.
        ended: [N] bool, whether the policy ended the answer itself (else a limit did).
        texts: [N], without control tokens.
    """

    prompts: list[list[Message]]
    encoded: list[Encoded]
    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    ended: Tensor
    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Tensor:
        """[N] tokens of each answer."""
        return self.mask.sum(1)

    def select(self, rows: Sequence[int]) -> Rollout:
        """Some of the answers, in the order asked for."""
        chosen = list(rows)
        return Rollout(
            prompts=[self.prompts[row] for row in chosen],
            encoded=[self.encoded[row] for row in chosen],
            tokens=self.tokens[chosen],
            mask=self.mask[chosen],
            log_probs=self.log_probs[chosen],
            ended=self.ended[chosen],
            texts=[self.texts[row] for row in chosen],
        )

    def minibatch(self, rows: Sequence[int], pad_id: int) -> tuple[Batch, Tensor]:
        """Prompts with their answers, padded on the right, for the model's own forward.

        Args:
            rows: Which answers.
            pad_id: Filler token.

        Returns:
            A batch of n rows whose `images` are references, and the places [n, T] in them of the states that each token was
            drawn from (that of the token before it).
        """
        whole = []
        for row in rows:
            prompt, answer = self.encoded[row], self.tokens[row][self.mask[row]].tolist()
            whole.append([Encoded(prompt.ids + answer, [False] * (len(prompt) + len(answer)), prompt.images)])
        batch = collate(whole, pad_id, target_count=1)
        starts = torch.tensor([len(self.encoded[row]) - 1 for row in rows])
        places = starts[:, None] + torch.arange(self.tokens.shape[1])
        return batch, places.clamp(max=batch.input_ids.shape[1] - 1)


@dataclass
class Replay:
    """What the policy, as it is now, says of tokens that were drawn before.

    Args:
        log_probs: [n, T], 0 outside of the mask.
        entropy: [n, T], of the distributions that the tokens came from; 0 outside of the mask, no gradient.
        hidden: [n, T, H], the states that the tokens were drawn from.
    """

    log_probs: Tensor
    entropy: Tensor
    hidden: Tensor


def draw(
    model: MultimodalGPT,
    prompts: Sequence[Any],
    *,
    samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | str,
    batch_size: int = 32,
    decoder: Decoder | None = None,
    engine: VllmEngine | None = None,
) -> Rollout:
    """Let the policy answer prompts.

    A prompt is read once, whatever the number of answers to it. The draws of an answer depend on the seed and on its place alone,
    not on what else is in its batch. An answer ends with its first end token, or at a limit (its own, or that of the window).

    Args:
        model: The policy; put into eval mode while it draws.
        prompts: Conversations whose next turn is the assistant's.
        samples: Answers to each.
        max_new_tokens: Most tokens of an answer, its end token counted.
        temperature: Divides the logits.
        seed: Makes the draws repeatable; another one for every iteration.
        batch_size: Most answers side by side.
        decoder: Weights prepared by `Decoder.from_language`; None: the model's own as they are now.
        engine: Draws in the decoder's place, all answers at once; with random numbers of its own, so other answers.

    Raises:
        UserError: a conversation that breaks the form, or is as long as the window; `conversation NUMBER` says which.
        UsageError: a number that makes no sense.
    """
    from mmgpt.model.decoder import Decoder

    for name, value, least in (("samples", samples, 1), ("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}, but must be at least {least}")
    if not 0 < temperature < float("inf"):
        raise UsageError(f"temperature is {temperature}, but a policy draws at one above 0")
    tokenizer = model.tokenizer
    canonical = [_canonical(model, prompt, number) for number, prompt in enumerate(prompts)]
    encoded = [model.encode(prompt, prompt=True) for prompt in canonical]
    count = len(encoded) * samples
    tokens = torch.full((count, max_new_tokens), tokenizer.pad_id)
    log_probs = torch.zeros(count, max_new_tokens)
    mask = torch.zeros(count, max_new_tokens, dtype=torch.bool)
    limits = [min(max_new_tokens, model.context - len(prompt)) for prompt in encoded for _ in range(samples)]
    training = {module: module.training for module in model.modules()}
    model.eval()
    if engine is not None:
        _draw_elsewhere(model, engine, canonical, samples, limits, seed, temperature, tokens, log_probs, mask)
    else:
        draws = torch.zeros(count, max_new_tokens, dtype=torch.float64)
        for row in range(count):
            draws[row] = _uniform(seed, row, max_new_tokens)
        decoder = decoder or Decoder.from_language(model.language)
        for rows in _batches([len(prompt) for prompt in encoded], samples, batch_size):
            _draw_batch(model, decoder, canonical, rows, samples, limits, draws, temperature, tokens, log_probs, mask)
    for module, was in training.items():
        module.training = was
    longest = int(mask.sum(1).max()) if count else 0
    tokens, log_probs, mask = tokens[:, :longest], log_probs[:, :longest], mask[:, :longest]
    ended = (tokens == tokenizer.eos_id).logical_and(mask).any(1)
    return Rollout(
        prompts=[prompt for prompt in canonical for _ in range(samples)],
        encoded=[prompt for prompt in encoded for _ in range(samples)],
        tokens=tokens,
        mask=mask,
        log_probs=log_probs,
        ended=ended,
        texts=[tokenizer.decode([t for t in row[real].tolist() if t != tokenizer.eos_id]) for row, real in zip(tokens, mask)],
    )


def _canonical(model: MultimodalGPT, prompt: Any, number: int) -> list[Message]:
    try:
        model.prompt(prompt)
        return normalize(prompt)
    except UserError as error:
        error.args = (f"conversation {number}: {error}",)
        raise


def _uniform(seed: int | str, row: int, count: int) -> Tensor:
    """The random numbers of one answer."""
    return torch.rand(count, generator=seeded(f"{seed}/{row}"), dtype=torch.float64)


def seeded(name: str) -> torch.Generator:
    """A generator for a name; a digest keeps those of neighbouring names apart."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))


def _batches(lengths: Sequence[int], samples: int, batch_size: int) -> list[list[int]]:
    """Rows of like length side by side, whole prompts where they fit; the longest first."""
    order = sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt])
    rows = [prompt * samples + sample for prompt in order for sample in range(samples)]
    step = max(samples, batch_size // samples * samples) if samples <= batch_size else batch_size
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _draw_batch(
    model: MultimodalGPT,
    decoder: Decoder,
    prompts: Sequence[Any],
    rows: list[int],
    samples: int,
    limits: Sequence[int],
    draws: Tensor,
    temperature: float,
    tokens: Tensor,
    log_probs: Tensor,
    mask: Tensor,
) -> None:
    """Draw the answers `rows`, writing into tokens, log_probs and mask [N, T]."""
    from mmgpt.model.decoder import SLACK_ROWS

    owners = [row // samples for row in rows]
    needed = list(dict.fromkeys(owners))
    with torch.inference_mode():
        embedded = model.embed_prompts([prompts[owner] for owner in needed])
        lengths = torch.tensor([len(prompt) for prompt in embedded])
        embeds = embedded[0].new_zeros(len(embedded), int(lengths.max()), embedded[0].shape[1])
        for place, prompt in zip(embeds, embedded):
            place[len(place) - len(prompt) :] = prompt
        logits, cache = decoder.prefill(embeds, lengths, reserve=max(limits[row] for row in rows))
        if samples > 1:
            copies = torch.tensor([needed.index(owner) for owner in owners], device=logits.device)
            cache.keep(copies)
            logits = logits[copies]
        active = list(rows)
        finished: set[int] = set()
        for step in range(tokens.shape[1]):
            drawn, chances = choose(forbid(logits, model), draws[active, step], temperature)
            for row, token, chance in zip(active, drawn.tolist(), chances.tolist()):
                if row in finished:
                    continue
                tokens[row, step], log_probs[row, step], mask[row, step] = token, chance, True
                if token == model.tokenizer.eos_id or step + 1 == limits[row]:
                    finished.add(row)
            alive = [index for index, row in enumerate(active) if row not in finished]
            if not alive:
                return
            if len(alive) <= SLACK_ROWS * len(active):
                left = torch.tensor(alive, device=logits.device)
                active, drawn = [active[index] for index in alive], drawn[left]
                cache.keep(left)
            logits = decoder.step(drawn, cache)


def _draw_elsewhere(
    model: MultimodalGPT,
    engine: VllmEngine,
    prompts: Sequence[Any],
    samples: int,
    limits: Sequence[int],
    seed: int | str,
    temperature: float,
    tokens: Tensor,
    log_probs: Tensor,
    mask: Tensor,
) -> None:
    """Have an engine draw all answers, writing into tokens, log_probs and mask [N, T]."""
    with torch.inference_mode():
        embedded = model.embed_prompts(prompts)
    owners = [row // samples for row in range(len(limits))]
    seeds = [seeded(f"{seed}/{row}").initial_seed() for row in range(len(limits))]
    for row, (ids, chances) in enumerate(engine.draw(model, embedded, owners, limits, seeds, temperature)):
        end = ids.index(model.tokenizer.eos_id) + 1 if model.tokenizer.eos_id in ids else len(ids)
        ids, chances = ids[:end], chances[:end]
        tokens[row, : len(ids)] = torch.tensor(ids)
        log_probs[row, : len(ids)] = torch.tensor(chances)
        mask[row, : len(ids)] = True


def forbid(logits: Tensor, model: MultimodalGPT) -> Tensor:
    """Logits [..., V] without the image token, where the vocabulary has a row for it: a drawn one would ask for a picture."""
    image = model.tokenizer.image_id
    if image >= logits.shape[-1]:
        return logits
    return logits.index_fill(-1, torch.tensor([image], device=logits.device), float("-inf"))


def choose(logits: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: [B, V] in fp32.
        draws: [B], uniform in [0, 1).
        temperature: Divides the logits.

    Returns:
        Ids [B] and their log-probabilities [B].
    """
    # Single precision would give rare tokens behind the first 50,000 a wrong share, and on MPS there is nothing else.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = (logits / temperature).softmax(-1, dtype=exact).cumsum(-1)
    # The sum of all is 1 but for rounding; measured by it, no draw falls behind the last token.
    wanted = draws.to(logits.device, exact)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    return ids, log_probs_of(logits, ids, temperature)


def replay(
    model: MultimodalGPT, batch: Batch, places: Tensor, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> Replay:
    """The log-probabilities of drawn tokens under the model as it is now, with gradient.

    Args:
        model: The policy, or the reference.
        batch: Of `Rollout.minibatch`, its images tensors.
        places: [n, T], from there too.
        tokens: [n, T] long, what was drawn.
        mask: [n, T] bool.
        temperature: At which they were drawn.
    """
    states = model.hidden(batch)
    hidden = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
    logits = forbid(logits_of(model.language, hidden[mask]), model)
    log_probs, entropy = (logits.new_zeros(mask.shape) for _ in range(2))
    log_probs = log_probs.masked_scatter(mask, log_probs_of(logits, tokens[mask], temperature))
    with torch.no_grad():
        entropy = entropy.masked_scatter(mask, entropy_of(logits, temperature))
    return Replay(log_probs, entropy, hidden)
