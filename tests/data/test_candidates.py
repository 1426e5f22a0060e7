"""Captions made into rankings."""

import io
import math
import re
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmgpt.config import SourceConfig
from mmgpt.data import similarity
from mmgpt.data.candidates import FEWEST, MOST, Captioned, rank_captions, read_captioned
from mmgpt.data.messages import Rejected, images_of, text_of
from mmgpt.data.preferences import read_preferences
from mmgpt.data.ranked import Preference
from mmgpt.errors import UsageError

COLOURS = ("black", "white", "red", "blue", "green")
THINGS = ("dog", "horse", "car", "boat")


def captions_about(colour, thing):
    return [
        f"A {colour} {thing} on the grass.",
        f"The {thing} is {colour}.",
        f"There is a {colour} {thing} outside.",
        f"A {thing} of {colour} colour.",
    ]


def write(path, rows):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    table = {"image": [buffer.getvalue() for _ in rows], "captions": [list(row) for row in rows], "split": ["train"] * len(rows)}
    pq.write_table(pa.table(table), path)
    return str(path)


@pytest.fixture
def source(tmp_path):
    rows = [captions_about(colour, thing) for colour in COLOURS for thing in THINGS]
    return SourceConfig(path=write(tmp_path / "photos.parquet", rows), candidates=6, question=["What is it?", "Describe it."])


def words_in_common(sentences):
    """A bag of words: an embedding of which the nearest are those with the most words in common."""
    vectors = torch.zeros(len(sentences), 512)
    for vector, sentence in zip(vectors, sentences):
        for word in re.findall(r"\w+", sentence.lower()):
            vector[zlib.crc32(word.encode()) % 512] += 1
    return torch.nn.functional.normalize(vectors, dim=-1)


def test_every_picture_gets_candidates_in_an_order_that_its_own_mostly_lead(source):
    won = lost = 0
    pictures = list(read_captioned(source))
    ranked = list(rank_captions(source, words_in_common))
    assert len(ranked) == len(pictures) == 20
    for picture, preference in zip(pictures, ranked):
        assert isinstance(picture, Captioned) and isinstance(preference, Preference)
        assert [image.name for image in images_of(preference.prompt)] == [picture.image.name]
        assert text_of(preference.prompt[0]) in source.question
        assert len(set(preference.answers)) == len(preference.answers) <= 6
        assert preference.compared == math.comb(len(preference.answers), 2)
        own = [answer in picture.captions for answer in preference.answers]
        assert any(own)
        won += sum(own[better] and not own[worse] for better, worse in preference.pairs)
        lost += sum(own[worse] and not own[better] for better, worse in preference.pairs)
        # An order: whoever beats somebody is beaten by nobody that this one beats.
        for better, worse in preference.pairs:
            assert (worse, better) not in preference.pairs
            below = {place: {low for high, low in preference.pairs if high == place} for place in (better, worse)}
            assert below[worse] <= below[better]
    assert won > 4 * lost


def test_a_word_exchanged_makes_a_caption_worse(source):
    exchanged = beaten = 0
    for picture, preference in zip(read_captioned(source), rank_captions(source, words_in_common)):
        everybody = {text for other in read_captioned(source) for text in other.captions}
        for place, answer in enumerate(preference.answers):
            if answer in everybody:
                continue
            exchanged += 1
            words = [set(re.findall(r"\w+", text.lower())) for text in (answer, *picture.captions)]
            assert min(len(words[0] - other) for other in words[1:]) == 1
            beaten += any(worse == place and preference.answers[better] in picture.captions for better, worse in preference.pairs)
    assert exchanged >= 5 and beaten == exchanged


def test_they_are_the_same_every_time(source):
    first, second = ([(item.answers, item.pairs) for item in rank_captions(source, words_in_common)] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("count", [FEWEST, 7, MOST])
def test_so_many_as_are_asked_for(source, count):
    source.candidates = count
    assert max(len(item.answers) for item in rank_captions(source, words_in_common)) == count


def test_the_form_of_an_answer_and_the_limit_hold(source):
    source.answer, source.limit = "It shows: {}", 12
    ranked = list(rank_captions(source, words_in_common))
    assert len(ranked) == 12
    assert all(answer.startswith("It shows: ") for item in ranked for answer in item.answers)


def test_pictures_with_few_captions_are_counted(tmp_path, source):
    rows = [captions_about(colour, thing) for colour in COLOURS for thing in THINGS]
    rows[3] = ["A dog."]
    rows[5] = ["The same.", "The same.", "The same."]
    source.path = write(tmp_path / "few.parquet", rows)
    found = list(rank_captions(source, words_in_common))
    bad = [item for item in found if isinstance(item, Rejected)]
    assert [item.reason for item in bad] == ["few_captions"] * 2
    assert [re.search(r"row (\d+)", item.where)[1] for item in bad] == ["3", "5"] and len(found) == 20


def test_questions_and_answers_are_no_captions(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n')
    with pytest.raises(UsageError, match="too few"):
        found = rank_captions(SourceConfig(path=str(path), candidates=4), words_in_common)
        assert next(found).reason == "no_captions"
        next(found)


@pytest.mark.parametrize("count", [-1, 1, 3, 10])
def test_a_number_that_nobody_ranks_is_refused(source, count):
    source.candidates = count
    with pytest.raises(UsageError, match=f"candidates is {count}, but must be 0 or from 4 to 9"):
        list(rank_captions(source, words_in_common))


def test_a_preference_source_with_candidates_is_read_like_any_other(source, monkeypatch):
    monkeypatch.setattr(similarity, "SentenceEncoder", lambda: words_in_common)
    expected = [item.answers for item in rank_captions(source, words_in_common)]
    assert [item.answers for item in read_preferences(source)] == expected
