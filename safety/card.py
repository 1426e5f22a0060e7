"""The model card, safety/weights/README.md: what the weights were trained on and what they do, from measurements alone.

`python -m safety.card` measures the shipped weights again and rewrites it. What stands below the line `<!-- red team -->` in
an existing card is kept: `safety.redteam` appends there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmgpt.errors import UserError
from safety.evaluate import WEIGHTS, load_calibration, measured, read, scorer, table

if TYPE_CHECKING:
    from safety.sources import Row

NAME = "README.md"
MARK = "<!-- red team -->"
SAMPLES = 300  # of the bootstrap
MISSES = 12  # that are shown


def render(folder: Path = WEIGHTS) -> str:
    """The card of a folder of weights, measured on the test sets that its training data was cleaned of; Markdown."""
    calibration = load_calibration(folder)
    points = {name: point["threshold"] for name, point in calibration["thresholds"].items()}
    try:
        names = calibration["data"]["tests"]
    except KeyError:
        raise UserError(f"{folder} was trained by an earlier version, which did not note its tests: train it again") from None
    rows = {name: read(name) for name in names}
    label = {name: np.array([row.label for row in part]) for name, part in rows.items()}
    titles = {"filter": "The whole filter", "transformer": "Stage 2 alone", "linear": "Stage 1 alone"}
    scorers = {stage: scorer(stage, folder) for stage in titles}  # first: they say what is wrong with weights of another version
    parts = [_head(calibration), _data(calibration["data"]), _points(calibration)]
    for stage, score in scorers.items():
        given = {name: score([row.text for row in part]) for name, part in rows.items()}
        results = [measured(name, label[name], given[name], points, SAMPLES) for name in names]
        joint = [name for name in names if len(set(label[name])) == 1]
        if len({int(label[name][0]) for name in joint}) == 2:
            labels, scores = (np.concatenate([side[name] for name in joint]) for side in (label, given))
            results.append(measured(" + ".join(joint), labels, scores, points, SAMPLES))
        parts.append(f"### {titles[stage]}\n\n{table(results, points)}")
        if stage == "filter":
            parts.append(_groups(rows, given, points["balanced"]) + "\n\n" + _misses(rows, given, points["balanced"]))
    old = folder / NAME
    kept = old.read_text(encoding="utf-8").partition(MARK)[2] if old.exists() else ""
    return "\n\n".join(parts) + f"\n\n{MARK}{kept or chr(10)}"


def _head(calibration: dict[str, Any]) -> str:
    parity = calibration["parity"]
    return f"""# The weights of the filter

Two stages that judge whether a prompt is sensitive and should not be answered, with sixteen categories: a linear model on
hashed n-grams, and all-MiniLM-L6-v2 (Apache-2.0) fine-tuned, with a pruned vocabulary, in int8. Written by
`python -m safety.train`; every figure here was measured by it or by `python -m safety.card`.

For: English chat prompts to an assistant, before it answers, and its answers while they stream. Not for: other languages
(less in them was trained on, and more is missed), legal or medical decisions about people, or as the only protection where a
miss is dangerous.

{_runs(calibration)}

