"""Streaming, batching and sampling on tiny random models without images."""

import collections
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mmgpt import generate as generate_module
from mmgpt.errors import UsageError, UserError
from mmgpt.generate import Sampling, TextStream, distribution, generate, stream


class Bytes:
    """One token a byte; 256 ends an answer."""

    eos_id, pad_id = 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class TextModel:
    """What `generate` asks of a model, for text alone."""

    def __init__(self, language):
        self.language = language.eval()
        self.tokenizer = Bytes()
        self.embedded = []

    def prompt(self, messages):
        if not messages:
            raise UserError("a conversation is a non-empty list")
        return torch.tensor(self.tokenizer.encode(messages)), []

    def embed_prompts(self, conversations):
        self.embedded.append(list(conversations))
        return [self.language.get_input_embeddings()(self.prompt(messages)[0]) for messages in conversations]


def llama(window=256):
    return LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        tie_word_embeddings=True,
    )


def make(kind="llama", window=256):
    torch.manual_seed(0)
    if kind == "llama":
        language = LlamaForCausalLM(llama(window))
    else:
        language = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=window))
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return TextModel(language)


def ending(model, token):
    """Let `token`, which a greedy answer reaches, end answers."""
    model.tokenizer.eos_id = token
    return model


PROMPTS = ["What is this?", "ü", "a much longer question than all the others", "yes", "Name a fruit.", "b"]


@pytest.fixture(params=["llama", "gpt2"], scope="module")
def model(request):
    return make(request.param)


def test_batched_single_streamed_and_transformers_agree(model):
    sampling = Sampling(max_new_tokens=24)
    batched = generate(model, PROMPTS, sampling, batch_size=4)
    for prompt, answer in zip(PROMPTS, batched):
        ids = model.prompt(prompt)[0]
        mask = torch.ones(1, len(ids))
        theirs = model.language.generate(
            ids[None],
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=256,
            pad_token_id=257,
            attention_mask=mask,
        )[0, len(ids) :].tolist()
        assert answer.token_ids == [token for token in theirs if token != 256]
        single = generate(model, [prompt], sampling)[0]
        assert (single.token_ids, single.text, single.finish) == (answer.token_ids, answer.text, answer.finish)
        assert "".join(stream(model, prompt, sampling)) == answer.text
        assert answer.prompt_tokens == len(ids)
        assert answer.seconds > 0


def test_sampling_does_not_depend_on_the_batch(model):
    sampling = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.95, top_k=100, seed=7)
    reference = [answer.token_ids for answer in generate(model, PROMPTS, sampling, batch_size=1)]
    assert [answer.token_ids for answer in generate(model, PROMPTS, sampling, batch_size=16)] == reference
    assert [answer.token_ids for answer in generate(model, PROMPTS, sampling, batch_size=3)] == reference
    assert "".join(stream(model, PROMPTS[0], sampling)) == model.tokenizer.decode(reference[0])
    other = Sampling(max_new_tokens=12, temperature=0.9, top_p=0.95, top_k=100, seed=8)
    assert [answer.token_ids for answer in generate(model, PROMPTS, other)] != reference
    same_prompt = generate(model, ["x", "x"], sampling)
    assert same_prompt[0].token_ids != same_prompt[1].token_ids


def test_no_seed_draws_anew():
    model = make()
    sampling = Sampling(max_new_tokens=16, temperature=1.0)
    assert generate(model, ["x"], sampling)[0].token_ids != generate(model, ["x"], sampling)[0].token_ids


def test_stops_at_the_end_token_and_drops_finished_rows(model):
    sampling = Sampling(max_new_tokens=20)
    free = generate(model, PROMPTS, sampling)
    end = free[0].token_ids[4]
    try:
        ending(model, end)
        for prompt, before, after in zip(PROMPTS, free, generate(model, PROMPTS, sampling)):
            expected = before.token_ids
            if end in expected:
                expected = expected[: expected.index(end)]
                assert (after.finish, after.answer_tokens) == ("eos", len(expected) + 1)
            else:
                assert (after.finish, after.answer_tokens) == ("length", 20)
            assert after.token_ids == expected
            assert "".join(stream(model, prompt, sampling)) == after.text == model.tokenizer.decode(expected)
    finally:
        ending(model, Bytes.eos_id)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_window(kind):
    model = make(kind, window=24)
    answers = generate(model, ["x" * length for length in (23, 20, 3, 4, 5, 6, 7, 8)], Sampling(max_new_tokens=19))
    for answer in answers:
        if answer.finish == "length":
            assert answer.answer_tokens == min(19, 24 - answer.prompt_tokens)
    for length in (24, 100):
        with pytest.raises(UserError, match=rf"has {length} tokens.*reads 24"):
            list(stream(model, "x" * length))
    with pytest.raises(UserError, match="conversation 1: the prompt has 30 tokens"):
        generate(model, ["x", "x" * 30])
    with pytest.raises(UserError, match="conversation 2: a conversation is"):
        generate(model, ["x", "x", ""])


