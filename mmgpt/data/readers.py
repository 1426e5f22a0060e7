"""Files to rows: JSON lines, LLaVA JSON, folders of images, WebDataset tars. (`tables.py`: parquet and `datasets`.)

A reader yields `Row`s, a record's fields with its images apart, and `Rejected` for what it cannot read. What the fields
mean is decided in one place for all formats, in `sources.py`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mmgpt.config import SourceConfig
from mmgpt.data.images import ImageError
from mmgpt.data.messages import ImageRef, Rejected
from mmgpt.errors import UsageError, UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson", ".jsonl.gz", ".json.gz")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


@dataclass(frozen=True)
class Row:
    """One record of a source.

    Args:
        where: Its place, for messages about it.
        fields: The columns that hold text, messages, class names, the split.
        images: The images it has apart from the text, in order; `<image>` in its messages marks their places.
        root: Folder that relative image paths start from.
    """

    where: str
    fields: dict[str, Any]
    images: list[ImageRef] = field(default_factory=list)
    root: Path = Path()


def expand(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a path, a folder, a glob or a brace pattern (`shard-{000..007}.tar`) names, in order.

    Raises:
        UsageError: for a file that does not exist, and where nothing matches.
    """
    if os.path.isdir(path):
        found = (file for file in Path(path).rglob("*") if file.name.lower().endswith(suffixes))
        files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
        if not files:
            raise UsageError(f"no {' or '.join(suffixes)} file in the folder {path}; it holds {listing(path)}")
        return files
    if os.path.exists(path):
        return [Path(path)]
    patterns = [path]
    if "{" in path:
        from braceexpand import braceexpand

        patterns = list(braceexpand(path))
    result = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not matches or not os.path.exists(matches[0]):
            raise UsageError(f"no such file: {pattern}" + (f" (from {path})" if pattern != path else ""))
        result += [Path(match) for match in matches]
    return result


def listing(path: str | Path, most: int = 8) -> str:
    """What a folder holds, for messages."""
    names = sorted(os.listdir(path))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


# JSON


def read_json(path: str, source: SourceConfig) -> Iterator[Row | Rejected]:
    """JSON lines, or one JSON list of records; `.gz` too. A broken line is `bad_json`; a broken list is an error."""
    for file in expand(path, JSON_SUFFIXES):
        root = Path(source.image_root) if source.image_root else file.parent
        for where, record in json_records(file):
            if isinstance(record, Rejected):
                yield record
            elif not isinstance(record, dict):
                yield Rejected("bad_json", where, f"not an object with keys: {str(record)[:60]}")
            else:
                yield Row(where, record, _named_images(record, source), root)


