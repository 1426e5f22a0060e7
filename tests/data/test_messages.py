"""The canonical conversation: what is accepted, what it becomes, what is refused and by which reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmgpt.data.messages import LazyImage, MessageError, Sample, assistant, images_of, normalize, text_of, user

PARTS = st.one_of(
    st.text(),
    st.builds(lambda text: {"type": "text", "text": text}, st.text()),
    st.builds(lambda name: {"type": "image", "image": name}, st.text(min_size=1)),
)
CONVERSATIONS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.one_of(st.text(), st.lists(PARTS, max_size=4))}
    ),
    min_size=1,
    max_size=5,
)


@given(CONVERSATIONS)
def test_normalize_keeps_text_and_images_in_order_and_is_idempotent(conversation):
    result = normalize(conversation)
    assert normalize(result) == result
    assert [m["role"] for m in result] == [m["role"] for m in conversation]
    for before, after in zip(conversation, result):
        content = [before["content"]] if isinstance(before["content"], str) else before["content"]
        texts = [part if isinstance(part, str) else part.get("text", "") for part in content]
        assert text_of(after) == "".join(texts)
        assert all(set(part) == {"type", part["type"]} for part in after["content"])
    images = [p["image"] for m in conversation if isinstance(m["content"], list) for p in m["content"] if "image" in p]
    assert images_of(result) == images


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image", "x"]), inner, max_size=4),
        max_leaves=12,
    )
)
def test_anything_else_is_refused_with_a_reason(value):
    try:
        result = normalize(value)
    except MessageError as error:
        assert error.reason in ("not_messages", "bad_role", "bad_part") and str(error)
    else:
        assert normalize(result) == result


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "not_messages"),
        ("hello", "not_messages"),
        (b"hello", "not_messages"),
        ({"role": "user", "content": "x"}, "not_messages"),
        ([{"role": "user"}], "not_messages"),
        ([{"role": "tool", "content": "x"}], "bad_role"),
        ([{"role": ["user"], "content": "x"}], "bad_role"),
        ([{"role": "user", "content": 3}], "bad_part"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "x"}]}], "bad_part"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "bad_part"),
        ([{"role": "user", "content": [{"type": "image"}]}], "bad_part"),
        ([{"role": "user", "content": [{"type": "image", "image": None}]}], "bad_part"),
        ([{"role": "user", "content": b"bytes"}], "bad_part"),
    ],
)
def test_reasons(value, reason):
    with pytest.raises(MessageError) as caught:
        normalize(value)
    assert caught.value.reason == reason and caught.value.exit_code == 1


@pytest.mark.parametrize("answer", ["", "  \n", [], [{"type": "image", "image": "a.png"}]])
def test_an_empty_answer_is_refused_only_where_something_is_to_be_learnt(answer):
    conversation = [user("What?"), {"role": "assistant", "content": answer}]
    normalize(conversation)
    with pytest.raises(MessageError) as caught:
        normalize(conversation, supervised=True)
    assert caught.value.reason == "empty_answer"
    assert normalize([*conversation, user("Really?"), assistant("Yes.")], supervised=True)


def test_helpers():
    assert user("What?", ["a.png"])["content"] == [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    assert user("")["content"] == []
    sample = Sample([user("a", ["1", "2"]), assistant("b"), user("c", ["3"])], "x:1")
    assert sample.images == ["1", "2", "3"]

    class Row:
        name = "row"

        def read(self) -> bytes:
            return b""

    assert isinstance(Row(), LazyImage) and not isinstance("a.png", LazyImage)
