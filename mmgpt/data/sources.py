"""Sources to samples: any kind of data a configuration can name becomes conversations with images.

    SourceConfig -> reader (readers.py, tables.py) -> Row -> Sample | Rejected

A reader knows a file format; what a row's columns mean is decided here, the same way for every format.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmgpt.config import SourceConfig
from mmgpt.data.messages import ImageRef, MessageError, Rejected, Sample, assistant, normalize, user
from mmgpt.data.readers import (
    IMAGE_SUFFIXES,
    JSON_SUFFIXES,
    TAR_SUFFIXES,
    Row,
    json_records,
    listing,
    read_folder,
    read_json,
    read_webdataset,
)
from mmgpt.data.shapes import draw_shapes
from mmgpt.data.tables import ANSWER_COLUMNS, CAPTION_COLUMNS, is_saved_dataset, read_datasets, read_parquet
from mmgpt.errors import UsageError

READERS: dict[str, Callable[[str, SourceConfig], Iterator[Row | Rejected]]] = {
    "messages": read_json,
    "llava": read_json,
    "folder": read_folder,
    "parquet": read_parquet,
    "webdataset": read_webdataset,
    "datasets": read_datasets,
}

MADE_UP = ("shapes", "letters")
"""Sources that the project makes up itself."""

_MARKER = re.compile(r"\n?<image>\n?")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_source(source: SourceConfig, *, seed: int = 0) -> Iterator[Sample | Rejected]:
    """The samples of a source in their order, and what cannot be used, each with its place.

    Images stay references (see `messages.ImageRef`): they are decoded by whoever opens them. With `repeat`, the source
    follows itself; a question is drawn anew, and what is rejected is reported the first time only. `limit` counts
    samples of one pass.

    Args:
        source: What to read, and how.
        seed: Decides, with a sample's place, which of several questions it gets.

    Raises:
        UsageError: where the path, a column, the split is not there, or a setting makes no sense.
        UserError: for a file that is broken as a whole.
    """
    check_counts(source)
    if "{}" not in source.answer:
        raise UsageError(f"source {source.path}: answer {source.answer!r} has no {{}} where the caption goes")
    if not source.question:
        raise UsageError(f"source {source.path}: question is empty; write one, or a list of several")
    if source.path == "shapes" and not os.path.exists(source.path):
        return draw_shapes(source.split, source.limit or 512)
    if source.path == "letters" and not os.path.exists(source.path):
        # Not at the top: `letters` makes preferences too, whose reader stands on this one.
        from mmgpt.data.letters import draw_letters

        return draw_letters(source.split, source.limit or 512)
    path, name = _locate(source)
    return _passes(path, READERS[name], source, seed)


def check_counts(source: SourceConfig) -> None:
    """Raises UsageError for a `repeat` or `limit` below 0."""
    if source.repeat < 0 or (source.limit is not None and source.limit < 0):
        raise UsageError(f"source {source.path}: repeat and limit must not be negative")


def read_rows(source: SourceConfig) -> Iterator[Row | Rejected]:
    """The records of a source as they stand in it, for readers of other things than conversations to learn from.

    Raises:
        UsageError: as `read_source`.
    """
    path, name = _locate(source)
    return _rows(path, READERS[name], source)


def detect_format(path: str) -> str:
    """How to read a path that exists, or a pattern: a value of `SourceConfig.format` other than `auto`.

    Raises:
        UsageError: where the path says nothing, with what it holds.
    """
    name = str(path).lower()
    if os.path.isdir(path):
        return _detect_folder(str(path))
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(TAR_SUFFIXES):
        return "webdataset"
    if name.endswith(JSON_SUFFIXES):
        if os.path.isfile(path):
            for _, record in json_records(Path(path)):
                if isinstance(record, dict):
                    return "llava" if "conversations" in record else "messages"
        return "messages"
    if name.endswith(IMAGE_SUFFIXES):
        raise UsageError(f"{path} is one picture: name the folder it is in, or a file that says what the pictures show")
    raise UsageError(
        f"cannot tell the format of {path} by its name: set format to one of {', '.join(READERS)} "
        f"(known endings: .parquet, {', '.join((*JSON_SUFFIXES, *TAR_SUFFIXES))})"
    )


def _detect_folder(path: str) -> str:
    if is_saved_dataset(path):
        return "datasets"
    files = [os.path.join(folder, file) for folder, _, names in os.walk(path) for file in names if file[0] != "."]

    def ending(*suffixes: str) -> list[str]:
        return sorted(file for file in files if file.lower().endswith(suffixes))

    if ending("metadata.jsonl", "metadata.csv"):
        return "folder"
    # Tables and tars before pictures: a picture beside them is an illustration.
    if ending(".parquet"):
        return "parquet"
    if ending(*TAR_SUFFIXES):
        return "webdataset"
    images, lists = ending(*IMAGE_SUFFIXES), ending(*JSON_SUFFIXES)
    lists = [file for file in lists if os.path.dirname(file) == path.rstrip(os.sep)]
    if images and len(lists) > 1:
        # Class folders would be the wrong guess for `images/` beside train.json and val.json, and so would both lists.
        raise UsageError(
            f"{path} holds images and several lists: name one of {', '.join(lists)}, or set format: folder"
        )
    if lists:
        return detect_format(lists[0])
    if images:
        return "folder"
    raise UsageError(
        f"{path} holds nothing that can be read: looked for images, .parquet, .tar, .jsonl; there is {listing(path)}"
    )


def _locate(source: SourceConfig) -> tuple[str, str]:
    """Path and format; a named data set becomes the path of its parquet file."""
    path, name = os.path.expanduser(source.path), source.format
    if os.path.exists(path) or any(sign in path for sign in "*?[{"):
        return path, detect_format(path) if name == "auto" else name
    known = path.lower().endswith((".parquet", *JSON_SUFFIXES, *TAR_SUFFIXES, *IMAGE_SUFFIXES))
    if name == "datasets" or (name == "auto" and re.fullmatch(r"\w[\w.-]*/[\w.-]*\w", path) and not known):
        return path, "datasets"
    if name in ("auto", "parquet") and not known:
        from mmgpt import artifacts

        try:
            return str(artifacts.resolve(path, kind="dataset")), "parquet"
        except UsageError as error:
            raise UsageError(f"no file or folder {source.path!r} in {os.getcwd()}: {error}") from error
    raise UsageError(f"no such file or folder: {source.path} (looked in {os.getcwd()})")


def _passes(
    path: str, reader: Callable[[str, SourceConfig], Iterator[Row | Rejected]], source: SourceConfig, seed: int
) -> Iterator[Sample | Rejected]:
    for turn in range(source.repeat):
        count = 0
        for item in _one_pass(path, reader, source, f"{seed}/{turn}"):
            if isinstance(item, Sample):
                if count == source.limit:
                    break
                count += 1
            elif turn:
                continue
            yield item


def _one_pass(
    path: str, reader: Callable[[str, SourceConfig], Iterator[Row | Rejected]], source: SourceConfig, seed: str
) -> Iterator[Sample | Rejected]:
    for item in _rows(path, reader, source):
        if isinstance(item, Rejected):
            yield item
        else:
            yield from samples_of(item, source, seed)


def _rows(
    path: str, reader: Callable[[str, SourceConfig], Iterator[Row | Rejected]], source: SourceConfig
) -> Iterator[Row | Rejected]:
    """The rows of the split that is asked for."""
    splits: set[str] = set()
    for item in reader(path, source):
        if source.split and isinstance(item, Row):
            split = str(item.fields.get("split"))
            splits.add(split)
            if split != source.split:
                continue
        yield item
    if source.split and splits and source.split not in splits:
        there = "no column split" if splits == {"None"} else "there is " + ", ".join(sorted(splits)[:10])
        raise UsageError(f"{source.path} has no row with split {source.split!r}: {there}")


def samples_of(row: Row, source: SourceConfig, seed: str) -> Iterator[Sample | Rejected]:
    """The samples of one row: a conversation, a question with its answer, or captions."""
    fields = row.fields
    try:
        images = [image_reference(image, row.root) for image in row.images]
        column = _text_column(fields, source)
        value = fields[column]
        if column in ("messages", "conversations") or _is_conversation(value):
            yield conversation(value, images, row)
        elif column == "question":
            answers = [text for name in ANSWER_COLUMNS for text in _texts(fields.get(name))]
            yield _question_answer(str(value), (answers or [""])[0], images, row.where)
        elif column == "tags" and any("\t" in text for text in _texts(value)):
            texts = _texts(value)
            for number, text in enumerate(texts):
                question, _, answer = text.partition("\t")
                yield _question_answer(question, answer, images, _place(row.where, number, len(texts)))
        else:
            yield from _captions(_texts(value), images, row.where, source, seed)
    except MessageError as error:
        yield Rejected(error.reason, row.where, str(error))


def _text_column(fields: dict[str, Any], source: SourceConfig) -> str:
    """The column a row's text is in: the one asked for, else the first of the usual ones."""
    if source.text_column in fields:
        return source.text_column
    if source.text_column is None:
        for name in ("messages", "conversations"):
            if fields.get(name) is not None:
                return name
        if fields.get("question") is not None and any(name in fields for name in ANSWER_COLUMNS):
            return "question"
        caption = next((name for name in CAPTION_COLUMNS if name in fields), None)
        if (caption is None or not _texts(fields[caption])) and any(
            "\t" in text for text in _texts(fields.get("tags"))
        ):
            return "tags"
        if caption:
            return caption
    wanted = source.text_column or "messages, question and answer, caption, text, label"
    raise MessageError("no_text", f"looked for {wanted}; there is {', '.join(map(str, fields)) or 'nothing'}")


