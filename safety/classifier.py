"""The two stages that score a text: a hashed linear model, and a small transformer.

Both give logits [N, 1 + K] in the order of `taxonomy.KEYS` after column 0, which says whether the text is sensitive. A text
gets the same logits alone as in any batch, to the bit: the linear model sums integers, the transformer reads one text at a
time. Nothing is truncated: a text longer than the transformer's positions is read in overlapping pieces.

What is scored is what `normalize` made of a text; neither stage normalises.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

ORDERS = (3, 4, 5)  # of the character n-grams, in bytes
BATCH_BYTES = 1 << 14  # of text that is hashed at once: what is worked on stays in the processor's second cache
# Odd constants with well-mixed bits: 2^64 / golden ratio, and the two of splitmix64's finaliser (Steele et al. 2014).
BASE, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_INVERSE = pow(BASE, -1, 1 << 64)


class Linear:
    """Stage 1: logistic regression on hashed words, word pairs and byte n-grams.

        logits(x) = bias + scale * (sum of the features' int8 rows) / sqrt(number of features)

    Feature hashing after Weinberger et al. 2009, without signs: a table of 2^bits rows has room for what training saw.

    Args:
        weight: int8 [2^bits, 1 + K].
        scale: float32 [1 + K].
        bias: float32 [1 + K].
    """

    def __init__(self, weight: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> None:
        bits = int(weight.shape[0]).bit_length() - 1
        if weight.dtype != np.int8 or weight.ndim != 2 or weight.shape[0] != 1 << bits:
            raise ValueError(f"the linear model's table must be int8 [2^bits, outputs], not {weight.dtype} {weight.shape}")
        if scale.shape != bias.shape or scale.shape != weight.shape[1:]:
            raise ValueError(f"the linear model's parts do not fit: {weight.shape}, {scale.shape}, {bias.shape}")
        self.weight, self.bits = weight, bits
        self.scale, self.bias = scale.astype(np.float32), bias.astype(np.float32)

    @classmethod
    def load(cls, source: Path | bytes) -> Linear:
        """Read linear.npz, from a file or from its bytes (which the caller has hashed)."""
        with np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False) as file:
            return cls(file["weight"], file["scale"], file["bias"])

    def save(self, path: Path) -> None:
        np.savez_compressed(path, weight=self.weight, scale=self.scale, bias=self.bias)

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Logits of `texts`, float32 [N, 1 + K]."""
        out = np.empty((len(texts), self.weight.shape[1]), np.float32)
        at = 0
        for batch in _batches(texts):
            index, kinds = _hashed(batch, self.bits)
            count = np.sum([np.diff(offsets) for _, offsets in kinds], axis=0)
            ends = np.concatenate([start + offsets[1:] for start, offsets in kinds])
            rows = _sums(self.weight.take(index, axis=0), np.concatenate([[0], ends]))
            sums = rows.reshape(len(kinds), len(batch), -1).sum(axis=0)
            norm = np.sqrt(np.maximum(count, 1)).astype(np.float32)[:, None]
            out[at : at + len(batch)] = self.bias + self.scale * (sums.astype(np.float32) / norm)
            at += len(batch)
        return out


def _sums(rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums int64 [N, K] of int8 rows [M, K], those of text n at offsets[n] : offsets[n + 1]."""
    sums = np.zeros((len(offsets) - 1, rows.shape[1]), np.int64)
    some = np.flatnonzero(offsets[1:] > offsets[:-1])  # `reduceat` gives a row, not 0, where there is none
    if len(some):
        sums[some] = np.add.reduceat(rows, offsets[some], axis=0, dtype=np.int64)
    return sums


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    start = size = 0
    for end, text in enumerate(texts):
        if size and size + len(text) > BATCH_BYTES:
            yield texts[start:end]
            start, size = end, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def features(texts: Sequence[str], bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hashed features of lower-cased texts, one kind after the other: byte n-grams, words, pairs of neighbouring words.

    A hash of bytes [i, j) is the polynomial sum of byte * BASE^(position - i) modulo 2^64, taken from one running sum over
    all texts (Karp & Rabin 1987; BASE is odd and so has an inverse), then mixed and cut to `bits` bits.

    Yields:
        For each kind, rows int64 [M] of the table, those of text n at offsets[n] : offsets[n + 1].
    """
    index, kinds = _hashed(texts, bits)
    for start, offsets in kinds:
        yield index[start : start + offsets[-1]], offsets


def _hashed(texts: Sequence[str], bits: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """`features`, all kinds in one array: it, and where each kind begins in it with its offsets."""
    encoded = [b" " + text.lower().encode("utf-8", "surrogatepass") + b" " for text in texts]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    data = np.frombuffer(b"".join(encoded), np.uint8)
    size = len(data)
    running = np.zeros(size + 1, np.uint64)
    np.cumsum(data * _powers(BASE, size), out=running[1:])
    inverse = _powers(_INVERSE, size)
    found: list[tuple[np.ndarray, np.ndarray]] = []

    for order in ORDERS:
        hashes = (running[order:] - running[:-order]) * inverse[: max(size + 1 - order, 0)]
        # The n-grams that start in text n and end in it: the last order - 1 starts of every text are left out.
        ends = np.concatenate([[0], np.cumsum(np.maximum(lengths - order + 1, 0))])
        if len(texts) > 1:
            whole = np.ones(size, bool)
            for back in range(1, order):
                whole[np.maximum(offsets[1:-1] - back, offsets[:-2])] = False
            hashes = hashes[whole[: len(hashes)]]
        found.append((hashes + _kind(order), ends))

    inside = _WORD[data]
    change = np.flatnonzero(inside[1:] != inside[:-1]) + 1  # texts begin and end with a blank
    first, last = change[::2], change[1::2]
    words = (running[last] - running[first]) * inverse[first]
    ends = np.searchsorted(first, offsets)
    found.append((words + _kind(101), ends))

    # A pair belongs to the text of both of its words.
    pairs = words[:-1] * _MIX1 + words[1:]
    if len(texts) > 1:
        owner = np.searchsorted(offsets, first, side="right")
        pairs = pairs[owner[1:] == owner[:-1]]
    counts = np.maximum(np.diff(ends) - 1, 0)
    found.append((pairs + _kind(202), np.concatenate([[0], np.cumsum(counts)])))

    starts = np.cumsum([0, *(len(hashes) for hashes, _ in found)]).tolist()
    index = _mixed(np.concatenate([hashes for hashes, _ in found]), bits)
    return index, [(start, ends) for start, (_, ends) in zip(starts, found)]


_WORD = np.array([chr(i).isalnum() or i >= 0x80 or i == ord("'") for i in range(256)])


def _powers(base: int, size: int) -> np.ndarray:
    """base^0 to base^(size - 1) modulo 2^64."""
    return _many_powers(base, max(size - 1, 4095).bit_length())[:size]


@lru_cache(maxsize=4)
def _many_powers(base: int, bits: int) -> np.ndarray:
    out = np.full(1 << bits, base, np.uint64)
    out[:1] = 1
    return np.multiply.accumulate(out)


def _kind(number: int) -> np.uint64:
    """What is added to the hashes of a kind, so that equal bytes of two kinds are two features."""
    return np.uint64(number * BASE & 0xFFFFFFFFFFFFFFFF)


_MIX1, _MIX2, _UPPER, _MIDDLE = np.uint64(MIX1), np.uint64(MIX2), np.uint64(30), np.uint64(27)


def _mixed(hashes: np.ndarray, bits: int) -> np.ndarray:
    """splitmix64's finaliser, then the upper bits: a polynomial hash alone leaves the low bits of short n-grams poor."""
    hashes ^= hashes >> _UPPER
    hashes *= _MIX1
    hashes ^= hashes >> _MIDDLE
    hashes *= _MIX2
    hashes >>= np.uint64(64 - bits)
    return hashes.view(np.int64)


class Transformer:
    """Stage 2: the fine-tuned encoder in int8, by onnxruntime on one thread.

    The graph takes `ids`, int64 [1, T], without padding and so without a mask, and gives `logits`, float32 [1, 1 + K].
    Activations are quantised with the scale of the text that is read (dynamic quantisation): one text at a time keeps that
    scale free of the others.

    Args:
        model: encoder.int8.onnx, a path or its bytes.
        tokenizer: tokenizer.json, a path or its bytes.
        length: Tokens that are read at once, with the two special ones.
        overlap: Tokens that two neighbouring pieces of a longer text share.
    """

    def __init__(
        self, model: Path | bytes, tokenizer: Path | bytes, *, length: int = 128, overlap: int = 32, threads: int = 1
    ) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        if not 0 <= overlap < length - 2:
            raise ValueError(f"pieces of {length} tokens cannot overlap by {overlap}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        source: Any = model if isinstance(model, bytes) else str(model)
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        content = tokenizer if isinstance(tokenizer, bytes) else tokenizer.read_bytes()
        self.tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.length, self.overlap = length, overlap
        self.ends = self.tokenizer.token_to_id("[CLS]"), self.tokenizer.token_to_id("[SEP]")
        if None in self.ends:
            raise ValueError("the tokenizer has no [CLS] or no [SEP]")

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """Logits of `texts`, float32 [N, 1 + K]. Of a text in several pieces each output is the highest one's."""
        rows = []
        for text in texts:
            read = [self._read(piece) for piece in self.pieces(self.tokenizer.encode(text, add_special_tokens=False).ids)]
            rows.append(read[0] if len(read) == 1 else np.max(read, axis=0))
        return np.stack(rows) if rows else np.empty((0, self.session.get_outputs()[0].shape[1]), np.float32)

    def pieces(self, ids: list[int]) -> Iterator[list[int]]:
        """Overlapping pieces of at most `length - 2` tokens that together hold every token; one at least."""
        room = self.length - 2
        for start in range(0, max(len(ids) - self.overlap, 1), room - self.overlap):
            yield ids[start : start + room]

    def _read(self, ids: list[int]) -> np.ndarray:
        row = np.array([[self.ends[0], *ids, self.ends[1]]], np.int64)
        return self.session.run(["logits"], {"ids": row})[0][0]
