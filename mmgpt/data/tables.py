"""Tables to rows: parquet files with image bytes, and anything `datasets` loads.

Text columns are read row group by row group; images stay where they are until somebody opens one, so that listing a
data set costs neither its decoding nor its memory.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgpt.config import SourceConfig
from mmgpt.data.images import ImageError
from mmgpt.data.messages import Rejected
from mmgpt.data.readers import Row, expand
from mmgpt.errors import UsageError, UserError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "images", "img", "picture", "photo", "image_bytes", "image_data", "jpg", "png")
CAPTION_COLUMNS = ("captions", "caption", "text", "label", "class_name", "class")
ANSWER_COLUMNS = ("answer", "multiple_choice_answer", "answers")
TEXT_COLUMNS = ("messages", "conversations", "question", *ANSWER_COLUMNS, *CAPTION_COLUMNS, "tags")
# A table of preferences has one of the first four, and says with the others what was asked and who won.
PREFERRED_COLUMNS = ("chosen", "completions", "output_1", "ranks")
PREFERENCE_COLUMNS = (*PREFERRED_COLUMNS, "rejected", "output_2", "prompt", "instruction", "scores", "votes", "preference")
CACHE_BYTES = 256 * 2**20
"""Row groups that a process keeps, for images read in random order."""


# Parquet


@dataclass(frozen=True)
class ParquetImage:
    """An image in a parquet file. Small, picklable, and good in a forked process: the file is opened where it is read.

    Args:
        file: The parquet file.
        column: Holds bytes, `datasets`' struct {bytes, path}, or a list of either.
        row_group, row: Which row, counted from the start of its row group.
        number: The row counted from the start of the file, for messages.
        item: Which image of a list; None where the column holds one.
        root: Folder that a path in the struct starts from.
    """

    file: str
    column: str
    row_group: int
    row: int
    number: int
    item: int | None = None
    root: str = ""

    @property
    def name(self) -> str:
        return f"{self.file}[row {self.number}]"

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            ImageError: `missing_image` for an empty cell, `missing_file` where the file is gone.
        """
        value = _row_groups.column(self.file, self.row_group, self.column)[self.row].as_py()
        if self.item is not None and value is not None:
            value = value[self.item]
        return cell_bytes(value, self.root, self.name)


def cell_bytes(value: Any, root: str, name: str) -> bytes:
    """The encoded bytes of one image cell: bytes, or {bytes, path}."""
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes")
        if value is None and path:
            value = path
    if isinstance(value, str):
        try:
            return Path(root, value).read_bytes()
        except OSError as error:
            raise ImageError("missing_file", f"{name}: cannot read {Path(root, value)}: {error.strerror}") from error
    if not value:
        raise ImageError("missing_image", f"{name} has no image")
    return value


class RowGroups:
    """The image columns of the row groups read last, up to `CACHE_BYTES` (always one)."""

    def __init__(self) -> None:
        self._columns: OrderedDict[tuple[Any, ...], pa.ChunkedArray] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def column(self, file: str, row_group: int, column: str) -> pa.ChunkedArray:
        try:
            state = os.stat(file)
        except OSError as error:
            raise ImageError("missing_file", f"cannot read {file}: {error.strerror}") from error
        key = (file, state.st_mtime_ns, state.st_size, row_group, column)
        with self._lock:
            if key in self._columns:
                self._columns.move_to_end(key)
                return self._columns[key]
            # No threads and no read-ahead: pyarrow's pools are not to be relied on in a forked process.
            try:
                values = _read_group(_parquet(Path(file)), file, row_group, [column]).column(0)
            except UserError as error:
                raise ImageError("unreadable_file", str(error)) from error
            self._columns[key] = values
            self._bytes += values.nbytes
            while self._bytes > CACHE_BYTES and len(self._columns) > 1:
                self._bytes -= self._columns.popitem(last=False)[1].nbytes
            return values


_row_groups = RowGroups()


def _forget_row_groups() -> None:
    # A fork may happen while another thread holds the lock.
    global _row_groups
    _row_groups = RowGroups()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_row_groups)


