"""Every format from generated files: what is read, in which order, what is rejected and where."""

import csv
import gzip
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmgpt.config import SourceConfig
from mmgpt.data import tables
from mmgpt.data.images import ImageError, open_image
from mmgpt.data.messages import LazyImage, Rejected, Sample, text_of
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import detect_format, read_source
from mmgpt.errors import UsageError, UserError

# Before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def picture(level: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (level % 256, 0, 0)).save(file, kind)
    return file.getvalue()


def level(image) -> int:
    """Which picture an image reference leads to."""
    return open_image(image).getpixel((0, 0))[0]


def read(path, **settings) -> list:
    seed = settings.pop("seed", 0)
    return list(read_source(SourceConfig(path=str(path), **settings), seed=seed))


def samples(items) -> list[Sample]:
    return [item for item in items if isinstance(item, Sample)]


def rejected(items) -> list[tuple[str, str]]:
    return [(item.reason, item.where) for item in items if isinstance(item, Rejected)]


def turns(sample: Sample) -> list[tuple[str, list]]:
    """Roles and parts, with the picture's level for an image."""
    return [
        (m["role"], [level(p["image"]) if p["type"] == "image" else p["text"] for p in m["content"]])
        for m in sample.messages
    ]


def answers(items) -> list[str]:
    return [text_of(sample.messages[-1]) for sample in samples(items)]


def write_lines(path, records, newline="\n"):
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes("".join(line + newline for line in lines).encode())
    return path


def write_images(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))


def chat(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


# messages


def test_messages_inline_and_marked_images(tmp_path):
    write_images(tmp_path, ["a.png", "bilder ä/图 1.png"])
    inline = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "Compare"},
        {"type": "image", "image": "bilder ä/图 1.png"},
    ]
    path = write_lines(
        tmp_path / "chat.jsonl",
        [
            chat(inline, "red"),
            chat("<image>\nfirst, then <image> second", "ok", images=["bilder ä/图 1.png", "a.png"]),
            chat("no marker", "ok", images=["a.png"]),
            chat("what does <image> mean in HTML?", "nothing"),
            chat([{"type": "image"}, {"type": "text", "text": "?"}], "ok", images=["a.png"]),
            chat("windows path", "ok", images=["bilder ä\\图 1.png"]),
        ],
    )
    assert detect_format(path) == "messages"
    items = read(path)
    assert rejected(items) == []
    assert [turns(item)[0][1] for item in items] == [
        [0, "Compare", 1],
        [1, "first, then ", 0, " second"],
        [0, "no marker"],
        ["what does <image> mean in HTML?"],
        [0, "?"],
        [1, "windows path"],
    ]
    assert [item.where for item in items] == [f"{path}:{line}" for line in range(1, 7)]


