"""Plain text to learn from as a language model does: every token is supervised, documents end with the end token.

    .txt and .md (one document a file), folders of them; rows with `text` (JSON lines, parquet, `datasets`); any other source as
    the conversations that it holds
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmgpt.config import SourceConfig
from mmgpt.data.loader import Item
from mmgpt.data.messages import MessageError, Rejected, Sample, normalize
from mmgpt.data.readers import IMAGE_SUFFIXES, Row, expand
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import MADE_UP, check_counts, read_rows, read_source
from mmgpt.data.template import Encoded

if TYPE_CHECKING:
    from mmgpt.data.messages import Message
    from mmgpt.data.tokenizer import Tokenizer

TEXT_SUFFIXES = (".txt", ".text", ".md")


def read_documents(source: SourceConfig) -> Iterator[tuple[str, str] | Rejected]:
    """The documents of a source as (text, place), in its order.

    Raises:
        UsageError: no such file or folder.
    """
    check_counts(source)
    count = 0
    for found in _documents(source):
        if not isinstance(found, Rejected):
            if count == source.limit:
                return
            count += 1
        yield found


def holds_text(source: SourceConfig) -> bool:
    """Whether a source is plain text: by its files' names, or by its first row.

    Raises:
        UsageError: there is no such source.
    """
    path = os.path.expanduser(source.path)
    if _has_text_files(path):
        return True
    if source.path in MADE_UP and not os.path.exists(path):
        return False
    first = next((row for row in read_rows(source) if isinstance(row, Row)), None)
    if first is None or first.images or first.fields.get("messages") is not None:
        return False
    return isinstance(first.fields.get(source.text_column or "text"), str)


def _has_text_files(path: str) -> bool:
    if not os.path.isdir(path):
        return path.lower().endswith(TEXT_SUFFIXES)
    names = [file.name.lower() for file in Path(path).rglob("*")]
    # Text beside pictures is their captions.
    return any(name.endswith(TEXT_SUFFIXES) for name in names) and not any(name.endswith(IMAGE_SUFFIXES) for name in names)


def _documents(source: SourceConfig) -> Iterator[tuple[str, str] | Rejected]:
    path, column = os.path.expanduser(source.path), source.text_column or "text"
    if not _has_text_files(path):
        for row in read_rows(source):
            if isinstance(row, Rejected):
                yield row
            elif not isinstance(row.fields.get(column), str):
                yield Rejected("no_text", row.where, f"no text under {column!r}")
            elif not row.fields[column].strip():
                yield Rejected("empty_text", row.where, f"{column!r} is empty")
            else:
                yield row.fields[column], row.where
        return
    for file in expand(path, TEXT_SUFFIXES):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            yield Rejected("not_utf8", str(file), f"byte {error.start} is not UTF-8")
            continue
        yield (text, str(file)) if text.strip() else Rejected("empty_text", str(file), "nothing but blanks")


def load_text(
    sources: Sequence[SourceConfig],
    tokenizer: Tokenizer,
    encode: Callable[[Sequence[Message]], Encoded],
    *,
    length: int,
    report: RejectionReport,
    seed: int,
) -> tuple[list[Item], int]:
    """Sources as pieces of at most `length` tokens for `BatchLoader`, all of their tokens supervised.

    A document is cut where it is full, its end token stands behind its last piece. Conversations are rendered in the model's
    template, and learnt from whole; those longer than `length` are cut as well, those with pictures are left out.

    Args:
        sources: What to read; a source is repeated as its `repeat` says.
        tokenizer: Encodes text.
        encode: Renders a conversation (`MultimodalGPT.encode`).
        length: Tokens of a piece.
        report: Takes what cannot be used.
        seed: Draws one of several questions of a source.

    Returns:
        The pieces, and how many documents there were in all.
    """
    items: list[Item] = []
    total = 0
    for source in sources:
        for ids, where in _encoded(source, tokenizer, encode, seed):
            total += 1
            if isinstance(ids, Rejected):
                report.add(ids)
                continue
            for start in range(0, len(ids), length):
                piece = ids[start : start + length]
                if len(piece) > 1:
                    items.append(Item(Sample([], f"{where}, token {start}"), Encoded(piece, [True] * len(piece), [])))
    return items, total


def _encoded(
    source: SourceConfig, tokenizer: Tokenizer, encode: Callable[[Sequence[Message]], Encoded], seed: int
) -> Iterator[tuple[list[int] | Rejected, str]]:
    if holds_text(source):
        for turn in range(source.repeat):
            for found in read_documents(source):
                if isinstance(found, Rejected):
                    if not turn:
                        yield found, found.where
                else:
                    yield [*tokenizer.encode(found[0]), tokenizer.eos_id], found[1]
        return
    for sample in read_source(source, seed=seed):
        if isinstance(sample, Rejected):
            yield sample, sample.where
        elif sample.images:
            yield Rejected("has_image", sample.where, "the pretraining mix is text alone"), sample.where
        else:
            try:
                yield encode(normalize(sample.messages, supervised=True)).ids, sample.where
            except MessageError as error:
                yield Rejected(error.reason, sample.where, str(error)), sample.where