def read_parquet(path: str, source: SourceConfig) -> Iterator[Row | Rejected]:
    """Rows of a parquet file, a folder of them, or a glob.

    Raises:
        UsageError: where a column is not there (the message lists those that are), or no file belongs to the split.
    """
    files = expand(path, (".parquet",))
    tables = {file: _parquet(file) for file in files}
    split: dict[str, Any] = {}
    if source.split and not any("split" in table.schema_arrow.names for table in tables.values()):
        files = [file for file in files if source.split in _split_names(file, Path(path))]
        if not files:
            there = ", ".join(file.name for file in list(tables)[:8])
            raise UsageError(
                f"no split {source.split!r} in {path}: no column split, and no file named so among {there}"
            )
        split = {"split": source.split}
    for file in files:
        table = tables[file]
        schema = table.schema_arrow
        features = _hub_features(schema)
        classes = label_names(features)
        known = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
        known += [name for name in schema.names if _is_image_struct(schema.field(name).type)]
        image_column = find_image_column(schema.names, known, source, str(file))
        columns = find_text_columns([name for name in schema.names if name != image_column], source, str(file))
        check_labels(columns, classes, {name: _is_integer(schema.field(name).type) for name in columns}, str(file))
        root = source.image_root or str(file.parent)
        number = 0
        for group in range(table.num_row_groups):
            records = _read_group(table, file, group, columns).to_pylist()
            counts = _image_counts(table, file, group, image_column) if image_column else [None] * len(records)
            for row, (record, count) in enumerate(zip(records, counts)):
                images = []
                if image_column and count is not None:
                    items = range(count) if count >= 0 else [None]
                    images = [ParquetImage(str(file), image_column, group, row, number, item, root) for item in items]
                where = f"{file}[row {number}]"
                yield table_row(Row(where, record | split, images, Path(root)), classes, image_column)
                number += 1