def test_messages_what_is_rejected(tmp_path):
    write_images(tmp_path, ["a.png"])
    path = write_lines(
        tmp_path / "chat.jsonl",
        [
            chat("q", "fine"),
            '{"messages": [',
            '["a list"]',
            "",
            chat("q", "  "),
            chat([{"type": "image", "image": "gone.png"}], "x"),
            chat("<image><image>", "x", images=["a.png"]),
            chat("<image>", "x", images=["a.png", "a.png"]),
            {"messages": [{"role": "robot", "content": "x"}]},
            {"messages": "hello"},
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
            {"text_only": 1},
            chat("q", "x", images=["http://example.org/a.png"]),
            chat([{"type": "image", "image": 7}], "x"),
            {"messages": [5]},
            {"messages": [{"role": "user", "content": None}]},
        ],
    )
    items = read(path)
    assert answers(items) == ["fine"]
    words = ["bad_json", "bad_json", "empty_answer", "missing_file", "image_count", "image_count", "bad_role"]
    words += ["not_messages", "bad_part", "no_text", "missing_file", "bad_part", "not_messages", "bad_part"]
    lines = [2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert rejected(items) == [(word, f"{path}:{line}") for word, line in zip(words, lines, strict=True)]


def test_one_broken_line_in_a_thousand(tmp_path):
    records = [chat("q", str(number)) for number in range(1000)]
    records[616] = json.dumps(records[616])[:-5]
    path = write_lines(tmp_path / "chat.jsonl", records)
    items = read(path)
    assert len(samples(items)) == 999 and rejected(items) == [("bad_json", f"{path}:617")]
    assert items[616].detail.startswith("Unterminated string starting at (column ")
    report = RejectionReport(tmp_path / "bad_samples.jsonl")
    for item in items:
        if isinstance(item, Rejected):
            report.add(item)
    report.check(len(items), 0.01)
    with pytest.raises(UserError, match=r"chat\.jsonl:617"):
        report.check(len(items), 0.0)


def test_windows_line_endings_byte_order_mark_bad_utf8_gzip(tmp_path):
    path = write_lines(tmp_path / "chat.jsonl", [chat("q", "ä"), chat("q", "b")], newline="\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'{"messages": "\xff\xfe"}\r\n')
    items = read(path)
    assert answers(items) == ["ä", "b"] and rejected(items) == [("bad_json", f"{path}:3")]
    packed = tmp_path / "chat.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert answers(read(packed)) == ["ä", "b"]
    only_mark = tmp_path / "empty.jsonl"
    only_mark.write_bytes(b"\xef\xbb\xbf\n")
    assert read(only_mark) == []


def test_image_root_glob_and_folder_of_lists(tmp_path):
    write_images(tmp_path / "pictures", ["a.png"])
    for name in ("one", "two"):
        write_lines(tmp_path / f"{name}.jsonl", [chat("q", name, images=["a.png"])])
    root = str(tmp_path / "pictures")
    assert answers(read(tmp_path / "*.jsonl", image_root=root)) == ["one", "two"]
    assert rejected(read(tmp_path / "one.jsonl"))[0][0] == "missing_file"
    with pytest.raises(UsageError, match=r"several lists: .*one\.jsonl.*two\.jsonl"):
        read(tmp_path)
    (tmp_path / "two.jsonl").unlink()
    assert answers(read(tmp_path, image_root=root)) == ["one"]


# llava


def llava(value, answer="yes", **more):
    return {"id": "7", "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}], **more}


@pytest.mark.parametrize("as_lines", [True, False])
def test_llava(tmp_path, as_lines):
    write_images(tmp_path, ["coco/a.png", "coco/b.png"])
    records = [
        llava("<image>\nWhat is it?", image="coco/a.png"),
        llava("What is it?\n<image>", image="coco/b.png"),
        llava("<image> and <image>: same?", image=["coco/b.png", "coco/a.png"]),
        llava("no picture"),
        llava("<image>\nWhat?", image="coco/gone.png"),
        llava("<image>\nWhat?"),
        llava("<image>\nWhat?", answer="", image="coco/a.png"),
        {"image": "coco/a.png", "conversations": [{"from": "alien", "value": "<image>"}]},
    ]
    path = tmp_path / "llava.json"
    if as_lines:
        write_lines(path, records)
    else:
        path.write_text(json.dumps(records, indent=1))
    assert detect_format(path) == "llava"
    items = read(path)
    assert [turns(item)[0][1] for item in samples(items)] == [
        [0, "What is it?"],
        ["What is it?", 1],
        [1, " and ", 0, ": same?"],
        ["no picture"],
    ]
    places = [f"{path}:{n}" if as_lines else f"{path}[row {n - 1}]" for n in (5, 6, 7, 8)]
    words = ["missing_file", "image_count", "empty_answer", "bad_role"]
    assert rejected(items) == list(zip(words, places))


def test_llava_broken_list_names_the_line(tmp_path):
    path = tmp_path / "llava.json"
    path.write_text('[\n{"id": 1},\n{"id": \n]')
    with pytest.raises(UserError, match=r"llava\.json:4"):
        read(path)


# folder


def test_folder_metadata_jsonl(tmp_path):
    write_images(tmp_path, ["z.png", "sub/ä b.png", "lost.png"])
    path = write_lines(
        tmp_path / "metadata.jsonl",
        [
            {"file_name": "z.png", "text": "last"},
            {"file_name": "sub/ä b.png", "text": " ä \n"},
            {"file_name": "no.png", "text": "x"},
            {"file_name": "z.png", "text": ""},
            {"text": "x"},
            "{",
        ],
    )
    assert detect_format(tmp_path) == "folder"
    items = read(tmp_path, question="What?", answer="It shows {}.")
    assert [turns(item) for item in samples(items)] == [
        [("user", [0, "What?"]), ("assistant", ["It shows last."])],
        [("user", [1, "What?"]), ("assistant", ["It shows ä."])],
    ]
    words = ["missing_file", "empty_answer", "bad_metadata", "bad_json"]
    assert rejected(items) == [(word, f"{path}:{n}") for n, word in enumerate(words, 3)] + [
        ("no_caption", str(tmp_path / "lost.png"))
    ]


def test_folder_metadata_csv(tmp_path):
    write_images(tmp_path, ["train/a.png", "train/b.png", "test/c.png"])
    with open(tmp_path / "train" / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(
            [["file_name", "caption"], ["a.png", 'one, "two"\nlines'], ["b.png"], ["b.png", "three"]]
        )
    items = read(tmp_path, split="train")
    assert answers(items) == ['one, "two"\nlines', "three"]
    assert rejected(items) == [("bad_csv", f"{tmp_path / 'train' / 'metadata.csv'}:4")]
    (tmp_path / "train" / "metadata.csv").write_text("name,caption\na.png,x\n")
    with pytest.raises(UsageError, match="no column file_name; its columns are name, caption"):
        read(tmp_path, split="train")


def test_folder_metadata_with_a_split_column(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    write_lines(
        tmp_path / "metadata.jsonl",
        [{"file_name": f"{n}.png", "caption": n, "split": s} for n, s in (("a", "train"), ("b", "val"))],
    )
    assert answers(read(tmp_path, split="val")) == ["b"]
    assert answers(read(tmp_path)) == ["a", "b"]
    with pytest.raises(UsageError, match="there is train, val"):
        read(tmp_path, split="test")


def test_folder_text_beside_the_images(tmp_path):
    write_images(tmp_path, ["b.png", "a.jpg", "deep/c.png", "alone.png", "._hidden.png", "__MACOSX/x.png"])
    for name, text in (("b", "two"), ("a", "one\r\n"), ("deep/c", "three")):
        (tmp_path / f"{name}.txt").write_bytes(text.encode())
    items = read(tmp_path)
    assert answers(items) == ["one", "two", "three"]
    assert rejected(items) == [("no_caption", str(tmp_path / "alone.png"))]
    names = ("a.jpg", "b.png", "deep/c.png")
    assert [item.where for item in samples(items)] == [str(tmp_path / name) for name in names]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    assert ("bad_text", str(tmp_path / "b.txt")) in rejected(read(tmp_path))


def test_folder_of_classes_and_splits(tmp_path):
    write_images(
        tmp_path,
        [
            "train/golden-delicious/2.png",
            "train/golden-delicious/1.png",
            "train/fuji_apple/1.png",
            "val/fuji_apple/9.png",
        ],
    )
    assert answers(read(tmp_path, split="train")) == ["fuji apple", "golden delicious", "golden delicious"]
    assert answers(read(tmp_path, split="val")) == ["fuji apple"]
    assert len(read(tmp_path)) == 4
    wheres = [item.where for item in read(tmp_path)]
    assert wheres == sorted(wheres)
    with pytest.raises(UsageError, match=r"no split 'test'.*train, val"):
        read(tmp_path, split="test")


def test_folder_does_not_open_the_images(tmp_path):
    (tmp_path / "apple").mkdir()
    (tmp_path / "apple" / "broken.png").write_bytes(b"not an image")
    (item,) = read(tmp_path)
    with pytest.raises(ImageError):
        open_image(item.images[0])


def test_folder_without_captions_or_images(tmp_path):
    with pytest.raises(UsageError, match="nothing"):
        read(tmp_path)
    with pytest.raises(UsageError, match="no images"):
        read(tmp_path, format="folder")
    write_images(tmp_path, ["a.png", "train/b.png"])
    with pytest.raises(UsageError, match=r"metadata\.jsonl"):
        read(tmp_path)


# parquet


def write_parquet(path, rows: dict, row_group_size=3, **options):
    table = rows if isinstance(rows, pa.Table) else pa.table(rows)
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return path


def test_parquet_captions_tags_and_splits(tmp_path):
    path = write_parquet(
        tmp_path / "p.parquet",
        {
            "image": [picture(n) for n in range(7)],
            "captions": [[f"c{n}", f"d{n}"] for n in range(5)] + [[], ["", "late"]],
            "tags": [["tag"]] * 7,
            "split": ["train", "val"] * 3 + ["train"],
        },
    )
    items = read(path)
    assert answers(items) == ["c0", "c1", "c2", "c3", "c4", "late"]
    assert rejected(items) == [("empty_answer", f"{path}[row 5]")]
    assert [level(item.images[0]) for item in samples(items)] == [0, 1, 2, 3, 4, 6]
    assert items[4].where == f"{path}[row 4]" and isinstance(items[4].images[0], LazyImage)
    assert answers(read(path, split="val")) == ["c1", "c3"]
    both = samples(read(path, split="val", caption="all"))
    assert answers(both) == ["c1", "d1", "c3", "d3"] and len({item.where for item in both}) == 4
    with pytest.raises(UsageError, match="there is train, val"):
        read(path, split="dev")


def test_parquet_question_tab_answer_and_question_answer_columns(tmp_path):
    path = write_parquet(
        tmp_path / "vqa.parquet",
        {
            "image": [picture(0), picture(1)],
            "captions": [[], []],
            "tags": [["what?\tbook, pen", "how many?\t2"], ["where?\t "]],
        },
    )
    items = read(path)
    assert [turns(item) for item in samples(items)] == [
        [("user", [0, "what?"]), ("assistant", ["book, pen"])],
        [("user", [0, "how many?"]), ("assistant", ["2"])],
    ]
    assert rejected(items) == [("empty_answer", f"{path}[row 1]")]
    path = write_parquet(tmp_path / "qa.parquet", {"image": [picture(5)], "question": ["how many?"], "answer": [3]})
    assert turns(read(path)[0]) == [("user", [5, "how many?"]), ("assistant", ["3"])]
    # A tab inside a caption is only a tab.
    path = write_parquet(tmp_path / "tab.parquet", {"image": [picture(5)], "captions": [["a\tb"]]})
    assert answers(read(path)) == ["a\tb"]


def test_parquet_hub_conventions(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"names": ["tench", "gold fish"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    (tmp_path / "side.png").write_bytes(picture(9))
    cells = [{"bytes": picture(n), "path": f"{n}.png"} for n in range(4)] + [{"bytes": None, "path": "side.png"}, None]
    table = pa.table({"image": cells, "label": [1, 0, -1, 7, 1, 1]}).replace_schema_metadata(metadata)
    path = write_parquet(tmp_path / "train-00000-of-00001.parquet", table)
    items = read(path)
    assert answers(items) == ["gold fish", "tench", "gold fish"]
    assert [level(item.images[0]) for item in samples(items)] == [0, 1, 9]
    assert [word for word, _ in rejected(items)] == ["empty_answer", "bad_label", "missing_image"]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", table.slice(0, 1))
    assert len(read(tmp_path, split="test")) == 1 and len(read(tmp_path, split="train")) == 6
    assert len(read(f"{tmp_path}/t*.parquet")) == 7
    with pytest.raises(UsageError, match="no split 'val'"):
        read(tmp_path, split="val")
    bare = write_parquet(tmp_path / "bare.parquet", {"image": [picture(0)], "label": [1]})
    with pytest.raises(UsageError, match="class numbers without names"):
        read(bare)


def test_parquet_messages_with_image_lists(tmp_path):
    messages = [{"role": "user", "content": "<image>or<image>?"}, {"role": "assistant", "content": "both"}]
    text_only = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    parts = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]}]
    parts.append({"role": "assistant", "content": [{"type": "text", "text": "red"}]})
    struct = [{"bytes": picture(n), "path": None} for n in (3, 4)]
    path = write_parquet(
        tmp_path / "m.parquet", {"images": [struct, [], None], "messages": [messages, text_only, text_only]}
    )
    assert [turns(item)[0][1] for item in read(path)] == [[3, "or", 4, "?"], ["hi"], ["hi"]]
    path = write_parquet(tmp_path / "raw.parquet", {"images": [[picture(8)]], "messages": [parts]})
    assert turns(read(path)[0]) == [("user", [8, "?"]), ("assistant", ["red"])]
    path = write_parquet(tmp_path / "other.parquet", {"chat": [messages], "pics": [struct]})
    assert turns(read(path, text_column="chat")[0])[0][1] == [3, "or", 4, "?"], "the struct tells the image column"
    path = write_parquet(tmp_path / "text.parquet", {"messages": [text_only]})
    assert len(samples(read(path))) == 1


def test_parquet_null_images_without_statistics(tmp_path):
    for number, options in enumerate(({}, {"write_statistics": False})):
        rows = {"image": [picture(0), None, picture(2)], "caption": ["a", "b", "c"]}
        path = write_parquet(tmp_path / f"{number}.parquet", rows, **options)
        items = read(path)
        assert answers(items) == ["a", "c"] and rejected(items) == [("missing_image", f"{path}[row 1]")]


def test_parquet_errors_name_the_columns(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"image_data": [picture(0)], "name": ["pear"]})
    with pytest.raises(UsageError, match=r"no text column.*its columns are name"):
        read(path)
    with pytest.raises(UsageError, match="'photo'; its columns are image_data, name"):
        read(path, image_column="photo")
    assert answers(read(path, text_column="name")) == ["pear"]
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"broken\.parquet is not a readable parquet file"):
        read(broken)
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "gone.parquet")
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "gone-*.parquet")


