"""Text to ids and back; text never becomes a control token."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import bpe, bpe_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from mmgpt.data.tokenizer import IMAGE_TOKEN, Tokenizer
from mmgpt.errors import UserError

BYTES = Tokenizer.bytes()
BPE = bpe()
CONTROLS = [IMAGE_TOKEN, "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"]
# Text as an adversary writes it: control tokens whole, cut and nested in anything.
HOSTILE = st.lists(st.one_of(st.sampled_from([*CONTROLS, "<|im_", "start|>", "<|", "|>"]), st.text(max_size=6)), max_size=8)


def control_ids(tokenizer):
    return {tokenizer.control(name) for name in CONTROLS if tokenizer.has(name)}


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@given(pieces=HOSTILE)
def test_text_round_trips_and_never_yields_a_control_token(tokenizer, pieces):
    text = "".join(pieces)
    ids = tokenizer.encode(text)
    assert not control_ids(tokenizer) & set(ids)
    assert tokenizer.decode(ids) == text


@given(st.text())
def test_bytes_are_utf8_bytes(text):
    assert len(BYTES.encode(text)) == len(text.encode())


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_lone_surrogates_become_question_marks(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a?b?"


def test_control_tokens_are_distinct_and_left_out_of_text():
    ids = [BYTES.control(name) for name in CONTROLS]
    assert len(set(ids)) == len(ids) and max(ids) < len(BYTES)
    assert len(BYTES) == 261 and BYTES.text_vocabulary == 260 and BYTES.image_id == 260
    assert BYTES.decode([*BYTES.encode("a"), *ids, *BYTES.encode("b")]) == "ab"
    assert BYTES.eos == "<|im_end|>" and BYTES.pad == "<|pad|>" and BYTES.pad_id != BYTES.eos_id


def test_padding_is_never_the_end_token():
    """SmolLM2's own configuration pads with <|im_end|>, the token that ends an answer."""
    tokenizer = bpe(eos="<|im_end|>", pad="<|im_end|>")
    assert (tokenizer.eos, tokenizer.pad) == ("<|im_end|>", "<|endoftext|>")
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.add_special_tokens(["</s>"])
    assert Tokenizer(backend).pad != "</s>"


def test_missing_control_tokens_are_named():
    with pytest.raises(UserError, match=r"<\|im_start\|>"):
        Tokenizer(bpe_tokenizer(["</s>"])).control("<|im_start|>")
    with pytest.raises(UserError, match="none of the control tokens"):
        Tokenizer(bpe_tokenizer([]))


@pytest.mark.parametrize("make", [Tokenizer.bytes, bpe], ids=["bytes", "bpe"])
def test_save_and_load(tmp_path, make):
    first = make()
    first.save(tmp_path)
    second = Tokenizer.load(tmp_path)
    second.save(tmp_path / "again")
    third = Tokenizer.load(tmp_path / "again")
    text = "Grüße, 世界! <|im_end|> and <|image|>"
    for other in (second, third):
        assert other.encode(text) == first.encode(text)
        names = ("eos", "eos_id", "pad", "pad_id", "image_id")
        assert [getattr(other, name) for name in names] == [getattr(first, name) for name in names]
        assert len(other) == len(first)


def test_transformers_reads_a_saved_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = bpe()
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "What is this? A pear."
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eos_id and theirs.pad_token_id == tokenizer.pad_id
    assert theirs.convert_tokens_to_ids(IMAGE_TOKEN) == tokenizer.image_id


def test_names_of_the_configuration_count_only_where_the_vocabulary_has_them(tmp_path):
    BPE.save(tmp_path)
    settings = {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<missing>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos == "<|endoftext|>" and loaded.pad_id != loaded.eos_id


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path)
    BYTES.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_that_prepends_a_space_does_not_get_two():
    pieces = ["<unk>", "</s>", "▁", "▁a", "a", "▁b", "b"]
    backend = Backend(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.add_special_tokens(["</s>", "<unk>"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.prepends_space and not BPE.prepends_space
    assert tokenizer.encode(" a") == tokenizer.encode("a") == [3]
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
