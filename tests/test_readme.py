"""README and docs are true: their code runs, their commands parse, their links and paths exist.

Commands that would download or train for minutes are checked without being run. A block marked `<!-- run -->` is run as it
stands; one marked `<!-- file: NAME -->` is written to that file, and a source in YAML is read with the reader it names.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from nano_runs import TINY
from PIL import Image

from mmgpt.config import RunConfig, SourceConfig
from mmgpt.data.images import open_image
from mmgpt.data.messages import Sample
from mmgpt.data.sources import read_source
from mmgpt.train import find_config, known_keys, main, parse

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PICTURES = [
    "photo.jpg", "other.jpg", "a.png", "b.png", "pictures/door.jpg", "pictures/gate.jpg", "photos/a.jpg", "photos/b.jpg",
    "captions/a.jpg", "captions/b.jpg", "beside/a.jpg", "classes/red_door/a.jpg", "classes/garden-gate/b.jpg",
]  # fmt: skip
FEW_STEPS = [
    "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.threads=1", "--evaluate.final=4", "--evaluate.generate=1",
    "--data.train=[{path: shapes, split: train, limit: 64}]", "--data.validation=[{path: shapes, split: val, limit: 4}]",
]  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what a comment right before it says."""

    page: Path
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text.strip().splitlines()[0][:40]}"


def blocks(page: Path) -> list[Block]:
    pattern = r"(?:<!-- ([^>]*?) -->\n)?^```(\w*)\n(.*?)^```$"
    found = re.finditer(pattern, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(page, match[2], match[3], match[1] or "") for match in found]


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, cut at `&&`, pipes and redirections."""
    result: list[list[str]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if set(word) <= set("&|<>;()"):
                if words:
                    result.append(words)
                words = []
            else:
                words.append(word)
    return result


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
COMMANDS = {" ".join(words): words for block in SHELL for words in commands(block)}
# A command in running text or in a table, to be found in `backticks`.
for _page in PAGES:
    for _inline in re.findall(r"`(python (?:-m mmgpt|demo/|benchmarks/)[^`]*)`", _page.read_text(encoding="utf-8")):
        COMMANDS.setdefault(_inline, shlex.split(_inline))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the documented commands run: pictures, and `runs/quickstart` trained for two steps on drawn shapes."""
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MMGPT_CACHE", str(folder / "cache"))
        patch.setenv("MMGPT_NO_PIP", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        for number, name in enumerate(PICTURES):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 32), (200, 20 * number, 90)).save(name)
        assert main(["--config", "nano/shapes", "--run_dir", "runs/quickstart", *FEW_STEPS]) == 0
        yield folder


# Code


@pytest.mark.parametrize("name", ["README.md", "docs/answering.md", "docs/safety.md"])
def test_python_blocks_run_in_their_order(name: str, workplace: Path) -> None:
    page = REPOSITORY / name
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks(page):
            if block.language == "python":
                exec(compile(block.text, str(page), "exec"), names)


def test_every_documented_source_gives_samples(workplace: Path) -> None:
    """Files are written and sources read in the order of the page, Python blocks between them included."""
    page = REPOSITORY / "docs" / "data.md"
    names: dict[str, Any] = {}
    read = 0
    for block in blocks(page):
        if block.mark.startswith("file: "):
            file = Path(block.mark.removeprefix("file: "))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)
        elif block.language == "yaml":
            for settings in yaml.safe_load(block.text):
                found = list(read_source(SourceConfig(**settings)))
                assert found and all(isinstance(item, Sample) for item in found), (settings, found)
                for item in found:
                    for image in item.images:
                        open_image(image)
                read += 1
    assert read >= len({"messages", "llava", "folder", "parquet", "webdataset", "datasets"})


