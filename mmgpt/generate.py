"""Answers from a model: streamed, or many conversations at once.

`stream` yields the text of one answer as it grows; `generate` answers a list of conversations in batches of like
length. Both go through the same loop, so in fp32 a conversation gets the same tokens streamed, alone or in a batch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mmgpt.errors import UsageError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmgpt.model.decoder import Decoder

Finish = Literal["eos", "length"]
PREFILL_TOKENS = 8192  # positions of one batch, padding included: bounds the memory of reading the prompts
REPLACEMENT = "\ufffd"


class TextTokenizer(Protocol):
    """The part of `mmgpt.data.tokenizer.Tokenizer` that answers need."""

    eos_id: int

    def decode(self, ids: Sequence[int]) -> str: ...


class Model(Protocol):
    """The part of `mmgpt.model.multimodal.MultimodalGPT` that answers need."""

    language: Any
    tokenizer: Any

    def prompt(self, messages: Any) -> tuple[Tensor, list[Any]]:
        """A conversation up to where the assistant speaks: ids [L], images."""
        ...

    def embed_prompts(self, conversations: Sequence[Any]) -> list[Tensor]:
        """Input embeddings of each conversation's prompt [L, H], image features in place."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: Length limit of an answer; the model's window may end it sooner.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Draw from the smallest set of tokens whose probability reaches this (Holtzman et al. 2020, section 3.1).
        top_k: Draw from this many likeliest tokens; 0 is all.
        seed: Makes the draws repeatable; every row of a call has its own generator. None draws a fresh seed.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens that prompt or answer
            hold already (Keskar et al. 2019, section 4.1); 1 is off.

    Raises:
        UsageError: a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, good, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "more than 0 (1 is off)"),
        ):
            if not good:
                raise UsageError(f"{name} is {getattr(self, name)}, but must be {rule}")


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: The answer without control tokens.
        token_ids: Its tokens, the one that ended it left out.
        prompt_tokens: Positions of the prompt, images included.
        answer_tokens: Tokens the model produced, the ending one counted.
        seconds: From the start of the answer's batch to its last token.
        finish: `eos` where the model ended it, `length` where a limit did.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    finish: Finish


def stream(model: Model, messages: Any, sampling: Sampling | None = None, decoder: Decoder | None = None) -> Iterator[str]:
    """Yield the answer to one conversation in pieces; joined they are the text that `generate` returns.

    Work is done only as pieces are asked for, and ends when the iterator is closed.

    Args:
        model: The model.
        messages: A conversation whose next turn is the assistant's.
        sampling: How tokens are chosen; default greedy.
        decoder: Weights prepared by `Decoder.from_language`; default the model's own, exact.

    Raises:
        UserError: the conversation is malformed, an image cannot be read, or the prompt does not fit the window.
    """
    sampling = sampling or Sampling()
    row = _prepare(model, [messages], sampling)[0]
    for _, piece in _run(model, [row], sampling, decoder or _exact(model)):
        if piece:
            yield piece


