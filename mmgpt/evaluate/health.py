"""What became of a policy: curves of everything that shows when PPO goes astray, and answers before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmgpt.data.messages import Message, images_of, text_of
from mmgpt.evaluate.report import one_line, replacing
from mmgpt.loop.metrics import read_metrics

PANELS: list[tuple[str, list[str]]] = [
    ("score of the answers", ["train/score", "val/score"]),
    ("KL to the reference, nats an answer", ["train/kl", "val/kl"]),
    ("entropy, nats a token", ["train/entropy"]),
    ("share of tokens at the clip", ["train/clip_fraction", "train/value_clip_fraction"]),
    ("|ratio - 1| before the first step", ["train/ratio_deviation"]),
    ("variance of the returns explained", ["train/value_explained"]),
    ("answers that end by themselves", ["train/ended", "val/ended"]),
    ("tokens an answer", ["train/length", "val/length"]),
    ("share of distinct answers", ["train/distinct"]),
    ("loss on pretraining text", ["train/ptx_loss"]),
    ("tokens/s by phase", ["train/draw_tokens_per_s", "train/judge_tokens_per_s", "train/learn_tokens_per_s"]),
]


def plot_health(folder: Path) -> None:
    """health.png: a panel for each thing to watch, over the iterations, and the held-out reward against the KL it cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = read_metrics(folder / "metrics.csv")
    shown = [(title, [name for name in names if name in series]) for title, names in PANELS]
    shown = [(title, names) for title, names in shown if names]
    rows = -(-(len(shown) + 1) // 3)
    figure, grid = pyplot.subplots(rows, 3, figsize=(12, 2.6 * rows), layout="constrained", squeeze=False)
    for axes, (title, names) in zip(grid.flat, shown):
        for name in names:
            steps, values = zip(*series[name])
            held = name.startswith("val/")
            label = "held out" if held else name.removeprefix("train/").replace("_tokens_per_s", "").replace("_", " ")
            axes.plot([step + 1 for step in steps], values, "o-" if held else "-", markersize=3, linewidth=1, label=label)
        axes.set_title(title, fontsize=9)
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=7)
        if title.startswith("tokens/s"):
            axes.set_yscale("log")
    last = grid.flat[len(shown)]
    kind = "val" if "val/score" in series else "train"
    if f"{kind}/score" in series:
        score = dict(series[f"{kind}/score"])
        points = [(kl, score[step], step + 1) for step, kl in series.get(f"{kind}/kl", []) if step in score]
        if "start/score" in series:
            points = [(series["start/kl"][0][1], series["start/score"][0][1], 0), *points]
        divergences, scores, steps = zip(*points)
        last.plot(divergences, scores, "-", color="gray", linewidth=0.5)
        dots = last.scatter(divergences, scores, c=steps, s=14, zorder=3)
        figure.colorbar(dots, ax=last, label="iteration")
    last.set_title(f"{'held-out ' if kind == 'val' else ''}score against KL", fontsize=9)
    for axes in grid.flat[len(shown) + 1 :]:
        axes.set_visible(False)
    for axes in grid.flat:
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(folder.name, fontsize=10)
    with replacing(folder / "health.png") as fresh:
        figure.savefig(fresh, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True)
class Answers:
    """Answers to held-out prompts.

    Args:
        prompts: The conversations.
        texts: One answer to each.
        scores: What the reward says of it; NaN where it cannot judge.
        ended: Whether the answer ended by itself.
        lengths: Tokens.
        kl: Mean KL to the reference, nats an answer.
    """

    prompts: Sequence[Sequence[Message]]
    texts: Sequence[str]
    scores: Sequence[float]
    ended: Sequence[bool]
    lengths: Sequence[int]
    kl: float

    @property
    def mean(self) -> float:
        """Mean score of what could be judged."""
        known = [score for score in self.scores if math.isfinite(score)]
        return sum(known) / len(known) if known else math.nan


def write_answers(folder: Path, before: Answers, after: Answers, seconds: float, stopped: str, examples: int = 12) -> None:
    """samples.md: the held-out reward before and after, and answers side by side."""
    lines = [f"# {folder.name}", "", f"Training took {seconds:.0f} s.", ""]
    if stopped:
        lines += [f"It was stopped by rule: {stopped}.", ""]
    columns = ("held out", "reward", "KL, nats an answer", "end by themselves", "tokens an answer", "distinct")
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, part in (("before", before), ("after", after)):
        count = max(1, len(part.texts))
        lines.append(
            f"| {name} | {part.mean:.3f} | {part.kl:.2f} | {sum(part.ended) / count:.0%} | {sum(part.lengths) / count:.1f} "
            f"| {len(set(part.texts)) / count:.0%} |"
        )
    lines += ["", "![health](health.png)", ""]
    for place in range(0, len(before.texts), max(1, len(before.texts) // examples)):
        lines += [f"**{_shown(before.prompts[place])}**", ""]
        for name, part in (("before", before), ("after", after)):
            lines += [f"> {name} ({part.scores[place]:.2f}): {one_line(part.texts[place]) or '(nothing)'}", ">"]
        lines[-1] = ""
    with replacing(folder / "samples.md") as fresh:
        fresh.write_text("\n".join(lines), encoding="utf-8")


def _shown(prompt: Sequence[Message]) -> str:
    pictures: list[Any] = images_of(prompt)
    return ("[picture] " if pictures else "") + one_line(text_of(prompt[-1]))