@pytest.mark.parametrize(("column", "name"), [(0, "image"), (1, "caption")])
def test_parquet_damaged_behind_its_footer(tmp_path, column, name):
    path = write_parquet(tmp_path / "p.parquet", {"image": [picture(0)] * 3, "caption": ["a pear", "a plum", "a fig"]})
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(column)
    assert chunk.path_in_schema == name
    content = bytearray(path.read_bytes())
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    if name == "caption":
        with pytest.raises(UserError, match=r"p\.parquet is damaged in row group 0"):
            read(path)
        return
    found = samples(read(path))
    assert len(found) == 3
    with pytest.raises(ImageError, match=r"p\.parquet is damaged in row group 0") as caught:
        open_image(found[0].images[0])
    assert caught.value.reason == "unreadable_file"


def test_parquet_listing_reads_no_image(tmp_path, monkeypatch):
    cells = [{"bytes": picture(n), "path": f"{n}.png"} for n in range(6)]
    rows = {"image": [cell["bytes"] for cell in cells], "struct": cells, "listed": [[cell] * 2 for cell in cells]}
    path = write_parquet(tmp_path / "p.parquet", rows | {"caption": ["x"] * 6})
    read_row_group, columns = pq.ParquetFile.read_row_group, []

    def recorded(self, *args, **options):
        columns.extend(options["columns"])
        return read_row_group(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", recorded)
    items = [read(path, image_column=name) for name in ("image", "struct", "listed")]
    assert set(columns) == {"caption", "struct.path", "listed.list.element.path"}
    assert [[len(item.images) for item in part] for part in items] == [[1] * 6, [1] * 6, [2] * 6]
    assert items[2][4].images[1].read() == cells[4]["bytes"]
    assert set(columns) > {"listed"}


def test_row_groups_kept_are_bounded(tmp_path, monkeypatch):
    noise = [np.random.default_rng(n).bytes(50_000) for n in range(12)]
    path = write_parquet(tmp_path / "p.parquet", {"image": noise, "caption": ["x"] * 12}, row_group_size=2)
    monkeypatch.setattr(tables, "CACHE_BYTES", 250_000)
    monkeypatch.setattr(tables, "_row_groups", tables.RowGroups())
    images = [item.images[0] for item in read(path)]
    for number in (0, 11, 3, 0, 7, 2, 11, 5):
        assert images[number].read() == noise[number]
        assert sum(values.nbytes for values in tables._row_groups._columns.values()) <= 250_000


def _levels(images):
    return [level(image) for image in images]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_lazy_images_in_other_processes(tmp_path, method):
    path = write_parquet(tmp_path / "p.parquet", {"image": [picture(n) for n in range(9)], "caption": ["x"] * 9})
    images = [item.images[0] for item in read(path)]
    assert len(pickle.dumps(images[0])) < 1000
    assert _levels(images) == list(range(9))
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.map(_levels, [images[:4], images[4:]]) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_a_file_written_anew_is_read_anew(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", {"image": [picture(1)], "caption": ["x"]})
    image = read(path)[0].images[0]
    assert level(image) == 1
    write_parquet(path, {"image": [picture(2), picture(3)], "caption": ["x", "y"]})
    assert level(image) == 2
    path.unlink()
    with pytest.raises(ImageError) as caught:
        image.read()
    assert caught.value.reason == "missing_file"


# webdataset


def write_tar(path, members: dict, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("suffix, mode", [(".tar", "w"), (".tar.gz", "w:gz")])
def test_webdataset(tmp_path, suffix, mode):
    for shard in range(2):
        members = {}
        for n in range(3):
            key = f"dir.v1/{shard}{n}"
            members |= {f"{key}.png": picture(10 * shard + n), f"{key}.txt": f"text {shard}{n}".encode()}
        write_tar(tmp_path / f"shard-{shard:03}{suffix}", members, mode)
    items = read(f"{tmp_path}/shard-{{000..001}}{suffix}")
    assert answers(items) == [f"text {s}{n}" for s in range(2) for n in range(3)]
    assert [level(item.images[0]) for item in items] == [0, 1, 2, 10, 11, 12]
    assert items[4].where == f"{tmp_path}/shard-001{suffix}[dir.v1/11]"
    assert [item.where for item in read(f"{tmp_path}/*{suffix}")] == [item.where for item in read(tmp_path)]
    assert pickle.loads(pickle.dumps(items[5])).where == items[5].where
    with pytest.raises(UsageError, match="shard-002"):
        read(f"{tmp_path}/shard-{{000..002}}{suffix}")


def test_webdataset_members_and_what_is_rejected(tmp_path):
    record = chat("<image>which?", "left")
    path = write_tar(
        tmp_path / "a.tar",
        {
            "0.jpg": picture(0, "JPEG"), "0.json": json.dumps({"caption": "from json", "url": "x"}).encode(),
            "1.png": picture(1), "1.cls": b"pear", "2.png": picture(2), "2.cls": b"7",
            "3.png": picture(3), "3.json": b"{broken", "4.txt": b"no image", "5.png": picture(5),
            "6.png": picture(6), "6.txt": b"\xff", "7.png": picture(7), "7.json": json.dumps(record).encode(),
            "8.left.png": picture(8), "8.right.png": picture(9), "8.txt": b"two",
            "9.webp": picture(4, "WEBP"), "9.txt": b" ",
        },
    )  # fmt: skip
    items = read(path, question="?")
    assert [turns(item) for item in samples(items)] == [
        [("user", [level(picture(0, "JPEG")), "?"]), ("assistant", ["from json"])],
        [("user", [1, "?"]), ("assistant", ["pear"])],
        [("user", [7, "which?"]), ("assistant", ["left"])],
        [("user", [8, 9, "?"]), ("assistant", ["two"])],
    ]
    keys = {
        "2": "bad_label",
        "3": "bad_json",
        "4": "missing_image",
        "5": "no_text",
        "6": "bad_text",
        "9": "empty_answer",
    }
    assert rejected(items) == [(word, f"{path}[{key}]") for key, word in keys.items()]


def test_webdataset_goes_on_after_damage(tmp_path):
    members = {}
    for n in range(6):
        members |= {f"{n}.png": picture(n), f"{n}.txt": b"text %d" % n}
    path = write_tar(tmp_path / "a.tar", members)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        header = tar.getmember("2.png").offset
        cut = tar.getmember("5.png").offset_data + 20
    data[header + 10 : header + 200] = b"\x55" * 190
    path.write_bytes(data)
    items = read(path)
    assert answers(items) == ["text 0", "text 1", "text 3", "text 4", "text 5"]
    words = rejected(items)
    assert ("missing_image", f"{path}[2]") in words and [word for word, _ in words].count("broken_tar") == 1
    write_tar(tmp_path / "b.tar", {"x.png": picture(1), "x.txt": b"next shard"})
    path.write_bytes(data[:cut])
    items = read(tmp_path)
    assert answers(items) == ["text 0", "text 1", "text 3", "text 4", "next shard"]
    assert [word for word, _ in rejected(items)].count("broken_tar") == 2
    (tmp_path / "c.tar").write_bytes(b"this is no tar" * 100)
    assert ("broken_tar", f"{tmp_path / 'c.tar'}[after ]") in rejected(read(tmp_path))
    packed = write_tar(tmp_path / "d.tar.gz", members, "w:gz")
    packed.write_bytes(packed.read_bytes()[:200])
    assert "broken_tar" in [word for word, _ in rejected(read(packed))]


# datasets


def test_datasets_saved_to_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["kiwi", "lime"])})
    cells = [{"bytes": picture(n), "path": None} for n in range(3)]
    part = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 1]}, features=features)
    datasets.DatasetDict({"train": part, "test": part.select([2])}).save_to_disk(str(tmp_path / "saved"))
    path = tmp_path / "saved"
    assert detect_format(str(path)) == "datasets"
    items = read(path, split="train")
    assert answers(items) == ["kiwi", "lime", "lime"] and [level(item.images[0]) for item in items] == [0, 1, 2]
    assert items[1].where == f"{path}:train[row 1]"
    assert len(read(path)) == 4
    assert level(pickle.loads(pickle.dumps(items[2])).images[0]) == 2
    with pytest.raises(UsageError, match="its splits are train, test"):
        read(path, split="validation")
    with pytest.raises(UsageError, match="no text column 'caption'"):
        read(path, text_column="caption")
    lists = datasets.Features({"images": datasets.List(datasets.Image()), "text": datasets.Value("string")})
    rows = {"images": [cells[:2], []], "text": ["two", "none"]}
    datasets.Dataset.from_dict(rows, features=lists).save_to_disk(str(tmp_path / "lists"))
    items = read(tmp_path / "lists")
    assert [level(image) for image in items[0].images] == [0, 1]
    assert [word for word, _ in rejected(items)] == ["missing_image"]


