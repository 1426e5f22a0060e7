"""Both stages: batch = single to the bit, hashing against a plain reference, nothing truncated."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_filter import build

from safety.classifier import BASE, MIX1, MIX2, ORDERS, Linear, Transformer, features

MASK = (1 << 64) - 1
TEXTS = st.text(max_size=60)


def reference(text: str, bits: int) -> list[int]:
    """The features of one text by Python's own integers, one kind after the other."""
    data = b" " + text.lower().encode("utf-8", "surrogatepass") + b" "

    def value(piece: bytes) -> int:
        return sum(byte * pow(BASE, place, 1 << 64) for place, byte in enumerate(piece)) & MASK

    def cut(number: int, kind: int) -> int:
        number = (number + (kind * BASE & MASK)) & MASK
        number = ((number ^ (number >> 30)) * MIX1) & MASK
        number = ((number ^ (number >> 27)) * MIX2) & MASK
        return number >> (64 - bits)

    found = [cut(value(data[i : i + n]), n) for n in ORDERS for i in range(len(data) - n + 1)]
    words, word = [], b""
    for byte in data:
        if chr(byte).isalnum() or byte >= 0x80 or byte == ord("'"):
            word += bytes([byte])
        elif word:
            words.append(value(word))
            word = b""
    found += [cut(number, 101) for number in words]
    found += [cut((a * MIX1 + b) & MASK, 202) for a, b in itertools.pairwise(words)]
    return found


@given(st.lists(TEXTS, min_size=1, max_size=5))
@settings(deadline=None, max_examples=60)
def test_features_are_those_of_a_plain_implementation(texts: list[str]) -> None:
    kinds = list(features(texts, 16))
    for n, text in enumerate(texts):
        found = [int(row) for index, offsets in kinds for row in index[offsets[n] : offsets[n + 1]]]
        assert found == reference(text, 16)


def random_linear(bits: int = 12) -> Linear:
    rng = np.random.default_rng(0)
    table = rng.integers(-127, 128, (1 << bits, 17)).astype(np.int8)
    return Linear(table, rng.random(17).astype(np.float32), rng.random(17).astype(np.float32))


@given(st.lists(TEXTS, min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_linear_in_a_batch_is_linear_alone(texts: list[str]) -> None:
    model = random_linear()
    together = model.logits(texts)
    assert together.dtype == np.float32 and together.shape == (len(texts), 17)
    for row, text in zip(together, texts):
        assert np.array_equal(row, model.logits([text])[0])


def test_linear_of_large_batches_is_cut_and_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_linear()
    texts = [f"prompt number {n} " * (n % 7) for n in range(50)]
    whole = model.logits(texts)
    monkeypatch.setattr("safety.classifier.BATCH_BYTES", 64)
    assert np.array_equal(whole, model.logits(texts))
    assert model.logits([]).shape == (0, 17)


def test_linear_saves_and_loads(tmp_path: Path) -> None:
    model = random_linear()
    model.save(tmp_path / "linear.npz")
    for source in (tmp_path / "linear.npz", (tmp_path / "linear.npz").read_bytes()):
        assert np.array_equal(Linear.load(source).logits(["a text"]), model.logits(["a text"]))


@pytest.mark.parametrize("weight", [np.zeros((10, 17), np.int8), np.zeros((16, 17), np.float32), np.zeros((16, 16), np.int8)])
def test_linear_refuses_tables_that_do_not_fit(weight: np.ndarray) -> None:
    with pytest.raises(ValueError, match="linear model"):
        Linear(weight, np.ones(17, np.float32), np.zeros(17, np.float32))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder = build(tmp_path_factory.mktemp("weights"))
    return Transformer(folder / "encoder.int8.onnx", folder / "tokenizer.json", length=16, overlap=4)


def test_transformer_in_a_batch_is_transformer_alone(transformer: Transformer) -> None:
    texts = ["a bomb", "", "a bath bomb", "murder " * 40, "nothing"]
    together = transformer.logits(texts)
    assert together.shape == (5, 17) and together.dtype == np.float32
    for row, text in zip(together, texts):
        assert np.array_equal(row, transformer.logits([text])[0])
    assert transformer.logits([]).shape == (0, 17)


@given(before=st.integers(0, 60), after=st.integers(0, 60))
@settings(deadline=None, max_examples=40)
def test_a_word_is_found_wherever_it_stands_in_a_long_text(transformer: Transformer, before: int, after: int) -> None:
    assert transformer.logits(["filler " * before + "bomb" + " filler" * after])[0, 0] > 0


@given(st.integers(0, 200))
@settings(deadline=None, max_examples=60)
def test_pieces_hold_every_token_and_overlap(transformer: Transformer, size: int) -> None:
    pieces = list(transformer.pieces(list(range(size))))
    assert sorted({token for piece in pieces for token in piece}) == list(range(size))
    assert all(len(piece) <= 14 for piece in pieces)
    assert all(a[-4:] == b[:4] for a, b in itertools.pairwise(pieces))


def test_pieces_must_be_longer_than_their_overlap(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot overlap"):
        Transformer(tmp_path / "no.onnx", tmp_path / "no.json", length=8, overlap=6)