def test_a_consumer_that_stops_stops_the_work(monkeypatch):
    model = make()
    steps = []
    real = model.language.forward
    decoder = generate_module._exact(model)
    step = decoder.step
    decoder.step = lambda ids, cache: steps.append(1) or step(ids, cache)
    pieces = stream(model, "x", Sampling(max_new_tokens=100, temperature=1.0, seed=0), decoder=decoder)
    assert not model.embedded
    next(pieces)
    taken = len(steps)
    pieces.close()
    assert len(steps) == taken < 50
    assert model.language.forward == real
    assert list(pieces) == []


def test_batches_hold_like_lengths_within_the_budget(monkeypatch):
    monkeypatch.setattr(generate_module, "PREFILL_TOKENS", 30)
    model = make()
    prompts = ["x" * length for length in (1, 9, 2, 40, 10, 3)]
    answers = generate(model, prompts, Sampling(max_new_tokens=1), batch_size=3)
    assert [answer.prompt_tokens for answer in answers] == [1, 9, 2, 40, 10, 3]
    assert [[len(prompt) for prompt in batch] for batch in model.embedded] == [[40], [10, 9, 3], [2, 1]]


def test_nothing_to_answer():
    assert generate(make(), []) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
    ],
)
def test_sampling_values_are_checked(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_batch_size_is_checked():
    with pytest.raises(UsageError, match="batch_size is 0"):
        generate(make(), ["x"], batch_size=0)


def brute_force(logits, temperature, top_k, top_p):
    """The definition, one token at a time, in Python floats."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[:top_k] if top_k else order
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if top_p < 1 and mass >= top_p:  # rounded, all but the least likely can add up to 1 already
            break
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-60, 60), min_size=1, max_size=20, unique=True),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 25),
    st.sampled_from([0.0501, 0.3003, 0.5007, 0.9001, 0.99, 1.0]),
)
def test_distribution_against_the_definition(logits, temperature, top_k, top_p):
    logits = [x / 10 for x in logits]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    probabilities, ids = distribution(torch.tensor(logits), sampling)
    expected = brute_force(logits, temperature, top_k, top_p)
    assert set(ids.tolist()) == set(expected)
    for i, probability in zip(ids.tolist(), probabilities.tolist()):
        assert probability == pytest.approx(expected[i], rel=1e-4)


def test_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    sampling = Sampling(temperature=1.0)

    class Row:
        generator = torch.Generator().manual_seed(3)

    drawn = collections.Counter(generate_module.choose(logits.expand(4000, 4), [Row] * 4000, sampling))
    for token, share in enumerate([0.1, 0.2, 0.3, 0.4]):
        assert drawn[token] / 4000 == pytest.approx(share, abs=0.03)


def test_repetition_penalty_against_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    class Row:
        generator, seen = None, {0, 2, 3}

    logits = torch.tensor([[2.0, 1.9, 1.0, -1.0, -0.5]])
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[0, 2, 3, 3]]), logits.clone())
    assert generate_module.choose(logits, [Row], Sampling(repetition_penalty=1.5)) == [int(expected.argmax())] == [1]
    assert logits[0, 0] == 2.0
    model = make()
    ids = model.prompt("hello")[0]
    theirs = model.language.generate(
        ids[None], max_new_tokens=16, do_sample=False, repetition_penalty=1.3, eos_token_id=256, pad_token_id=257
    )
    ours = generate(model, ["hello"], Sampling(max_new_tokens=16, repetition_penalty=1.3))[0]
    assert ours.token_ids == [token for token in theirs[0, len(ids) :].tolist() if token != 256]


def streamed(tokenizer, ids):
    text = TextStream(tokenizer)
    pieces = [text.push(token) for token in ids]
    return [*pieces, text.flush()]


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_pieces_join_to_the_whole_for_any_bytes(data):
    assert "".join(streamed(Bytes(), data)) == data.decode("utf-8", "replace")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_no_piece_holds_half_a_character(text):
    pieces = streamed(Bytes(), text.encode())
    assert "".join(pieces) == text
    assert REPLACEMENT not in "".join(pieces) or REPLACEMENT in text


REPLACEMENT = "\ufffd"


def test_characters_come_as_soon_as_they_are_whole():
    assert streamed(Bytes(), "aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    assert streamed(Bytes(), b"a\xe2\x82") == ["a", "", "", REPLACEMENT]
    assert streamed(Bytes(), b"\xe2A") == ["", REPLACEMENT + "A", ""]


def test_spaces_of_a_tokenizer_that_strips_the_first():
    class Pieces:
        """The way of Llama's SentencePiece: a space in front of each word, dropped at the start of the text."""

        vocabulary = ("▁Hello", "▁world", "▁", "!", "▁a")

        def decode(self, ids):
            return "".join(self.vocabulary[i] for i in ids).replace("▁", " ").removeprefix(" ")

    for ids in ([0, 1, 3], [2, 0, 2, 2, 4, 3], [2, 2, 2], [3, 2, 4], [0]):
        assert "".join(streamed(Pieces(), ids)) == Pieces().decode(ids)


def test_pieces_of_the_byte_tokenizer_skip_control_tokens():
    from mmgpt.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.bytes()
    ids = [*tokenizer.encode("ä "), tokenizer.pad_id, *tokenizer.encode("\u20ac<|im_end|>")]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "ä €<|im_end|>"
