"""Sentence vectors against transformers' states averaged by hand, one sentence at a time."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from mmgpt.data.similarity import LONGEST, SentenceEncoder
from mmgpt.errors import UserError

WORDS = ["a", "dog", "cat", "runs", "sits", "on", "the", "grass", "red", "blue", "ball"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=160,
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_equals_the_mean_of_the_states_of_each_sentence_alone(folder):
    encoder = SentenceEncoder(str(folder))
    sentences = ["a dog runs", "the cat sits on the grass", "ball", "a red ball on the blue grass runs on the cat"]
    found = encoder(sentences, batch_size=3)
    model, tokenizer = BertModel.from_pretrained(folder).eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for sentence, vector in zip(sentences, found):
        with torch.no_grad():
            states = model(torch.tensor([tokenizer.encode(sentence).ids])).last_hidden_state[0]
        torch.testing.assert_close(vector, F.normalize(states.mean(0), dim=0), atol=1e-5, rtol=1e-5)


def test_a_long_sentence_is_cut_and_none_are_none(folder):
    encoder = SentenceEncoder(str(folder))
    long = encoder(["dog " * 1000, "dog " * LONGEST])
    torch.testing.assert_close(long[0], long[1], atol=1e-6, rtol=0)
    assert encoder([]).shape == (0, 16)


def test_a_folder_without_an_encoder_is_named(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        SentenceEncoder(str(tmp_path))
