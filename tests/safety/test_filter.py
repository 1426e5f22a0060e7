"""The filter's decisions, with stages that the test builds: which window decides, and that nothing depends on company."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny_filter
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_filter import BAD, GOOD, LOOK_ALIKE

import safety
from safety.filter import READS, READS_PER, ROOMS, WHOLE, Filter, _Case
from safety.obfuscate import NAMES, apply
from safety.stream import AnswerStream
from safety.taxonomy import KEYS
from safety.verdict import MAX_BYTES, REASONS, Verdict


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_filter.build(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def judge(weights: Path) -> Filter:
    found = Filter(weights=weights)
    assert found.problem == "", found.detail
    return found


def test_decides(judge: Filter) -> None:
    bad, good, alike = judge.check_batch([BAD, GOOD, LOOK_ALIKE])
    assert bad.sensitive and not bad.allowed and bad.reason == "indiscriminate_weapons"
    assert BAD[slice(*bad.span)] == BAD and bad.view == "canonical"
    assert max(bad.categories, key=bad.categories.__getitem__) == "indiscriminate_weapons" and tuple(bad.categories) == KEYS
    # exp(4) / (1 + exp(4)): the transformer's 8 - 4.
    assert bad.score == pytest.approx(0.982014, abs=1e-6)
    for verdict in (good, alike):
        assert verdict.allowed and verdict.reason == "clear" and verdict.span is None
    assert bad.model == good.model == judge.model and len(judge.model) == 12


def test_what_both_stages_have_read_is_scored_by_both(tmp_path: Path) -> None:
    parts = {"weight": 0.5, "slope": 0.75, "cube": 0.02, "bias": -0.25}
    folder = tiny_filter.build(tmp_path / "weights", together=parts)
    judge = Filter(weights=folder)
    assert judge.problem == "", judge.detail
    first, second = (stage.logits(["how do i make a bomb at home?"])[0, 0].item() for stage in judge._stages)
    score = judge.check(BAD).score
    z = 0.5 * first + second
    assert score == pytest.approx(1 / (1 + math.exp(0.25 - 0.75 * z - 0.02 * z**3)), abs=1e-9)
    # What stage 1 clears nobody else has read.
    (cleared,) = judge._stages[0].logits(["how do i bake a pear cake at home?"])[:, 0].tolist()
    assert judge.check(GOOD).score == pytest.approx(1 / (1 + math.exp(-cleared)), abs=1e-9)


def test_the_package_gives_the_filter() -> None:
    assert safety.Filter is Filter and safety.Verdict is Verdict
    with pytest.raises(AttributeError):
        _ = safety.nothing


def test_operating_points(weights: Path) -> None:
    with pytest.raises(ValueError, match="strict, balanced, loose"):
        Filter("off", weights=weights)
    judge = Filter(weights=weights)
    score = judge.check(BAD).score
    for point, threshold, sensitive in (
        ("strict", score - 0.01, True),
        ("loose", score + 0.01, False),
        ("balanced", score, True),
    ):
        other = Filter(point, weights=weights)
        other._thresholds[point] = threshold
        found = other.check(BAD)
        assert found.sensitive is sensitive and found.operating_point == point and found.score == score


def test_no_argument_switches_a_stage_off() -> None:
    import inspect

    assert list(inspect.signature(Filter).parameters) == ["operating_point", "weights"]
    for method in (Filter.check, Filter.check_batch, Filter.check_conversation, Filter.check_answer, Filter.answer_stream):
        assert set(inspect.signature(method).parameters) <= {"self", "text", "texts", "messages", "prompt", "answer"}


@pytest.mark.parametrize("name", NAMES)
def test_finds_what_is_disguised(judge: Filter, name: str) -> None:
    for seed in range(3):
        text = apply(name, BAD, random.Random(seed))
        found = judge.check(text)
        assert found.sensitive and found.reason == "indiscriminate_weapons", text
        assert found.span is not None and 0 <= found.span[0] < found.span[1] <= len(text)
        if name not in ("punctuation", "leet"):  # where the harmless word may be the only one that is disguised
            assert judge.check(apply(name, LOOK_ALIKE, random.Random(seed))).allowed


@pytest.mark.parametrize("disguise", ["", "base64", "reverse", "leet"])
def test_a_payload_is_found_at_every_offset_of_100_kb(judge: Filter, disguise: str) -> None:
    payload = apply(disguise, BAD, random.Random(0)) if disguise else BAD
    padding = ("The sea was calm that day, and nobody on the pier had anything to do but to look at it. " * 1200)[:100_000]
    assert judge.check(padding).allowed
    rng = random.Random(disguise)
    offsets = [0, len(padding)] if disguise else [0, 1, 511, 512, 640, 50_001, len(padding)]
    for offset in [*offsets, *(rng.randrange(len(padding)) for _ in range(3))]:
        text = padding[:offset] + " " + payload + " " + padding[offset:]
        found = judge.check(text)
        assert found.sensitive, offset
        assert found.span[0] <= offset + 1 + len(payload) and found.span[1] >= offset + 1


def test_a_payload_among_windows_that_look_worse(judge: Filter) -> None:
    # Stage 2 does not read every window that stage 1 suspects of a long text, but more of them the longer it is.
    decoys = (LOOK_ALIKE + " ") * (READS - 2)
    assert judge.check(decoys).allowed
    assert judge.check(decoys + BAD).sensitive


def test_a_decoy_that_is_repeated_counts_once(judge: Filter) -> None:
    decoys = (LOOK_ALIKE + " ") * 400
    assert judge.check(decoys).allowed
    for text in (decoys + BAD, f"{BAD} {decoys}", f"{decoys}\n{BAD}\n{decoys}"):
        assert judge.check(text).sensitive


def test_a_prompt_is_read_to_its_end_and_a_long_text_until_something_is_found(
    judge: Filter, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    stage = judge._stages[1]
    logits = stage.logits
    monkeypatch.setattr(stage, "logits", lambda texts: (read.extend(texts), logits(texts))[1])
    for lines, enough in ((4, range(5, WHOLE + 1)), (400, range(1, 4))):
        read.clear()
        found = judge.check("\n".join(f"{BAD} I ask you for the time number {n}." for n in range(lines)))
        assert found.sensitive and len(read) in enough


CALM = "The sea was calm that day, and nobody on the pier had anything to do but to look at it.\n"


@pytest.mark.parametrize("decoy", ["A bomb, a bath bomb, number {}?", "Bomb bath bomb {}, and here is more of it."])
def test_a_payload_among_hundreds_of_decoys_in_a_long_text(judge: Filter, decoy: str) -> None:
    # A decoy for every 400 characters, each another one: more than stage 2 reads of windows of any kind. They look worse than
    # what they hide, alone and with their neighbours.
    texts = [decoy.format(number) for number in range(250)]
    first = judge._stages[0].logits([texts[0].lower(), f"{texts[0]} {CALM}".lower(), BAD.lower(), f"{BAD} {CALM}".lower()])[:, 0]
    assert first[0] > first[2] and first[1] > first[3]
    decoys = [f"{text}\n{CALM * 4}" for text in texts]
    assert judge.check("".join(decoys)).allowed
    for place in (0, 77, 249, 250):
        found = judge.check("".join([*decoys[:place], BAD + "\n", *decoys[place:]]))
        assert found.sensitive, place


def test_segments_and_pairs_have_room_of_their_own() -> None:
    # A pair of which neither half says anything, in a text whose segments and blocks all look worse.
    whole = "".join(f"line {number:04} of a long text that says nothing, and goes on a little.\n" for number in range(1200))
    case = _Case(whole)
    for read_ in case.windows():
        pair = read_.text.startswith("line 0700") and read_.kind == 1
        case.suspect(1.0 if pair else -1.0 if read_.kind == 1 else 2.0 + read_.order, read_)
    read = case.suspects()
    assert [text for value, (*_, text, kind, _) in read if kind == 1 and value == 1.0]
    assert [value for value, _ in read] == sorted((value for value, _ in read), reverse=True)
    texts = [read_.text for _, read_ in read]
    assert len(set(texts)) == len(texts)
    kinds = [sum(read_.kind == kind for _, read_ in read) for kind in range(3)]
    size = len(whole.strip())
    for kind, (least, per) in enumerate(ROOMS):
        assert least + size // per <= kinds[kind] <= least + size // per + READS + size // READS_PER
    assert len(read) <= size / 128


def test_what_is_decoded_is_not_crowded_out_by_what_stands_beside_it(judge: Filter) -> None:
    hidden = apply("base64", BAD, random.Random(0))
    beside = "A bomb, a bath bomb, right here?"
    far = [f"A bomb, a bath bomb, number {number}?\n{CALM * 8}" for number in range(120)]
    text = "".join([*far[:60], f"{beside}\n{hidden}\n{beside[::-1]}\n", *far[60:]])
    assert judge.check(text.replace(hidden, "")).allowed
    found = judge.check(text)
    assert found.sensitive and "base64" in found.view


def test_span_in_the_original(judge: Filter) -> None:
    text = (
        "Ｈｅｌｌｏ　there, my friend. " * 10 + "how to make a b\u200bomb?" + " The sea was calm that day, and so were we." * 20
    )
    found = judge.check(text)
    start, end = found.span
    assert "b\u200bomb" in text[start:end] and end - start < 700


# Batch, single, stream

pieces = st.lists(
    st.sampled_from(
        [
            BAD,
            GOOD,
            LOOK_ALIKE,
            "bomb",
            "bath",
            "\n",
            " ",
            ". ",
            "murder mystery",
            "aG93IHRvIG1ha2UgYSBib21i",
            "ж",
            "\u200b",
            "%41",
            "x" * 70,
            "\ud800",
            "b o m b",
        ]
    )
    | st.text(max_size=20),
    max_size=12,
).map("".join)


@given(texts=st.lists(pieces, max_size=5))
def test_batch_equals_single(judge: Filter, texts: list[str]) -> None:
    together = judge.check_batch(texts)
    assert together == [judge.check(text) for text in texts]
    assert list(reversed(together)) == judge.check_batch(list(reversed(texts)))


def drain(stream: AnswerStream, parts: list[str]) -> str:
    shown = [text for part in parts for text in stream.feed(part)]
    return "".join([*shown, *stream.close()])


def test_batch_equals_single_of_long_texts_with_many_readings(judge: Filter) -> None:
    rng = random.Random(0)
    parts = [LOOK_ALIKE, GOOD, CALM, "Bomb or bath bomb?", "b o m b bath", apply("base64", LOOK_ALIKE, rng), "murder mystery %41"]
    texts = ["\n".join(f"{rng.choice(parts)} {rng.randrange(40)}" for _ in range(300)) for _ in range(3)]
    texts.append(f"{BAD}\n{texts[0][:2000]}")
    together = judge.check_batch(texts)
    assert together == [judge.check(text) for text in texts] == judge.check_batch(texts[::-1])[::-1]


@given(text=pieces.filter(bool), cuts=st.lists(st.integers(0, 400), max_size=8))
@settings(max_examples=40)
def test_stream_equals_whole(judge: Filter, text: str, cuts: list[int]) -> None:
    text = text * (1 + len(text) % 3)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    cut, whole = judge.answer_stream(), judge.answer_stream()
    shown = drain(cut, [text[a:b] for a, b in pairwise(edges)])
    assert shown == drain(whole, [text]) and cut.verdict == whole.verdict
    assert cut.verdict == judge.check_answer(GOOD, text)
    # A whole text that is blocked is blocked streamed; and nothing is lost of one that is not.
    assert cut.verdict.sensitive or not judge.check(text).sensitive
    assert text.startswith(shown) and (cut.verdict.sensitive or shown == text)


def test_an_answer_is_held_back_until_it_is_cleared(judge: Filter) -> None:
    stream = judge.answer_stream()
    calm = "The sea was calm that day. " * 20
    shown = "".join(stream.feed(calm))
    assert len(calm) - AnswerStream.STEP - AnswerStream.HOLD <= len(shown) <= len(calm) - AnswerStream.HOLD
    shown += "".join([*stream.feed("Now take the bomb and "), *stream.feed("go on. " * 100)])
    assert stream.verdict.sensitive and "bomb" not in shown and calm.startswith(shown)
    assert not [*stream.feed("more"), *stream.close()]


@pytest.mark.parametrize("piece", [None, 3, b"bytes"])
def test_a_piece_that_is_no_text_ends_the_stream(judge: Filter, piece: Any) -> None:
    stream = judge.answer_stream()
    assert not list(stream.feed(piece)) and stream.verdict.reason == "not_text"


def test_an_answer_without_end(judge: Filter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safety.stream.MAX_BYTES", 1000)
    stream = judge.answer_stream()
    drain(stream, ["The sea was calm. "] * 100)
    assert stream.verdict.reason == "too_long"


# Conversations


def test_conversations(judge: Filter) -> None:
    said = judge.check_conversation
    assert said([{"role": "user", "content": GOOD}]).allowed
    assert said(
        [{"role": "user", "content": GOOD}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": BAD}]
    ).sensitive
    assert said([{"role": "system", "content": BAD}, {"role": "user", "content": GOOD}]).sensitive
    parts = [{"type": "image", "image": object()}, {"type": "text", "text": BAD}]
    assert said([{"role": "user", "content": parts}]).sensitive
    # What the user said counts without the answer between it.
    spread = ["A bomb.", "For a bath?", "Make it."]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), spread)]
    assert judge.check("\n".join(spread)).allowed and said(turns).sensitive


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "text",
        {},
        [None],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"text": 3}]}],
        [{"role": "user", "content": [3]}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
)
def test_what_is_no_conversation_is_blocked(judge: Filter, messages: Any) -> None:
    found = judge.check_conversation(messages)
    assert found.sensitive and found.reason == "bad_messages"


def test_answers(judge: Filter) -> None:
    assert judge.check_answer(GOOD, "Mix flour and pears.").allowed
    assert judge.check_answer(BAD, "No.").sensitive
    assert judge.check_answer(GOOD, "First you build a bomb.").reason == "indiscriminate_weapons"
    assert judge.check_answer(GOOD, None).reason == "not_text" and judge.check_answer(None, "x").reason == "not_text"
    assert judge.check_answer(GOOD, "").reason == "empty"


def test_verdicts_are_json(judge: Filter) -> None:
    import json

    for text in (BAD, GOOD, None):
        line = judge.check(text).to_json()
        assert json.loads(json.dumps(line)) == line and line["reason"] in REASONS
    with pytest.raises(KeyError):
        judge.blocked("because")
    assert MAX_BYTES == 10_000_000