def _parquet(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is not a readable parquet file: {str(error)[:200]}") from error


def _read_group(table: Any, file: str | Path, group: int, columns: list[str]) -> Any:
    """Some columns of a row group. Raises UserError where the file is damaged inside, which its footer does not tell."""
    import pyarrow as pa

    try:
        return table.read_row_group(group, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is damaged in row group {group}: {str(error)[:200]}; copy it again") from error


def _split_names(file: Path, root: Path) -> set[str]:
    """What a file's name and folders say about its split, as the hub names files: train-00000-of-00004.parquet."""
    inside = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
    return {*inside.parts[:-1], re.split(r"[-_.]", inside.name)[0]}


def _hub_features(schema: pa.Schema) -> dict[str, Any]:
    """The features that `datasets` notes in a parquet file's metadata."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}


def _is_image_struct(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}


def _is_integer(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind)


def _image_counts(table: Any, file: Path, group: int, column: str) -> list[int | None]:
    """For each row of a row group: how many images the list has, -1 for a single one, None for an empty cell.

    The bytes are left unread where the file says enough without: a count of nulls, or the paths beside the bytes.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = table.schema_arrow.field(column).type
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    metadata = table.metadata.row_group(group)
    leaves = {metadata.column(i).path_in_schema: metadata.column(i) for i in range(metadata.num_columns)}
    paths = [name for name in leaves if name.startswith(f"{column}.") and name.endswith(".path")]
    statistics = leaves[column].statistics if column in leaves else None
    if not listed and statistics is not None and statistics.null_count == 0:
        return [-1] * metadata.num_rows
    values = _read_group(table, file, group, paths or [column]).column(0)
    if listed:
        return pc.list_value_length(values).to_pylist()
    return [-1 if valid else None for valid in values.is_valid().to_pylist()]


# What any table has: columns to find, labels to name


def find_image_column(columns: list[str], known: list[str], source: SourceConfig, place: str) -> str | None:
    """The column with the images: the one that is asked for, else one that is known to hold images, else a usual name.

    Raises:
        UsageError: where there is none; a table of messages alone may do without.
    """
    default = SourceConfig().image_column
    for name in (source.image_column, *known, *IMAGE_COLUMNS):
        if name in columns:
            return name
        if name == source.image_column != default:
            break
    if source.image_column == default and (
        {"messages", "conversations", source.text_column, *PREFERRED_COLUMNS} & set(columns)
    ):
        return None
    there = ", ".join(columns)
    raise UsageError(f"{place} has no image column {source.image_column!r}; its columns are {there}: set image_column")


def find_text_columns(columns: list[str], source: SourceConfig, place: str) -> list[str]:
    """The columns to read besides the images.

    Raises:
        UsageError: where none of the usual names, or not the one that is asked for, is there.
    """
    found = [name for name in TEXT_COLUMNS if name in columns]
    if set(PREFERRED_COLUMNS) & set(columns):
        found += [name for name in PREFERENCE_COLUMNS if name in columns]
    if source.text_column:
        found = [source.text_column] if source.text_column in columns else []
    if not found:
        wanted = repr(source.text_column) if source.text_column else f"of the usual names ({', '.join(TEXT_COLUMNS)})"
        there = ", ".join(columns)
        raise UsageError(f"{place} has no text column {wanted}; its columns are {there}: set text_column")
    return found + [name for name in ("split",) if name in columns and name not in found]


def label_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """The class names of each `ClassLabel` column."""
    return {
        column: list(feature["names"])
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def check_labels(columns: list[str], names: dict[str, list[str]], integer: dict[str, bool], place: str) -> None:
    """Class numbers without names cannot be learned as text, unless a better column comes first.

    Raises:
        UsageError: names the column.
    """
    text = next((name for name in columns if name in ("label", "class") or not integer[name]), None)
    if text and integer[text] and text not in names:
        raise UsageError(f"{place}: column {text!r} holds class numbers without names: set text_column to another")


def table_row(row: Row, names: dict[str, list[str]], image_column: str | None) -> Row | Rejected:
    """A row with its class numbers turned into names."""
    record = row.fields
    for column in names.keys() & record.keys():
        label = record[column]
        if isinstance(label, int) and 0 <= label < len(names[column]):
            record[column] = names[column][label]
        elif label == -1 or label is None:
            record[column] = None
        else:
            return Rejected(
                "bad_label", row.where, f"no class {label} in column {column!r} ({len(names[column])} names)"
            )
    alone = ("messages", "conversations", *PREFERRED_COLUMNS)
    if image_column and not row.images and not any(record.get(name) for name in alone):
        return Rejected("missing_image", row.where, f"column {image_column!r} is empty")
    return row


# datasets


class DatasetImage:
    """An image of a `datasets` table, left encoded until it is read."""

    def __init__(self, dataset: Any, column: str, row: int, item: int | None, name: str):
        self.dataset, self.column, self.row, self.item, self.name = dataset, column, row, item, name

    def read(self) -> bytes:
        value = self.dataset[self.row][self.column]
        if self.item is not None and value is not None:
            value = value[self.item]
        return cell_bytes(value, "", self.name)


def read_datasets(path: str, source: SourceConfig) -> Iterator[Row | Rejected]:
    """Rows of a data set that was saved with `save_to_disk`, or of anything `datasets.load_dataset` takes.

    Without a split, all splits follow each other.
    """
    import datasets

    loaded = _load(path)
    splits = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or ""): loaded}
    if source.split and source.split in splits:
        splits = {source.split: splits[source.split]}
    elif source.split and not all("split" in table.column_names for table in splits.values()):
        raise UsageError(f"{path} has no split {source.split!r}; its splits are {', '.join(splits) or 'unnamed'}")
    for split, table in splits.items():
        place = f"{path}:{split}" if split else path
        features = table.features
        known = [name for name, feature in features.items() if _holds_images(feature)]
        image_column = find_image_column(table.column_names, known, source, place)
        if image_column and _holds_images(features[image_column]):
            single = isinstance(features[image_column], datasets.Image)
            encoded = datasets.Image(decode=False)
            table = table.cast_column(image_column, encoded if single else datasets.List(encoded))
        columns = find_text_columns([name for name in table.column_names if name != image_column], source, place)
        classes = [name for name in columns if isinstance(features[name], datasets.ClassLabel)]
        names = {name: list(features[name].names) for name in classes}
        integer = {name: str(getattr(features[name], "dtype", "")).startswith(("int", "uint")) for name in columns}
        check_labels(columns, names, integer, place)
        listed = image_column and not isinstance(table.features[image_column], datasets.Image | datasets.Value | dict)
        encoded_images = table.select_columns([image_column]) if image_column else None
        # The bytes are read here only where the number of images has to be counted.
        text = table.select_columns(columns + ([image_column] if listed else []))
        for number, record in enumerate(text):
            where = f"{place}[row {number}]"
            items: Any = [None] if image_column else []
            if listed:
                items = range(len(record.pop(image_column) or []))
            images = [DatasetImage(encoded_images, str(image_column), number, item, where) for item in items]
            if source.split and split == source.split:
                record["split"] = split
            yield table_row(Row(where, record, images, Path(source.image_root or "")), names, image_column)


def _holds_images(feature: Any) -> bool:
    import datasets

    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(feature, datasets.Image) or isinstance(inner, datasets.Image)


def _load(path: str) -> Any:
    import datasets

    try:
        if is_saved_dataset(path):
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path)
    except (OSError, ValueError, RuntimeError) as error:
        # What datasets raises: DatasetNotFoundError, DataFilesNotFoundError, ConnectionError, offline mode, ...
        there = "" if os.path.exists(path) else " (no such file or folder here)"
        said = (str(error).splitlines() or [""])[0][:300]
        raise UsageError(
            f"datasets cannot load {path!r}{there}: {type(error).__name__}: {said}; "
            "name a folder written by save_to_disk, or an id that can be reached from here"
        ) from error


def is_saved_dataset(path: str) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json"))
