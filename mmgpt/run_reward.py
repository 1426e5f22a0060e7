"""Runs that learn from preferences, a reward model or a policy: what they do otherwise than a supervised one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from rich.console import Console

from mmgpt.config import SourceConfig
from mmgpt.data.branching import PreferenceBatch, PreferenceLoader
from mmgpt.data.loader import load_items
from mmgpt.data.messages import text_of
from mmgpt.data.preferences import load_preferences
from mmgpt.data.ranked import RankedItem, statistics
from mmgpt.data.rejections import RejectionReport
from mmgpt.evaluate.captioning import prompt_of
from mmgpt.evaluate.ranking import Ranking, rank_batches, write_ranking
from mmgpt.evaluate.report import Plots, plot_metrics
from mmgpt.model.heads import RewardModel
from mmgpt.model.language import shares_prompts
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.run import say
from mmgpt.run_prompts import PromptRun
from mmgpt.stages.instruct import Instruct
from mmgpt.stages.preference import DirectPreference
from mmgpt.stages.reward import Reward

Score = Callable[[PreferenceBatch], torch.Tensor]
PLOTS: Plots = {
    "loss.png": ("loss per prompt", {"training": "train/loss", "validation": "val/loss"}),
    "accuracy.png": ("share of pairs ranked as people did", {"training": "train/accuracy", "validation": "val/accuracy"}),
}
MARGIN: Plots = {"margin.png": ("implied margin of a pair", {"training": "train/margin", "validation": "val/margin"})}


class RankedRun(PromptRun):
    """A run on prompts with ranked answers, in `config.run_dir`, which ends up holding

    config.yaml, metrics.csv, loss.png, accuracy.png, calibration.png, report.md and ranking.json, bad_samples.jsonl where there
    were any, checkpoints/last.ckpt, and the exported model in model/.
    """

    noun = "preference"
    plots = PLOTS

    def _items(self, model: MultimodalGPT, report: RejectionReport) -> tuple[list[Any], list[Any]]:
        self._train, validation = super()._items(model, report)
        return self._train, validation

    def _key(self, item: RankedItem) -> str:
        return item.preference.key

    def _read(self, sources: list[SourceConfig], model: MultimodalGPT, report: RejectionReport) -> list[RankedItem]:
        items, total = load_preferences(sources, model.encode, max_length=self._longest(model), report=report)
        report.check(total, self.config.data.max_bad)
        return items

    def _loaders(
        self,
        model: MultimodalGPT,
        stage: Instruct,
        train: list[Any],
        validation: list[Any],
        report: RejectionReport,
        trainer: L.Trainer,
    ) -> tuple[Any, Any]:
        shared = {**self._loading(model, report, trainer), "images": stage.images, "share": shares_prompts(model.language)}
        loader = PreferenceLoader(train, self.config.data, accumulate=self.config.trainer.accumulate, **shared)
        held = PreferenceLoader(validation, self.config.data, shuffle=False, **shared) if validation else None
        return loader, held

    def _pictures(self, train: list[Any]) -> Iterable[Any]:
        return (image for item in train for image in item.images)

    def _show_batch(self, model: MultimodalGPT, loader: Any) -> None:
        """Print the first batch: its prompts, and who is preferred to whom."""
        batch: PreferenceBatch = next(iter(loader))
        console = Console(highlight=False, markup=False)
        rows, tokens = batch.input_ids.shape
        filled = batch.tokens / batch.input_ids.numel()
        console.print(
            f"{batch.samples} prompts with {len(batch.rows)} answers and {len(batch.better)} pairs in {rows} rows of {tokens} "
            f"tokens, {filled:.0%} filled"
        )
        by_place = {item.preference.where: item.preference for item in loader.items}
        for where in batch.where:
            preference = by_place[where]
            console.print(f"\n{where}: {text_of(preference.prompt[-1])}", style="dim", soft_wrap=True)
            for number, answer in enumerate(preference.answers, start=1):
                console.print(f"  {number}. {answer}", soft_wrap=True)
            console.print("  " + ", ".join(f"{b + 1} > {w + 1}" for b, w in preference.pairs), style="green", soft_wrap=True)

    def _describe_run(
        self, model: MultimodalGPT, train: list[Any], validation: list[Any], report: RejectionReport, steps: int
    ) -> None:
        say(f"to train on: {statistics(train)}")
        if validation:
            say(f"held out: {statistics(validation)}")
        say(self._what_learns(model, steps))
        if len(report):
            say(report.summary())

    def _report(self, model: MultimodalGPT, score: Score, stage: Instruct, validation: list[Any], seconds: float) -> None:
        """Rank the held-out prompts and those of a second source, and write what came of it."""
        found: dict[str, Ranking] = {}
        if validation:
            found["prompts of the same source"] = self._rank(model, score, stage, validation)
        if self.config.evaluate.source is not None:
            report = RejectionReport(self.folder / "bad_samples.jsonl")
            second = self._unseen(self._read([self.config.evaluate.source], model, report), self._train)
            if second:
                found[self.config.evaluate.source.path] = self._rank(model, score, stage, second)
        plot_metrics(self.folder, self.plots)
        write_ranking(self.folder, found, seconds, list(self.plots))
        for name, ranking in found.items():
            say(f"{name}: {ranking}")
        say(f"report: {self.folder / 'report.md'}")

    def _reporting(self) -> torch.device:
        """Where held-out answers are ranked: a model that was trained in shards may be too large for one GPU."""
        return torch.device("cpu") if self.config.trainer.strategy == "fsdp" else self._device()

    def _rank(self, model: MultimodalGPT, score: Score, stage: Instruct, items: list[RankedItem]) -> Ranking:
        loader = PreferenceLoader(
            items,
            self.config.data,
            pad_id=model.tokenizer.pad_id,
            images=stage.images,
            report=RejectionReport(None),
            seed=0,
            shuffle=False,
            share=shares_prompts(model.language),
        )
        finish = None if stage.images is None else stage.images.finish
        return rank_batches(score, loader, finish, model.device)  # type: ignore[arg-type]


class RewardRun(RankedRun):
    """A run that trains a reward model, with `stage: reward`."""

    def _stage(self, model: MultimodalGPT) -> Instruct:
        return Reward(RewardModel(model), self.config, None, total_steps=1)

    def _finish(self, model: MultimodalGPT, stage: Instruct, validation: list[Any], seconds: float) -> None:
        """Shift the scores, export, load the export again as a user would, measure that."""
        assert isinstance(stage, Reward)
        self._shift(stage.model.to(self._reporting()))
        self._export(model, stage, seconds)
        loaded = RewardModel.from_pretrained(self.folder).to(self._reporting())
        self._report(loaded.model, loaded, stage, validation, seconds)

    def _shift(self, reward: RewardModel) -> None:
        """Move the scores so that demonstrations have a mean of 0 (Ouyang et al. 2022, section 3.5)."""
        settings, model = self.config.reward, reward.model
        if settings.demonstrations:
            report = RejectionReport(self.folder / "bad_samples.jsonl")
            longest = self._longest(model)
            items, _ = load_items(settings.demonstrations, model.encode, max_length=longest, report=report, seed=0)
            shown = [prompt_of(item.sample.messages) for item in items]
        else:
            best = [(item.preference, {worse for _, worse in item.preference.pairs}) for item in self._train]
            shown = [
                (preference.prompt, next(preference.answers[better] for better, _ in preference.pairs if better not in beaten))
                for preference, beaten in best
                if any(better not in beaten for better, _ in preference.pairs)
            ]
        shown = shown[: settings.demonstration_limit]
        if not shown:
            say("no demonstrations: the scores are not shifted")
            return
        scores = reward.score([prompt for prompt, _ in shown], [answer for _, answer in shown])
        with torch.no_grad():
            reward.head.bias.sub_(scores.mean())
        say(f"scores shifted by {-float(scores.mean()):+.3f}, so that {len(shown)} demonstrations score 0 on average")


class PreferenceRun(RankedRun):
    """A run that trains a policy on preferences (DPO), with `stage: preference`; it ranks by the reward that a policy implies.

    margin.png is beside the other plots.
    """

    plots = PLOTS | MARGIN

    def _stage(self, model: MultimodalGPT) -> Instruct:
        stage = DirectPreference(model, self.config, None, total_steps=1)
        if stage.has_copy:
            self._check_reference(model)
        return stage

    def _finish(self, model: MultimodalGPT, stage: Instruct, validation: list[Any], seconds: float) -> None:
        assert isinstance(stage, DirectPreference)
        self._export(model, stage, seconds)
        model.to(self._reporting()).eval()
        self._report(model, stage.implied, stage, validation, seconds)