def captions_of(row: Row, source: SourceConfig) -> tuple[list[ImageRef], list[str]]:
    """The pictures of a row, and all that is said about them.

    Raises:
        MessageError: it holds something else than captions.
    """
    images = [image_reference(image, row.root) for image in row.images]
    column = _text_column(row.fields, source)
    if column in ("messages", "conversations", "question", "tags") or _is_conversation(row.fields[column]):
        raise MessageError("no_captions", f"column {column} holds conversations; captions are looked for")
    return images, _texts(row.fields[column])


def _captions(
    texts: list[str], images: list[ImageRef], where: str, source: SourceConfig, seed: str
) -> Iterator[Sample | Rejected]:
    if not texts:
        raise MessageError("empty_answer", "no caption with text: there is nothing to learn from")
    if not images:
        raise MessageError("missing_image", "a caption without an image")
    chosen = texts if source.caption == "all" else texts[:1]
    for number, text in enumerate(chosen):
        place = _place(where, number, len(chosen))
        question = draw_question(source.question, f"{seed}/{place}")
        yield Sample([user(question, images), assistant(source.answer.replace("{}", text))], place)


def _question_answer(question: str, answer: str, images: list[ImageRef], where: str) -> Sample | Rejected:
    question, answer = question.replace("<image>", "").strip(), answer.strip()
    if not answer:
        return Rejected("empty_answer", where, f"no answer to {question[:60]!r}")
    if not question:
        return Rejected("empty_question", where, f"no question for the answer {answer[:60]!r}")
    return Sample([user(question, images), assistant(answer)], where)


