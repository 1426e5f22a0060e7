"""Chat templates: the ids of the usual rendering, and exactly the answers supervised."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import bpe, bpe_tokenizer, noise, talk

from mmgpt.data.messages import MessageError, assistant, normalize, text_of, user
from mmgpt.data.template import TEMPLATES, encode, get_template
from mmgpt.data.tokenizer import IMAGE_TOKEN, Tokenizer
from mmgpt.errors import UsageError, UserError

BYTES = Tokenizer.bytes()
BPE = bpe()
VICUNA = Tokenizer(bpe_tokenizer(["<unk>", "<s>", "</s>"]))
CHATML_JINJA = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(["<|image|>", "<|im_end|>", "<|im_start|>assistant\n", "<|im_start|>", "</s>", "<s>", "USER: "]),
        st.text(max_size=6),
    ),
    max_size=6,
).map("".join)


def rendered(encoded, tokenizer) -> str:
    """The conversation as text, control tokens written out."""
    names = {tokenizer.control(n): n for n in ("<|im_start|>", "<|im_end|>", "<s>", "</s>", IMAGE_TOKEN) if tokenizer.has(n)}
    out, text = "", []
    for token in [*encoded.ids, None]:
        if token is None or token in names:
            out += tokenizer.decode(text) + names.get(token, "")
            text = []
        else:
            text.append(token)
    return out


def learnt(encoded) -> list[int]:
    return [token for token, flag in zip(encoded.ids, encoded.supervised) if flag]


@pytest.fixture(scope="module")
def transformers_tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bpe")
    BPE.save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML_JINJA
    return tokenizer


@pytest.mark.parametrize(
    "conversation",
    [
        talk("What is this?", "A pear."),
        [{"role": "system", "content": "Be short."}, *talk("  two spaces\n\n", "Yes."), *talk("And 123?", "No, 世界.")],
        talk("", "Something."),
    ],
)
def test_chatml_equals_transformers_rendering(transformers_tokenizer, conversation):
    template = get_template("chatml")
    for prompt in (False, True):
        messages = conversation[:-1] if prompt else conversation
        texts = [{"role": m["role"], "content": text_of(m)} for m in normalize(messages)]
        expected = transformers_tokenizer.apply_chat_template(texts, add_generation_prompt=prompt, return_dict=True)
        assert encode(normalize(messages), BPE, template, 0, prompt=prompt).ids == expected["input_ids"]


@given(HOSTILE, HOSTILE, st.text(min_size=1, max_size=8))
def test_text_never_yields_control_tokens_and_only_answers_are_supervised(question, system, answer):
    messages = normalize([{"role": "system", "content": system}, *talk([question, noise(0)], answer)])
    encoded = encode(messages, BYTES, get_template("chatml"), 3)
    ids = encoded.ids
    assert ids.count(BYTES.image_id) == 3 and len(encoded.images) == 1
    assert ids.count(BYTES.control("<|im_start|>")) == ids.count(BYTES.control("<|im_end|>")) == 3
    assert learnt(encoded) == [*BYTES.encode(answer), BYTES.control("<|im_end|>")]
    question_end = f"{question}{IMAGE_TOKEN * 3}<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(encoded, BYTES).endswith(f"{question_end}{answer}<|im_end|>\n")


@given(HOSTILE.filter(bool))
def test_a_hostile_answer_is_text_too(answer):
    encoded = encode(normalize(talk("q", answer)), BYTES, get_template("chatml"), 0)
    assert encoded.ids.count(BYTES.image_id) == 0
    assert encoded.ids.count(BYTES.control("<|im_end|>")) == 2


def test_supervised_positions_of_several_turns():
    conversation = normalize([*talk([noise(0), "a?"], "first"), *talk("b?", "second")])
    encoded = encode(conversation, BYTES, get_template("chatml"), 2)
    runs, open_run = [], []
    for token, flag in zip([*encoded.ids, 0], [*encoded.supervised, False]):
        if flag:
            open_run.append(token)
        elif open_run:
            runs.append(open_run)
            open_run = []
    end = BYTES.control("<|im_end|>")
    assert runs == [[*BYTES.encode("first"), end], [*BYTES.encode("second"), end]]


def test_a_prompt_is_the_beginning_of_the_whole():
    """What is asked at inference is what stood before the answer in training."""
    for name, tokenizer in (("chatml", BPE), ("vicuna", VICUNA)):
        conversation = normalize(talk([noise(0), "What is it?"], "A pear."))
        whole = encode(conversation, tokenizer, get_template(name), 2)
        prompt = encode(conversation[:-1], tokenizer, get_template(name), 2, prompt=True)
        assert whole.ids[: len(prompt)] == prompt.ids and not any(prompt.supervised)
        assert whole.supervised.index(True) == len(prompt)


def test_vicuna_equals_the_string_of_llava():
    """LLaVA-1.5's conversation `v1`: system, then `USER: q ASSISTANT: a</s>` for every round."""
    system = "A chat between a curious human and an artificial intelligence assistant."
    messages = normalize([{"role": "system", "content": system}, *talk("What?", "A pear."), *talk("Sure?", "Yes.")])
    encoded = encode(messages, VICUNA, get_template("vicuna"), 0)
    expected = f"<s>{system} USER: What? ASSISTANT: A pear.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert rendered(encoded, VICUNA) == expected
    end = VICUNA.control("</s>")
    assert learnt(encoded) == [*VICUNA.encode(" A pear."), end, *VICUNA.encode(" Yes."), end]
    prompt = encode(messages[:2], VICUNA, get_template("vicuna"), 0, prompt=True)
    assert rendered(prompt, VICUNA) == f"<s>{system} USER: What? ASSISTANT:"


def test_plain_is_the_image_and_its_caption():
    encoded = encode(normalize([user("", [noise(0)]), assistant("A pear.")]), BYTES, get_template("plain"), 4)
    assert encoded.ids == [BYTES.image_id] * 4 + BYTES.encode("A pear.") + [BYTES.eos_id]
    assert encoded.supervised == [False] * 4 + [True] * 8


def test_text_in_parts_is_tokenised_as_one():
    whole, parts = (
        encode(normalize(talk(question)), BPE, get_template("chatml"), 0) for question in ("What is this?", ["What i", "s this?"])
    )
    assert whole.ids == parts.ids


def test_images_keep_their_order_and_need_eyes():
    messages = normalize(talk(["a.png", noise(1), "x", noise(2)]) + talk([noise(3)]))
    images = [part["image"] for m in messages for part in m["content"] if part["type"] == "image"]
    assert encode(messages, BYTES, get_template("chatml"), 1).images == images and len(images) == 3
    with pytest.raises(MessageError) as caught:
        encode(messages, BYTES, get_template("chatml"), 0)
    assert caught.value.reason == "no_vision"


def test_templates_and_tokenizers_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match="chatml, vicuna, plain"):
        get_template("alpaca")
    with pytest.raises(UserError, match="<s>"):
        encode(normalize(talk("q")), BYTES, TEMPLATES["vicuna"], 0)