int8 against fp32 on {parity["texts"]} texts of the development split: mean |dp|
{parity["mean_dp"]:.4f}, AUROC {parity["auroc_int8"]:.4f} against {parity["auroc_fp32"]:.4f}."""


def _runs(calibration: dict[str, Any]) -> str:
    alone, start = calibration["runs"], calibration.get("start")
    text = f"Stage 2 is the mean of the weights of {len(alone)} runs" if len(alone) > 1 else "Stage 2 is one run"
    if start:
        text += f" that went on from the weights {start['weights']}"
        if start["keep"]:
            text += f", mixed with these, which count {start['keep']:.0%}"
    each = ", ".join(f"{one:.4f}" for one in alone)
    return f"{text}. AUROC on whole development prompts of each run by itself: {each}."


def _data(counts: dict[str, Any]) -> str:
    from mmgpt.parts import PARTS

    named = [name.partition(":")[0] for name in counts["collections"]]
    known = {name: PARTS[name].licence if name in PARTS else "licence not known here" for name in named}
    licences = ", ".join(f"{name} ({licence})" for name, licence in known.items()) or "none"
    lines = ["## Data", "", f"Collections, as `python -m mmgpt.artifacts` names them, with their licences: {licences}."]
    lines += [
        "The sources `requests`, `everyday`, `pairs` and `documents` are the files of `safety/data/`, written for this project,",
        "where the configuration does not name others; the labels of `hh-rlhf` are of this project too.",
        "",
    ]
    if counts["missing"]:
        lines += [f"Left out, as they could not be had: {', '.join(counts['missing'])}.", ""]
    lines += ["| source | train | development |", "|---|---|---|"]
    for source in counts["train sources"] | counts["dev sources"]:
        train, dev = (counts[f"{part} sources"].get(source, 0) for part in ("train", "dev"))
        lines.append(f"| {source} | {train} | {dev} |")
    for part in ("train", "dev"):
        lines.append(f"\n{part}: {counts[part]['sensitive']} sensitive, {counts[part]['harmless']} harmless.")
    removed = ", ".join(f"{name} {number}" for name, number in sorted(counts["overlaps"].items())) or "none"
    lines.append(f"\nDuplicates removed: {counts['duplicates']}. Removed because a test set has them, or nearly: {removed}.")
    return "\n".join(lines)


def _points(calibration: dict[str, Any]) -> str:
    sizes = calibration["development"]
    lines = [
        "## Operating points",
        "",
        "A prompt whose score reaches the threshold is blocked. Measured on the development split (both stages): "
        f"{sizes['sensitive']} sensitive prompts, {sizes['everyday']} everyday ones, {sizes['lookalikes']} harmless look-alikes.",
        "",
        "| point | threshold | recall | everyday prompts blocked | look-alikes blocked |",
        "|---|---|---|---|---|",
    ]
    for name, point in calibration["thresholds"].items():
        cells = [f"{point[key]:.4f}" for key in ("threshold", "recall", "fpr", "lookalike_fpr")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    if "documents" in calibration:
        shares = ", ".join(f"{name} {share:.2%}" for name, share in calibration["documents"].items())
        lines += ["", f"Of {sizes['documents']} pieces of documents, which the points do not count, are blocked: {shares}."]
    linear, transformer, both = calibration["linear"], calibration["transformer"], calibration["together"]
    lines += [
        "",
        f"What both stages have read is scored by z, stage 2's calibrated logit plus {both['weight']:.2f} of stage 1's: the "
        f"logit of the score is {both['slope']:.2f} z + {both['cube']:.3f} z^3 {both['bias']:+.2f}. Both are measured on what "
        "the filter reads of a text, the highest of its windows; each stage by itself on whole texts.",
        "",
        f"Expected calibration error on the half of it that was not calibrated on: both {both['dev_ece']:.4f}, stage 2 "
        f"{transformer['dev_ece']:.4f}, stage 1 {linear['dev_ece']:.4f}; AUROC there {both['dev_auroc']:.4f}, "
        f"{transformer['dev_auroc']:.4f} and {linear['dev_auroc']:.4f}. Stage 1 passes a "
        f"window by itself below {linear['clear_below']:.4f}: all windows of {linear['clear_share']:.1%} of the harmless "
        f"prompts, and {linear['clear_loss']:.2%} of the sensitive ones that both would have blocked at `balanced`.",
        "",
        "## Test sets",
        "",
        "Never trained on, and used to compare versions while this was written: they are development tests, not a final "
        "judgement. In brackets 95 % of bootstrap samples.",
    ]
    return "\n".join(lines)


def _groups(rows: dict[str, list[Row]], given: dict[str, np.ndarray], threshold: float) -> str:
    """What is blocked at `balanced` of each of the collections' own categories."""
    lines = ["Blocked at `balanced`, by the sets' own categories:", "", "| set | category | label | prompts | blocked |"]
    lines.append("|---|---|---|---|---|")
    for name, part in rows.items():
        for group, label in sorted({(row.group, row.label) for row in part if row.group}):
            chosen = np.array([row.group == group and row.label == label for row in part])
            share = (given[name][chosen] >= threshold).mean()
            kind = "sensitive" if label else "harmless"
            lines.append(f"| {name} | {group} | {kind} | {int(chosen.sum())} | {share:.1%} |")
    return "\n".join(lines)


def _misses(rows: dict[str, list[Row]], given: dict[str, np.ndarray], threshold: float) -> str:
    """The harmless prompts with the highest scores; the prompts of tests are not copied but for the harmless ones, shortened,
    that were blocked, and of these not what people said to provoke a model."""
    blocked = [
        (float(score), name, row.text)
        for name, part in rows.items()
        for row, score in zip(part, given[name])
        if not row.label and score >= threshold and row.source != "hh-rlhf"
    ]
    lines = [f"Harmless prompts that `balanced` blocks, the highest of {len(blocked)}:", ""]
    for score, name, text in sorted(blocked, reverse=True)[:MISSES]:
        short = " ".join(text.split())
        lines.append(f"- {score:.2f} ({name}): {short[:110]}{'...' if len(short) > 110 else ''}")
    return "\n".join(lines)


def main() -> int:
    (WEIGHTS / NAME).write_text(render(), encoding="utf-8")
    print(WEIGHTS / NAME)
    return 0


if __name__ == "__main__":
    from mmgpt.errors import run_cli

    sys.exit(run_cli(main))