def generate(
    model: Model,
    conversations: Sequence[Any],
    sampling: Sampling | None = None,
    batch_size: int = 16,
    decoder: Decoder | None = None,
) -> list[Answer]:
    """Answer conversations side by side; answers come in the order of the conversations.

    Conversations of like length share a batch, so that little is padded. Row i draws from its own generator, seeded
    by `sampling.seed` and i: neither the batch size nor the other conversations change its draws.

    Args:
        model: The model.
        conversations: Conversations whose next turn is the assistant's.
        sampling: How tokens are chosen; default greedy.
        batch_size: Most rows side by side; long prompts share smaller batches.
        decoder: Weights prepared by `Decoder.from_language`; default the model's own, exact.

    Raises:
        UserError: a conversation is malformed, an image cannot be read, or a prompt does not fit the window.
        UsageError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}, but must be at least 1")
    sampling = sampling or Sampling()
    rows = _prepare(model, conversations, sampling)
    decoder = decoder or (_exact(model) if rows else None)
    for batch in _batches(rows, batch_size):
        for _ in _run(model, batch, sampling, decoder):
            pass
    return [row.answer() for row in rows]


class TextStream:
    """Ids in, text out, as soon as it is final.

    A token may hold part of a character only, and some tokenizers drop the space in front of a text. So the new text is
    what a window of ids decodes to beyond what the same window decoded to before; it is held back while it ends in
    U+FFFD, which more bytes may turn into a character.
    """

    def __init__(self, tokenizer: TextTokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = self.read = 0  # the window starts at `start`; its text is out up to `read`

    def push(self, token: int) -> str:
        """Text that has become final with this token, often empty."""
        self.ids.append(token)
        new = self._new()
        if not new or new.endswith(REPLACEMENT):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return new

    def flush(self) -> str:
        """The text held back, once no token follows."""
        new = self._new()
        self.start = self.read = len(self.ids)
        return new

    def _new(self) -> str:
        before = self.tokenizer.decode(self.ids[self.start : self.read])
        return self.tokenizer.decode(self.ids[self.start :])[len(before) :]


@dataclass
class _Row:
    """One answer in the making."""

    messages: Any
    prompt_tokens: int
    limit: int
    eos: int
    text: TextStream
    generator: torch.Generator | None
    seen: set[int]
    pieces: list[str] = field(default_factory=list)
    finish: Finish | None = None
    seconds: float = 0.0

    def push(self, token: int) -> str:
        """Take one token; returns the text that became final."""
        if token == self.eos:
            self.finish, piece = "eos", self.text.flush()
        else:
            piece = self.text.push(token)
            self.seen.add(token)
            if len(self.text.ids) == self.limit:
                self.finish, piece = "length", piece + self.text.flush()
        self.pieces.append(piece)
        return piece

    def answer(self) -> Answer:
        assert self.finish is not None
        ids = self.text.ids
        produced = len(ids) + (self.finish == "eos")
        return Answer("".join(self.pieces), ids, self.prompt_tokens, produced, self.seconds, self.finish)


def _exact(model: Model) -> Decoder:
    from mmgpt.model.decoder import Decoder

    return Decoder.from_language(model.language)


def _prepare(model: Model, conversations: Sequence[Any], sampling: Sampling) -> list[_Row]:
    """Check every conversation before any work is done on one."""
    import torch

    window = getattr(model.language.config, "max_position_embeddings", None)
    vocabulary = model.language.get_input_embeddings().weight.shape[0]
    seed = sampling.seed
    if seed is None:
        seed = int(torch.empty((), dtype=torch.int64).random_())
    rows = []
    for index, messages in enumerate(conversations):
        where = f"conversation {index}: " if len(conversations) > 1 else ""
        try:
            ids, _ = model.prompt(messages)
        except UserError as error:
            if where:
                error.args = (where + str(error),)
            raise
        room = sampling.max_new_tokens if window is None else window - len(ids)
        if room < 1:
            raise UserError(
                f"{where}the prompt has {len(ids)} tokens, images included, but the model reads {window} and the answer "
                "needs at least 1: shorten the conversation, or use fewer images"
            )
        rows.append(
            _Row(
                messages=messages,
                prompt_tokens=len(ids),
                limit=min(room, sampling.max_new_tokens),
                eos=model.tokenizer.eos_id,
                text=TextStream(model.tokenizer),
                generator=_generator(seed, index) if sampling.temperature > 0 else None,
                seen={int(token) for token in ids.unique() if token < vocabulary},
            )
        )
    return rows


def _generator(seed: int, row: int) -> torch.Generator:
    """A generator for one row; the digest keeps neighbouring seeds and rows apart (torch uses 32 bits of it)."""
    import torch

    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _batches(rows: list[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Rows of like length, the longest first, so that running out of memory shows at once."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -row.prompt_tokens):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * batch[0].prompt_tokens > PREFILL_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _run(model: Model, rows: list[_Row], sampling: Sampling, decoder: Decoder | None) -> Iterator[tuple[_Row, str]]:
    """Advance a batch until every row is finished; yields each row's piece of text, token by token."""
    import torch

    from mmgpt.model.decoder import SLACK_ROWS

    assert decoder is not None
    started = time.perf_counter()
    with torch.inference_mode():
        prompts = model.embed_prompts([row.messages for row in rows])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        embeds = prompts[0].new_zeros(len(rows), int(lengths.max()), prompts[0].shape[1])
        for place, prompt in zip(embeds, prompts):
            place[len(place) - len(prompt) :] = prompt
        logits, cache = decoder.prefill(embeds, lengths, reserve=max(row.limit for row in rows))
    del prompts, embeds
    active = list(rows)
    while True:
        tokens = choose(logits, active, sampling)
        for row, token in zip(active, tokens):
            if row.finish is None:
                piece = row.push(token)
                row.seconds = time.perf_counter() - started
                yield row, piece
        alive = [index for index, row in enumerate(active) if row.finish is None]
        if not alive:
            return
        if len(alive) <= SLACK_ROWS * len(active):
            active = [active[index] for index in alive]
            tokens = [tokens[index] for index in alive]
            with torch.inference_mode():
                cache.keep(torch.tensor(alive, device=logits.device))
        logits = decoder.step(torch.tensor(tokens, device=logits.device), cache)


def choose(logits: Tensor, rows: Sequence[_Row], sampling: Sampling) -> list[int]:
    """The next token of each row from logits [B, V]."""
    import torch

    if sampling.repetition_penalty != 1:
        logits = logits.clone()
        for index, row in enumerate(rows):
            seen = torch.tensor(sorted(row.seen), device=logits.device)
            scores = logits[index, seen]
            weakened = torch.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
            logits[index, seen] = weakened
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(-1).tolist()]
    # Drawn on the CPU, one row at a time: the same seed gives the same token on every device and in every batch.
    logits = logits.float().cpu()
    tokens = []
    for scores, row in zip(logits, rows):
        probabilities, ids = distribution(scores, sampling)
        tokens.append(int(ids[torch.multinomial(probabilities, 1, generator=row.generator)]))
    return tokens


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What a token is drawn from: probabilities [M], likeliest first, and their ids [M], of float32 logits [V].

    Temperature first, then top-k, then top-p on what is left, as transformers does.
    """
    scores, ids = (logits / sampling.temperature).sort(descending=True, stable=True)
    if sampling.top_k:
        scores, ids = scores[: sampling.top_k], ids[: sampling.top_k]
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1:
        # The token that crosses the threshold is kept: what stands before it is still short of it.
        kept = int((probabilities.cumsum(-1) - probabilities < sampling.top_p).sum())
        probabilities, ids = probabilities[:kept], ids[:kept]
    return probabilities / probabilities.sum(), ids