def conversation(value: Any, images: list[ImageRef], row: Row) -> Sample:
    """A chat in the form of `messages`, or LLaVA's {from, value} turns.

    Images come inline, or at the `<image>` of the text in order; where nothing marks them, before the first question.
    """
    if not isinstance(value, list):
        raise MessageError("not_messages", f"a conversation is a list of messages, not {str(value)[:60]!r}")
    left = list(images)
    # Without images `<image>` is a word of the text; LLaVA's turns have no other use for it.
    marked = bool(images) or any(isinstance(turn, Mapping) and "from" in turn for turn in value)
    messages = []
    for number, turn in enumerate(value):
        if isinstance(turn, Mapping) and "from" in turn and turn["from"] is not None:
            if turn["from"] not in _ROLES:
                raise MessageError("bad_role", f"turn {number} is from {turn['from']!r}; known are {', '.join(_ROLES)}")
            turn = {"role": _ROLES[turn["from"]], "content": turn.get("value")}
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise MessageError("not_messages", f"message {number} needs the keys role and content, or from and value")
        content = [turn["content"]] if isinstance(turn["content"], str) else turn["content"]
        if not isinstance(content, list):
            raise MessageError("bad_part", f"content of message {number} is neither a string nor a list of parts")
        parts: list[Any] = []
        for part in content:
            text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
            if isinstance(part, Mapping) and part.get("type") == "image":
                image = part.get("image")
                parts.append({"type": "image", "image": _take(left) if image is None else image_reference(image, row.root)})
            elif isinstance(text, str) and marked and turn["role"] != "assistant":
                for place, piece in enumerate(_MARKER.split(text)):
                    parts += [{"type": "image", "image": _take(left)}] if place else []
                    parts += [{"type": "text", "text": piece}] if piece else []
            elif text != "":
                parts.append(part)
        messages.append({"role": turn["role"], "content": parts})
    if left:
        first = next((message for message in messages if message["role"] == "user"), None)
        if len(left) < len(images) or first is None:
            raise MessageError("image_count", f"{len(images)} images, but {len(images) - len(left)} places for them")
        first["content"] = [{"type": "image", "image": image} for image in left] + first["content"]
    return Sample(normalize(messages, supervised=True), row.where)


def _take(images: list[ImageRef]) -> ImageRef:
    if not images:
        raise MessageError("image_count", "the text has more places for images than there are images")
    return images.pop(0)


def image_reference(value: Any, root: Path) -> ImageRef:
    """An image as a record names it: paths start from `root` and must exist."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str | Path):
        for name in (str(value), str(value).replace("\\", "/")):
            path = os.path.join(root, name)
            if os.path.isfile(path):
                return path
        hint = "; download it first: only local files are read" if "://" in str(value) else ""
        raise MessageError("missing_file", f"no such image: {os.path.join(root, str(value))}{hint}")
    if value is None:
        raise MessageError("missing_image", "an image without a path")
    if isinstance(value, int | float | list):
        raise MessageError("bad_part", f"not an image: {str(value)[:60]!r}")
    return value


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _texts(value: Any) -> list[str]:
    """A cell as a list of texts, blank ones left out."""
    values = value if isinstance(value, list | tuple) else [value]
    return [str(text).strip() for text in values if text is not None and str(text).strip()]


def _place(where: str, number: int, count: int) -> str:
    if count == 1:
        return where
    return f"{where[:-1]}, text {number}]" if where.endswith("]") else f"{where}, text {number}"


def draw_question(questions: str | list[str], key: str) -> str:
    """The question, or one of several: always the same one for the same key."""
    if isinstance(questions, str):
        return questions
    number = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    return questions[number % len(questions)]