def json_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Each record of a JSON file with its place, or `Rejected` in its stead."""
    with _open_text_bytes(file) as lines:
        first = lines.readline().removeprefix(b"\xef\xbb\xbf")
        while first and not first.strip():
            first = lines.readline()
        lines.seek(0)
        if first.lstrip().startswith(b"["):
            try:
                records = json.loads(lines.read().decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{error.lineno}: broken JSON: {error.msg}, column {error.colno}") from error
            except RecursionError as error:
                raise UserError(f"{file}: broken JSON list: nested too deeply") from error
            for number, record in enumerate(records):
                yield f"{file}[row {number}]", record
            return
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                yield where, json.loads(line.decode("utf-8").rstrip("\r\n"))
            except (ValueError, RecursionError) as error:
                # Its own place would read as line 1, or 2 for one that is cut off: the line of the file stands in front of it.
                wrong = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
                yield where, Rejected("bad_json", where, f"{wrong}: {line.strip()[:60].decode('utf-8', 'replace')}")


def _open_text_bytes(file: Path) -> IO[bytes]:
    try:
        return gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb")  # type: ignore[return-value]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _named_images(record: dict[str, Any], source: SourceConfig) -> list[ImageRef]:
    """Takes the images out of a record."""
    for key in (source.image_column, "image", "images", "image_path", "file_name"):
        if record.get(key) not in (None, "", []):
            value = record.pop(key)
            return list(value) if isinstance(value, list) else [value]
    return []


# Folders


def read_folder(path: str, source: SourceConfig) -> Iterator[Row | Rejected]:
    """A folder of images: `metadata.jsonl` / `metadata.csv`, else `.txt` beside the images, else class folders.

    The metadata is as for Hugging Face's `imagefolder`: a `file_name` relative to its own folder, and the columns any
    source may have. An image that the chosen way leaves without a caption is `no_caption`. Images are not opened here.
    """
    root, metadata, images = _scan(path, source)
    # A folder that is a split has no column of that name; its rows get one, so that all formats are filtered alike.
    split = {"split": source.split} if root != Path(path) else {}
    if metadata:
        described: set[str] = set()
        for file in metadata:
            for row in _metadata_rows(file, source):
                if isinstance(row, Row):
                    described.update(os.path.normpath(row.root / str(image).replace("\\", "/")) for image in row.images)
                    row.fields.update(split)
                yield row
        captions = "metadata"
    else:
        described = {str(image) for image in images if image.with_suffix(".txt").is_file()}
        classes = {image: _class_name(image, root) for image in images}
        if not described and not any(classes.values()):
            raise UsageError(
                f"{path} has {len(images)} images but nothing that says what they show: "
                "add metadata.jsonl or .csv (file_name, caption), a .txt beside each image, or one folder a class"
            )
        captions = "text" if described else "class"
    for image in images:
        if captions == "class" and classes[image]:
            yield Row(str(image), {"label": classes[image]} | split, [str(image)])
        elif captions == "text" and str(image) in described:
            text_file = image.with_suffix(".txt")
            try:
                text = text_file.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                yield Rejected("bad_text", str(text_file), f"not readable as UTF-8: {error}")
                continue
            yield Row(str(image), {"caption": text} | split, [str(image)])
        elif captions == "class" or os.path.normpath(image) not in described:
            wanted = {"metadata": "no metadata names it", "text": "no .txt beside it", "class": "not in a class folder"}
            yield Rejected("no_caption", str(image), wanted[captions])


def folder_has_split(path: str, split: str) -> bool:
    """Whether a split of a folder is a folder in it."""
    return os.path.isdir(os.path.join(path, split))


def _scan(path: str, source: SourceConfig) -> tuple[Path, list[Path], list[Path]]:
    """The folder to read (that of the split), its metadata files and its images, sorted."""
    if not os.path.isdir(path):
        raise UsageError(f"{path} is not a folder; format folder reads a folder of images")
    root = Path(path)
    if source.split and folder_has_split(path, source.split):
        root = root / source.split
    metadata, images = [], []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if name in ("metadata.jsonl", "metadata.csv"):
                metadata.append(Path(folder, name))
            elif name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                images.append(Path(folder, name))
    if not images and not metadata:
        raise UsageError(f"no images ({', '.join(IMAGE_SUFFIXES)}) in the folder {root}; it holds {listing(root)}")
    if source.split and root == Path(path) and not metadata:
        raise UsageError(f"no split {source.split!r} in {path}: no folder of that name; it holds {listing(path)}")
    return root, metadata, sorted(images)


def _class_name(image: Path, root: Path) -> str:
    """The folder of an image in words; none for an image at the root, or right in the folder of a split."""
    folder = image.parent
    if folder == root or (folder.parent == root and folder.name.lower() in SPLITS):
        return ""
    return re.sub(r"[_-]+", " ", folder.name).strip()


def _metadata_rows(file: Path, source: SourceConfig) -> Iterator[Row | Rejected]:
    root = Path(source.image_root) if source.image_root else file.parent
    for where, record in _csv_records(file) if file.suffix == ".csv" else json_records(file):
        if isinstance(record, Rejected):
            yield record
            continue
        images = _named_images(record, source) if isinstance(record, dict) else []
        if not images:
            yield Rejected("bad_metadata", where, "no file_name")
        else:
            yield Row(where, record, images, root)


def _csv_records(file: Path) -> Iterator[tuple[str, Any]]:
    with io.TextIOWrapper(_open_text_bytes(file), encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text)
        try:
            columns = list(reader.fieldnames or [])
            if "file_name" not in columns:
                raise UsageError(f"{file} has no column file_name; its columns are {', '.join(columns) or 'none'}")
            for record in reader:
                where = f"{file}:{reader.line_num}"
                if None in record or None in record.values():
                    yield where, Rejected("bad_csv", where, f"not {len(columns)} values; quote text with commas")
                else:
                    yield where, record
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}:{reader.line_num + 1}: not a UTF-8 CSV file: {error}") from error


# WebDataset


@dataclass(frozen=True)
class TarImage:
    """An image inside an uncompressed tar, found by its offset."""

    file: str
    member: str
    offset: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.file}[{self.member}]"

    def read(self) -> bytes:
        try:
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise ImageError("missing_file", f"cannot read {self.name}: {error.strerror}") from error


def read_webdataset(path: str, source: SourceConfig) -> Iterator[Row | Rejected]:
    """WebDataset tars in order: members with one key (the name up to the first dot) are one record.

    Images of an uncompressed tar are read when they are needed; those of a compressed one are kept as bytes. A broken
    member is rejected and reading goes on at the next one that is whole.
    """
    for file in expand(path, TAR_SUFFIXES):
        key, parts = "", dict[str, Any]()
        for member, value in _tar_members(file):
            if isinstance(value, Rejected):
                yield value
                continue
            folder, _, base = member.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not suffix or base.startswith("."):
                continue
            if (member_key := f"{folder}/{stem}" if folder else stem) != key:
                if parts:
                    yield _tar_row(file, key, parts)
                key, parts = member_key, {}
            parts[suffix.lower()] = value
        if parts:
            yield _tar_row(file, key, parts)


def _tar_members(file: Path) -> Iterator[tuple[str, Any]]:
    """Names and contents (bytes, or a `TarImage`) of the files in a tar; damage as `Rejected`."""
    damaged: list[str] = []

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
            # tarfile takes a broken header for the end of the archive, or skips it without a word.
            try:
                return super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as error:
                if bytes(buf).strip(b"\0"):
                    damaged.append(str(error))
                raise

    try:
        with open(file, "rb") as raw:
            packed = raw.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
        with tarfile.open(file, "r|*" if packed else "r:", tarinfo=Header, ignore_zeros=True) as tar:
            last = ""
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]
                if damaged:
                    yield "", _damage(file, last, damaged)
                last = info.name
                if not info.isfile():
                    continue
                if info.name.lower().endswith(IMAGE_SUFFIXES) and not packed:
                    yield info.name, TarImage(str(file), info.name, info.offset_data, info.size)
                else:
                    content = tar.extractfile(info)
                    yield info.name, content.read() if content else b""
            if damaged:
                yield "", _damage(file, last, damaged)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield "", Rejected("broken_tar", str(file), f"{error}; what follows in this file is lost")


def _damage(file: Path, last: str, damaged: list[str]) -> Rejected:
    detail = f"{damaged[0]} after {last or 'the start'}; reading went on at the next whole member"
    damaged.clear()
    return Rejected("broken_tar", f"{file}[after {last}]", detail)


def _tar_row(file: Path, key: str, parts: dict[str, Any]) -> Row | Rejected:
    where = f"{file}[{key}]"
    images = [value for suffix, value in parts.items() if f".{suffix}".endswith(IMAGE_SUFFIXES)]
    fields: dict[str, Any] = {}
    try:
        if "json" in parts:
            record = json.loads(parts["json"].decode("utf-8-sig"))
            if not isinstance(record, dict):
                return Rejected("bad_json", where, "not an object with keys")
            fields.update(record)
        for suffix, name in (("txt", "caption"), ("cls", "label"), ("caption", "caption"), ("text", "caption")):
            if suffix in parts:
                fields.setdefault(name, parts[suffix].decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Rejected("bad_text", where, f"not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Rejected("bad_json", where, str(error))
    if list(fields) == ["label"] and str(fields["label"]).strip().isdigit():
        return Rejected("bad_label", where, f"class {fields['label'].strip()} has no name; add a .txt or .json member")
    if not images and "messages" not in fields and "conversations" not in fields:
        return Rejected("missing_image", where, f"no image among the members {', '.join(sorted(parts))}")
    return Row(where, fields, images, file.parent)
