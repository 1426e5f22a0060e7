"""A run that trains a policy against a reward: what it does otherwise than a supervised one."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch

from mmgpt.config import DataConfig, SourceConfig
from mmgpt.data.loader import BatchLoader
from mmgpt.data.messages import text_of
from mmgpt.data.preferences import read_preferences
from mmgpt.data.prompts import Prompt, PromptLoader, load_prompts
from mmgpt.data.ranked import Preference, prompt_key
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.text import load_text
from mmgpt.errors import UsageError, UserError
from mmgpt.evaluate.health import Answers, plot_health, write_answers
from mmgpt.model.adapters import only_adapters_learn
from mmgpt.model.heads import RewardModel
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.rl.rewards import RewardTerm, WeightedReward
from mmgpt.run import say
from mmgpt.run_prompts import PromptRun
from mmgpt.stages.instruct import Instruct, stage_rates
from mmgpt.stages.optimizer import freeze
from mmgpt.stages.ppo import Ppo


class PpoRun(PromptRun):
    """A run in `config.run_dir`, which ends up holding

    config.yaml, metrics.csv, health.png, samples.md (answers before and after), bad_samples.jsonl where there were any,
    checkpoints/last.ckpt, and the policy that was best on held-out prompts in model/.
    """

    noun = "prompt"

    def _execute(self) -> int:
        config, ppo = self.config, self.config.ppo
        if config.trainer.max_steps is not None or config.trainer.epochs != 1 or config.trainer.accumulate != 1:
            raise UsageError("stage ppo counts in iterations: set ppo.iterations, not trainer.epochs, .max_steps or .accumulate")
        if config.trainer.precision == "fp16":
            raise UsageError("stage ppo has no loss scaler: trainer.precision must be bf16 or fp32")
        if ppo.engine == "vllm" and config.trainer.devices not in (1, "1", "auto"):
            raise UsageError("ppo.engine vllm shares one GPU with the policy: set trainer.devices to 1, or ppo.engine to own")
        if config.trainer.strategy == "fsdp":
            raise UsageError("stage ppo draws answers from whole weights: trainer.strategy must be auto or ddp")
        if config.model.init_from is None and config.model.language.architecture is not None:
            say("warning: the policy begins with random weights; model.init_from names one that was trained to answer")
        if ppo.microbatch_size is not None and ppo.microbatch_size > ppo.minibatch_size:
            raise UsageError(f"ppo.microbatch_size {ppo.microbatch_size} is larger than ppo.minibatch_size {ppo.minibatch_size}")
        if ppo.minibatch_size > ppo.batch_size * ppo.samples:
            raise UsageError(
                f"ppo.minibatch_size {ppo.minibatch_size} is larger than an iteration's answers "
                f"({ppo.batch_size} prompts with {ppo.samples} each)"
            )
        return super()._execute()

    def _items(self, model: MultimodalGPT, report: RejectionReport) -> tuple[list[Any], list[Any]]:
        train, validation = super()._items(model, report)
        return train, validation[: self.config.ppo.evaluate_prompts]

    def _key(self, item: Prompt) -> str:
        return prompt_key(item.messages)

    def _read(self, sources: list[SourceConfig], model: MultimodalGPT, report: RejectionReport) -> list[Prompt]:
        room = min(self.config.data.max_length, model.context - self.config.ppo.max_new_tokens)
        if room < 1:
            raise UsageError(f"ppo.max_new_tokens leaves no room for a prompt in the model's window of {model.context} tokens")
        seed = self.config.trainer.seed
        prompts, total = load_prompts(sources, model.encode, max_length=room, report=report, seed=seed)
        report.check(total, self.config.data.max_bad)
        return prompts

    def _stage(self, model: MultimodalGPT) -> Instruct:
        ppo = self.config.ppo
        terms = [RewardTerm.parse(settings) for settings in ppo.rewards]
        say(f"reward: {', '.join(term.class_path for term in terms)}")
        reward = WeightedReward.from_terms(terms, self._ranked())
        for (name, weight, _), term in zip(reward.terms, terms):
            if term.weight == "fit":
                say(f"weight of {name}, fitted on ranked answers: {weight:.3g}")
        value = None
        if ppo.value_from is not None:
            value = RewardModel.from_pretrained(ppo.value_from)
            if len(value.model.tokenizer) != len(model.tokenizer):
                raise UsageError(f"ppo.value_from {ppo.value_from} reads other tokens than the policy")
            # Adapters like the policy's: whatever the policy can learn, its critic can.
            value.model.restart(self.config.model)
        freeze(model, stage_rates(self.config))
        self._reference: MultimodalGPT | None = None
        if not only_adapters_learn(model):
            self._check_reference(model)
            self._reference = copy.deepcopy(model).requires_grad_(False).eval()
        return Ppo(model, self.config, reward, reference=self._reference, value=value)  # type: ignore[return-value]

    def _set_precision(self, model: MultimodalGPT, device: torch.device) -> None:
        super()._set_precision(model, device)
        if self._reference is not None:
            self._reference.to(device)

    def _ranked(self) -> list[Preference]:
        found: list[Preference] = []
        report = RejectionReport(self.folder / "bad_samples.jsonl")
        for source in self.config.ppo.ranked:
            for item in read_preferences(source):
                if isinstance(item, Preference):
                    found.append(item)
                else:
                    report.add(item)
        return found

    def _loaders(
        self,
        model: MultimodalGPT,
        stage: Instruct,
        train: list[Any],
        validation: list[Any],
        report: RejectionReport,
        trainer: L.Trainer,
    ) -> tuple[Any, Any]:
        ppo, seed = self.config.ppo, self.config.trainer.seed
        assert isinstance(stage, Ppo)
        stage.held_out = validation
        stage.reward.to(model.device, bf16=self.precision == "bf16-mixed")
        if ppo.ptx.sources:
            # Counted by itself: prompts that were left out are no bad texts.
            texts = RejectionReport(report.path)
            items, total = load_text(
                ppo.ptx.sources, model.tokenizer, model.encode, length=ppo.ptx.length, report=texts, seed=seed
            )
            texts.check(total, self.config.data.max_bad)
            if len(texts):
                say(f"pretraining text: {texts.summary()}")
            if not items:
                raise UserError(f"no text in {', '.join(source.path for source in ppo.ptx.sources)}")
            packing = DataConfig(max_length=ppo.ptx.length, batch_size=ppo.ptx.batch_size)
            stage.ptx = BatchLoader(items, packing, images=None, **self._loading(model, texts, trainer))
        shared = dict(rank=trainer.global_rank, world=trainer.world_size)
        return PromptLoader(train, ppo.iterations, ppo.batch_size, seed=seed, **shared), None

    def _clip(self) -> float | None:
        return None  # the stage clips policy and value apart

    def _checkpoint_every(self) -> int | None:
        return self.config.trainer.checkpoint_every or self.config.ppo.evaluate_every

    def _pictures(self, train: list[Any]) -> list[Any]:
        from mmgpt.data.messages import images_of

        return [image for prompt in train for image in images_of(prompt.messages)]

    def _show_batch(self, model: MultimodalGPT, loader: Any) -> None:
        """Print the prompts of the first iteration."""
        for prompt in loader.batch(0):
            print(f"{prompt.where}: {' / '.join(text_of(message) for message in prompt.messages)}")

    def _describe_run(
        self, model: MultimodalGPT, train: list[Any], validation: list[Any], report: RejectionReport, steps: int
    ) -> None:
        ppo = self.config.ppo
        parts = -(-ppo.batch_size * ppo.samples // ppo.minibatch_size) * ppo.epochs
        say(
            f"{len(train)} prompts, {len(validation)} held out; {ppo.iterations} iterations of "
            f"{ppo.batch_size * ppo.samples} answers, {parts} optimizer steps each; {self._what_learns(model, steps)}"
        )
        if len(report):
            say(report.summary())

    def _finish(self, model: MultimodalGPT, stage: Instruct, validation: list[Any], seconds: float) -> None:
        """Let the model that the policy was at first, and the best policy, answer the held-out prompts; export the policy."""
        assert isinstance(stage, Ppo)
        if stage.stopped:
            say(f"stopped by rule after iteration {stage.iteration}: {stage.stopped}")
        stage.to(self._device())
        before = self._answers(stage, trained=False) if validation else None
        kept = stage.best or {name: value.cpu() for name, value in stage.average.items()}
        if kept:
            stage.set_weights({name: value.to(model.device) for name, value in kept.items()})
        if stage.best:
            say(f"best held-out reward {stage.best_score:.3f} after iteration {stage.best_iteration}: these weights are exported")
        after = self._answers(stage, trained=True) if validation else None
        self._export(model, stage, seconds)
        plot_health(self.folder)
        if before is not None and after is not None:
            write_answers(self.folder, before, after, seconds, stage.stopped)
            say(f"held-out reward {before.mean:.3f} before, {after.mean:.3f} after, at a KL of {after.kl:.2f} nats an answer")
        say(f"report: {self.folder / 'samples.md'}, {self.folder / 'health.png'}")

    def _answers(self, stage: Ppo, *, trained: bool) -> Answers:
        """Answers of the policy, or of what it was at first, to the held-out prompts, by the same random numbers."""
        rollout = stage.answer_held_out() if trained else stage.answer_as_reference()
        kl = stage.divergence(rollout) if trained else 0.0
        scores = stage.reward(rollout.prompts, rollout.texts).values
        return Answers(rollout.prompts, rollout.texts, scores.tolist(), rollout.ended.tolist(), rollout.lengths.tolist(), kl)