def test_own_pictures_as_readme_says(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The block that makes `photos/` is run, then one batch of it is built with a tiny model in place of the real one."""
    block = next(block for block in SHELL if block.page.name == "README.md" and "photos/metadata.csv" in block.text)
    shell = [line for line in block.text.splitlines() if not line.startswith("python")]
    subprocess.run(["bash", "-euc", "\n".join(shell)], check=True)
    arguments = next(words for words in commands(block) if "--show_batch" in words)
    tiny = [f"--{key}={value}" for key, value in TINY.items() if key.startswith(("model", "trainer"))]
    assert main([*arguments[3:], *tiny, "--model.projector.factor", "1"]) == 0
    # One of the two pictures is set aside for validation.
    assert re.search(r"A red door\.|A gate, half open\.", capsys.readouterr().out.replace("\n", " "))


@pytest.mark.parametrize("layout", ["photos/metadata.csv", "classes"])
def test_layouts_of_own_pictures_may_be_named_by_a_relative_path(layout: str, workplace: Path) -> None:
    """As `configs/images.yaml` does: both ways that README names to say what a picture shows."""
    if layout.endswith(".csv"):
        Path(layout).write_text("file_name,caption\na.jpg,A red door.\nb.jpg,A gate.\n", encoding="utf-8")
    found = list(read_source(SourceConfig(path=layout.split("/")[0])))
    assert len(found) == 2 and all(isinstance(item, Sample) for item in found), found


# Commands


def test_commands_marked_to_be_run(workplace: Path) -> None:
    marked = [words for block in SHELL if block.mark == "run" for words in commands(block)]
    assert len(marked) >= 3
    for words in marked:
        script = [str(REPOSITORY / word) if word.startswith("demo/") else word for word in words[1:]]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, *script], capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout.strip(), words


def test_asking_with_json_answers_as_documented(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """README's command, and the keys that docs/answering.md names."""
    from demo.ask import main as ask

    words = next(words for words in COMMANDS.values() if "demo/ask.py" in words and {"photo.jpg", "--json"} <= set(words))
    assert ask(words[2:]) == 0
    result = json.loads(capsys.readouterr().out)
    page = (REPOSITORY / "docs" / "answering.md").read_text(encoding="utf-8")
    described = page[page.index("`--json` prints") : page.index("or `error`")]
    assert set(re.findall(r"`(\w+)`", described)) == set(result)
    assert result["model"].endswith("quickstart/model")


@pytest.mark.parametrize("name", [name for name, words in COMMANDS.items() if words[:3] == ["python", "-m", "mmgpt.train"]])
def test_training_commands_parse(name: str, workplace: Path) -> None:
    words = [word for word in COMMANDS[name][3:] if word not in ("--print_config", "--help")]
    words = [word if word != "NAME" else "quickstart" for word in words]
    assert isinstance(parse(words), RunConfig)


@pytest.mark.parametrize("name", [name for name, words in COMMANDS.items() if words[:2] == ["python", "demo/ask.py"]])
def test_asking_commands_parse(name: str, workplace: Path) -> None:
    from demo.ask import parse_arguments

    words = [word for word in COMMANDS[name][2:] if word not in ("--help",)]
    images = parse_arguments(words).image
    assert [image for image in images if image != "-" and not Path(image).is_file()] == []


def test_other_commands_are_known() -> None:
    """Benchmarks and their options exist, extras that pip is to install too, modules that are run as well."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for words in COMMANDS.values():
        if words[0] == "python" and words[1].startswith("benchmarks/"):
            source = (REPOSITORY / words[1]).read_text(encoding="utf-8")
            options = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
            assert all(f'add_argument("{option}"' in source for option in options), words
        elif words[0] == "python" and words[1] == "-m":
            module = REPOSITORY / words[2].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), words
        elif words[0] == "pip":
            assert set(re.findall(r"\[(\w+)\]", " ".join(words))) <= set(extras), words


# Words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:mmgpt|safety|demo|configs|tests|benchmarks|docs)/[\w./-]*)(?:::(\w+))?`", text))
    assert named
    for path, test in named:
        file = REPOSITORY / path
        assert file.exists(), path
        if test:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{test}"


def test_folder_tree_is_true() -> None:
    """Every path of the tree exists, and every module and folder of the packages stands in it."""
    readme = blocks(REPOSITORY / "README.md")
    tree = next(block.text for block in readme if block.text.startswith("mmgpt/"))
    named: set[str] = set()
    parents: list[str] = []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        parents = [*parents[:depth], name]
        named.add("".join(parents))
    missing = [path for path in named if not (REPOSITORY / path).exists()]
    assert not missing
    modules = {
        str(path.relative_to(REPOSITORY))
        for package in ("mmgpt", "safety", "demo", "benchmarks")
        for path in (REPOSITORY / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    configs = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert sorted((modules | configs) - named) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_keys_that_are_named_exist(page: Path) -> None:
    keys = {*known_keys(RunConfig), *(f"data.{key}" for key in ("train", "validation"))}
    sections = {key.split(".")[0] for key in keys if "." in key}
    for named in re.findall(rf"`((?:{'|'.join(sorted(sections))})\.[\w.]+)[ `]", page.read_text(encoding="utf-8")):
        assert named in keys or named.endswith((".py", ".safetensors", ".ask", ".load", ".generate", ".stream")), named


def test_configurations_of_readme_are_all_there_are() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for path in {*(REPOSITORY / "configs").rglob("*.yaml")} - {REPOSITORY / "configs" / "safety.yaml"}:
        name = str(path.relative_to(REPOSITORY / "configs").with_suffix(""))
        assert f"`{name}`" in text, name
        assert find_config(name) == path
        assert isinstance(parse(["--config", name]), RunConfig)