def test_datasets_local_builder_and_unknown_name(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_images(tmp_path / "set", ["train/lemon/a.png", "train/plum/b.png"])
    items = read(tmp_path / "set", format="datasets", split="train")
    assert answers(items) == ["lemon", "plum"] and [level(item.images[0]) for item in items] == [0, 1]
    with pytest.raises(UsageError, match="datasets cannot load"):
        read("nobody/nothing-here", format="datasets")


# settings that every format shares


def captions_file(tmp_path, count=40):
    write_images(tmp_path, ["a.png"])
    return write_lines(tmp_path / "c.jsonl", [{"image": "a.png", "caption": f"c{n}"} for n in range(count)])


def test_questions_are_drawn_by_seed_and_place(tmp_path):
    path = captions_file(tmp_path)
    questions = ["A?", "B?", "C?"]

    def drawn(**settings):
        return [text_of(item.messages[0]) for item in read(path, question=questions, **settings)]

    assert drawn() == drawn() and set(drawn()) == set(questions)
    assert drawn(seed=1) != drawn()
    assert drawn(limit=7) == drawn()[:7], "does not depend on what else is read"
    script = (
        "from mmgpt.config import SourceConfig; from mmgpt.data.sources import read_source; "
        f"source = SourceConfig(path={str(path)!r}, question={questions}); "
        "print([sample.messages[0]['content'][-1]['text'] for sample in read_source(source)])"
    )
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert again.strip() == str(drawn()), "not the same in another process"


def test_limit_and_repeat(tmp_path):
    path = captions_file(tmp_path, 3)
    path.write_text("{broken\n" + path.read_text())
    assert answers(read(path, limit=2)) == ["c0", "c1"] and read(path, limit=0)[0].reason == "bad_json"
    twice = read(path, repeat=2)
    assert answers(twice) == ["c0", "c1", "c2"] * 2 and len(rejected(twice)) == 1
    assert answers(read(path, repeat=2, limit=1)) == ["c0", "c0"]
    assert read(path, repeat=0) == []
    questions = [
        text_of(item.messages[0]) for item in samples(read(captions_file(tmp_path), repeat=2, question=["A", "B"]))
    ]
    assert questions[:40] != questions[40:]


def test_wrong_settings_are_usage_errors(tmp_path):
    path = captions_file(tmp_path)
    for settings in ({"repeat": -1}, {"limit": -1}, {"answer": "yes"}, {"question": []}):
        with pytest.raises(UsageError, match=str(path)):
            read(path, **settings)
    with pytest.raises(UsageError, match="cannot tell the format"):
        (tmp_path / "data.xyz").touch()
        read(tmp_path / "data.xyz")
    with pytest.raises(UsageError, match="is one picture: name the folder"):
        (tmp_path / "photo.JPG").touch()
        read(tmp_path / "photo.JPG")
    with pytest.raises(UsageError, match="no such file"):
        read_source(SourceConfig(path=str(tmp_path / "gone"), format="folder"))
    with pytest.raises(UsageError, match="no column split"):
        read(path, split="train")


def test_a_named_data_set_becomes_its_parquet_file(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "p.parquet", {"image": [picture(4)], "captions": [["pear"]]})
    asked = []

    class Artifacts:
        @staticmethod
        def resolve(name, *, kind):
            asked.append((name, kind))
            if name != "pears":
                raise UsageError(f"unknown name {name}")
            return path

    import mmgpt

    monkeypatch.setitem(sys.modules, "mmgpt.artifacts", Artifacts)
    monkeypatch.setattr(mmgpt, "artifacts", Artifacts, raising=False)
    assert answers(read("pears")) == ["pear"] and asked == [("pears", "dataset")]
    with pytest.raises(UsageError, match="unknown name plums"):
        read("plums")
    asked.clear()
    with pytest.raises(UsageError, match=r"no such file or folder here"):
        read("no-folder/of-this-name")
    read(path)
    assert asked == []


# the report


def test_report_counts_writes_and_stops(tmp_path):
    path = tmp_path / "run" / "bad_samples.jsonl"
    report = RejectionReport(path)
    assert report.summary() == "no bad samples" and not path.exists()
    report.check(0, 0.0)
    for number in range(4):
        report.add(Rejected("missing_file" if number else "bad_json", f"ä.jsonl:{number}", "detail\nof two lines"))
    report.add(Rejected("bad_json", "ä.jsonl:0", "the same again"))
    assert report.counts == {"missing_file": 3, "bad_json": 1} and len(report) == 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (
        lines[0] == {"reason": "bad_json", "where": "ä.jsonl:0", "detail": "detail\nof two lines"} and len(lines) == 4
    )
    report.check(400, 0.01)
    with pytest.raises(UserError) as caught:
        report.check(399, 0.01)
    message = str(caught.value)
    for part in ("4 of 399", "3 missing_file, 1 bad_json", "ä.jsonl:2", str(path), "data.max_bad"):
        assert part in message
    assert "ä.jsonl:3" not in message
    assert "4 bad samples" in report.summary() and "3 missing_file" in report.summary()


def test_report_of_a_resumed_run_and_of_two_processes(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    first = RejectionReport(path)
    first.add(Rejected("bad_json", "a:1", "x"))
    resumed = RejectionReport(path)
    assert len(resumed) == 0
    resumed.add(Rejected("bad_json", "a:1", "x"))
    resumed.add(Rejected("bad_json", "a:2", "x"))
    assert resumed.counts == {"bad_json": 2} and len(path.read_text().splitlines()) == 2
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_add_many, args=(path, name)) for name in "bc"]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(30)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({(line["reason"], line["where"]) for line in lines}) == len(lines) == 402


def _add_many(path, name):
    report = RejectionReport(path)
    for number in range(200):
        report.add(Rejected("bad_json", f"{name}:{number}", "x" * 500))


def test_report_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        RejectionReport(tmp_path / "file" / "bad_samples.jsonl").add(Rejected("a", "b", "c"))
