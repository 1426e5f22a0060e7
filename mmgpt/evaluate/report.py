"""What a run leaves for a person to look at: plots, answers beside their pictures, a coloured batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgpt.config import RunConfig
from mmgpt.data.images import open_image
from mmgpt.data.messages import Message, images_of, text_of
from mmgpt.evaluate.captioning import Answered, Score, prompt_of
from mmgpt.loop.metrics import read_metrics

if TYPE_CHECKING:
    from mmgpt.data.loader import Item
    from mmgpt.data.packing import Batch
    from mmgpt.model.multimodal import MultimodalGPT


def write_report(
    folder: Path, samples: Sequence[Answered | Item], config: RunConfig, *, score: Score | None, seconds: float
) -> list[Path]:
    """Write loss.png, accuracy.png, samples.md and examples/.

    Returns:
        The example pictures.
    """
    smoothing = config.optimizer.label_smoothing
    # Otherwise the validation loss, which is not smoothed, would seem to be the better one for no reason.
    plot_metrics(folder, note=f"training loss: of targets smoothed by {smoothing:g}" if smoothing else "")
    answered = [sample for sample in samples if isinstance(sample, Answered)]
    pictures: list[Path] = []
    lines = [f"# {folder.name}", ""]
    if score is not None:
        low, high = score.interval()
        lines += [
            f"{score.correct} of {score.total} held-out answers are exact: **{score.share:.1%}** "
            f"(95 % interval {low:.1%} to {high:.1%}).",
            "",
        ]
    lines += [f"Training took {seconds:.0f} s.", "", "![loss](loss.png) ![accuracy](accuracy.png)", ""]
    for sample in _spread(answered, config.evaluate.examples):
        prompt, _ = prompt_of(sample.messages)
        shown = _save_pictures(folder, sample.messages, len(pictures))
        pictures += shown
        lines += [f"![]({path.relative_to(folder)})" for path in shown]
        lines += ["", f"**{one_line(_question(prompt))}**", "", f"> {one_line(sample.answer) or '(no answer)'}", ""]
        lines += [f"{'Exact' if sample.exact else 'Reference'}: {one_line(sample.reference)}", ""]
    with replacing(folder / "samples.md") as fresh:
        fresh.write_text("\n".join(lines), encoding="utf-8")
    return pictures


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` when the block is left, and is removed where it fails."""
    fresh = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def one_line(text: str) -> str:
    """A line break would end the bold text or the quotation."""
    return " ".join(text.split())


def _spread(samples: Sequence[Answered], count: int) -> list[Answered]:
    """Samples from all over the list, right and wrong ones as they come."""
    count = min(count, len(samples))
    return [samples[(2 * i + 1) * len(samples) // (2 * count)] for i in range(count)]


def _question(prompt: Sequence[Message]) -> str:
    return next((text_of(message) for message in reversed(prompt) if message["role"] == "user"), "")


def _save_pictures(folder: Path, messages: Sequence[Message], before: int) -> list[Path]:
    paths: list[Path] = []
    for image in images_of(messages):
        path = folder / "examples" / f"{before + len(paths) + 1}.jpg"
        path.parent.mkdir(exist_ok=True)
        picture = open_image(image)
        picture.thumbnail((512, 512))
        with replacing(path) as fresh:
            picture.save(fresh, quality=90)
        paths.append(path)
    return paths


Plots = dict[str, tuple[str, dict[str, str]]]
"""File name: what is shown, and the metric of each curve by its name."""
TOKEN_PLOTS: Plots = {
    "loss.png": ("loss per supervised token", {"training": "train/loss", "validation": "val/loss"}),
    "accuracy.png": ("accuracy per supervised token", {"training": "train/accuracy", "validation": "val/token_accuracy"}),
}


def plot_metrics(folder: Path, plots: Plots = TOKEN_PLOTS, *, note: str = "") -> None:
    """Curves of metrics.csv: loss.png and accuracy.png, training and validation; `note` stands above loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = read_metrics(folder / "metrics.csv")
    for name, (title, curves) in plots.items():
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for label, key in curves.items():
            points = series.get(key, [])
            if not points:
                continue
            steps, values = zip(*points)
            if label == "validation":
                axes.plot(steps, values, "o-", color="tab:orange", markersize=4, label=label, zorder=3)
            elif len(steps) < 10:
                axes.plot(steps, values, ".-", color="tab:blue", label=label)
            else:
                axes.plot(steps, values, alpha=0.25, color="tab:blue")
                axes.plot(steps, _smooth(values, reach=min(10, len(values) // 20)), color="tab:blue", label="training, smoothed")
        heading = f"{folder.name}\n{note}" if note and name == "loss.png" else folder.name
        axes.set(xlabel="optimizer step", ylabel=title, title=heading)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        if name == "accuracy.png":
            axes.set_ylim(-0.02, 1.02)
        elif axes.has_data():
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if axes.has_data():
            axes.legend(frameon=False, loc="lower right" if name == "accuracy.png" else "upper right")
        with replacing(folder / name) as fresh:
            figure.savefig(fresh, dpi=120)
        pyplot.close(figure)


def _smooth(values: Sequence[float], reach: int) -> list[float]:
    """Mean over up to `reach` values on either side, as many on the one as on the other: a slope is not shifted."""
    result = []
    for i in range(len(values)):
        side = min(reach, i, len(values) - 1 - i)
        result.append(sum(values[i - side : i + side + 1]) / (2 * side + 1))
    return result


def show_batch(model: MultimodalGPT, loader: Iterable[Batch]) -> None:
    """Print the first batch: supervised tokens green, images in brackets, one sample a paragraph."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    batch = next(iter(loader))
    console.print(
        f"{batch.samples} samples in {batch.input_ids.shape[0]} rows of {batch.input_ids.shape[1]} tokens, "
        f"{batch.tokens / batch.input_ids.numel():.0%} filled, {batch.supervised / batch.tokens:.1%} supervised (green)"
    )
    tokenizer: Any = model.tokenizer
    sample = 0
    for row in range(batch.input_ids.shape[0]):
        for segment in range(1, int(batch.segment_ids[row].max()) + 1):
            places = (batch.segment_ids[row] == segment).nonzero().flatten().tolist()
            text = Text(f"{batch.where[sample]}: ", style="dim")
            sample += 1
            images = 0
            for place in places:
                token = int(batch.input_ids[row, place])
                learnt = place > places[0] and int(batch.targets[row, place - 1]) >= 0
                if token == tokenizer.image_id:
                    images += 1
                    continue
                if images:
                    text.append(f"[{images} image tokens]", style="cyan")
                    images = 0
                piece = tokenizer.backend.decode([token], skip_special_tokens=False)
                text.append(piece, style="bold green" if learnt else "default")
            console.print(text)
