"""One training run: its folder, and the steps from data to exported model."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from mmgpt import artifacts, machine
from mmgpt.config import RunConfig
from mmgpt.data.features import FeatureCache, ImageSource, fingerprint
from mmgpt.data.loader import BatchLoader, Item, load_items, split_holdout
from mmgpt.data.messages import Rejected, Sample
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.sources import read_source
from mmgpt.data.stream import StreamLoader
from mmgpt.errors import UsageError, UserError
from mmgpt.evaluate.captioning import Answered, SampleAnswers, Score, exact_match
from mmgpt.evaluate.report import show_batch, write_report
from mmgpt.loop.checkpoint import Checkpointer, Stopped
from mmgpt.loop.metrics import MetricsFile
from mmgpt.loop.progress import ProgressBar
from mmgpt.model.multimodal import PARTS, MultimodalGPT
from mmgpt.stages.instruct import Instruct, stage_rates

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)

# What a resumed run may change and still go on as the run that was never stopped.
FREE_KEYS = (
    "run_dir", "resume", "overwrite", "show_batch", "export", "evaluate.", "data.feature_cache", "data.max_bad", "data.workers",
    "trainer.progress", "trainer.logger", "trainer.threads", "trainer.checkpoint_every",
)  # fmt: skip


CALIBRATION_IMAGES = 64
"""Images whose features the projector sees before its first step."""


class Run:
    """A run in `config.run_dir`, which ends up holding

    config.yaml, metrics.csv, loss.png and accuracy.png, samples.md with examples/, bad_samples.jsonl where there were any,
    checkpoints/last.ckpt, and the exported model in model/.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = Path(config.run_dir)
        self.checkpoint = self.folder / "checkpoints" / "last.ckpt"
        self.resume_step: int | None = None
        self.cursor: dict[str, int] = {}

    def execute(self) -> int:
        """Train, measure, export. Returns the exit code.

        Raises:
            UsageError: the configuration cannot be used; nothing was written.
            UserError: data, disk or checkpoint are at fault.
            Stopped: Ctrl-C or SIGTERM; the state is saved.
        """
        try:
            return self._execute()
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise UserError(f"cannot write: {place}{error.strerror}.{self._what_is_kept()}") from error

    def _what_is_kept(self) -> str:
        if not self.checkpoint.is_file():
            return ""
        return f" The training up to the last checkpoint is kept: go on with --config {self.folder / 'config.yaml'} --resume true"

    def _execute(self) -> int:
        config = self.config
        device = self._device()
        machine.set_threads(config.trainer.threads)
        L.seed_everything(config.trainer.seed, verbose=False)
        if not config.show_batch:
            self._open_folder()
        say(f"model: {config.model.init_from or _describe(config)}")
        model = MultimodalGPT.from_config(config.model)
        say(f"data: {', '.join(source.path for source in config.data.train)}")
        report = RejectionReport(None if config.show_batch else self.folder / "bad_samples.jsonl")
        train, validation = self._items(model, report)
        stage = self._stage(model)
        self._set_precision(model, device)
        stage.images = self._images(model, device)
        if config.show_batch:
            config.resume = False
        if config.resume:
            self._check_checkpoint(stage)
        trainer = self._trainer(model, validation)
        loader, held = self._loaders(model, stage, train, validation, report, trainer)
        if config.show_batch:
            self._show_batch(model, loader)
            return 0
        steps = config.trainer.epochs * -(-len(loader) // config.trainer.accumulate)
        stage.total_steps = min(steps, config.trainer.max_steps or steps)
        self._describe_run(model, train, validation, report, stage.total_steps)
        if config.trainer.compile:
            model.compile_blocks()
        if not config.resume and config.model.init_from is None:
            self._initialize_projector(model, stage.images, train)
        if config.resume:
            # Lightning forgets the loader's state where the checkpoint was written at the end of an epoch.
            loader.load_state_dict(self.cursor)
            self._write_config()
        started = time.perf_counter()
        trainer.fit(
            stage,
            train_dataloaders=loader,
            val_dataloaders=held,
            ckpt_path=str(self.checkpoint) if config.resume else None,
            weights_only=True,
        )
        seconds = time.perf_counter() - started
        if config.trainer.strategy == "fsdp":
            # Every rank holds a shard: all gather what was learnt, and it goes into a whole model.
            learnt = trainer.strategy.lightning_module_state_dict()
            model = MultimodalGPT.from_config(config.model)
            stage.model = self._stage(model).model
            stage.model.load_state_dict({key.removeprefix("model."): value for key, value in learnt.items()}, strict=False)
        if trainer.is_global_zero:
            try:
                self._finish(model, stage, validation, seconds)
            except KeyboardInterrupt:
                raise Stopped(f"stopped before the report was written.{self._what_is_kept()}") from None
            except UserError as error:
                raise type(error)(f"{str(error).rstrip('.')}.{self._what_is_kept()}") from error
        return 0

    # Before training

    def _device(self) -> torch.device:
        kind = self.config.trainer.accelerator
        return machine.pick_device({"gpu": "cuda"}.get(kind, kind))

    def _open_folder(self) -> None:
        """Make the run folder, or take up the run in it; never overwrite one by accident."""
        config, folder = self.config, self.folder
        if config.resume:
            if not self.checkpoint.is_file():
                raise UsageError(f"nothing to resume: {self.checkpoint} does not exist; leave --resume away to start anew")
            # What a killed process was writing when it died.
            for stray in (path for pattern in (".model-*", ".*.tmp*", ".metrics.csv-*") for path in folder.glob(pattern)):
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink(missing_ok=True)
            return
        if folder.is_dir() and int(os.environ.get("LOCAL_RANK", 0)) == 0 and (found := {path.name for path in folder.iterdir()}):
            # A run that failed before its first step left nothing to lose.
            unused = "config.yaml" in found and found <= {"config.yaml", "bad_samples.jsonl"}
            if not config.overwrite and not unused:
                goes_on = "--resume true goes on with it, " if self.checkpoint.is_file() else ""
                raise UsageError(
                    f"{folder} holds a run already: --overwrite true replaces it, {goes_on}--run_dir NAME starts another"
                )
            if "config.yaml" not in found:
                raise UsageError(f"{folder} is not a run folder (no config.yaml), so --overwrite does not remove it")
            shutil.rmtree(folder)
        self._write_config()

    def _write_config(self) -> None:
        settings = dataclasses.replace(self.config, resume=False, overwrite=False)
        fresh = self.folder / ".config.yaml.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fresh.write_text(yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False), encoding="utf-8")
            os.replace(fresh, self.folder / "config.yaml")
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.folder}: {error.strerror or error}") from error

    def _check_checkpoint(self, stage: Instruct) -> None:
        """Compare the checkpoint to resume from with what would be trained.

        Lightning need not be strict then: a checkpoint holds only what learns.

        Raises:
            UserError: the file is no checkpoint, or that of another model.
        """
        try:
            checkpoint = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
            loop = checkpoint["loops"]["fit_loop"]
            self.resume_step = int(loop["epoch_loop.state_dict"]["_batches_that_stepped"])
            self.cursor = loop["state_dict"]["combined_loader"][0]
            there = {name: list(weight.shape) for name, weight in checkpoint["state_dict"].items()}
        except Exception as error:
            raise UserError(
                f"{self.checkpoint} is not a whole checkpoint of this project ({str(error).splitlines()[0]}): "
                "--overwrite true starts the run anew"
            ) from error
        wanted = {name: list(weight.shape) for name, weight in stage.state_dict().items()}
        different = [name for name in (*wanted, *there) if wanted.get(name) != there.get(name)]
        changed = self._changed_keys()
        if different:
            name = different[0]
            raise UserError(
                f"{self.checkpoint} does not fit this configuration: {name.removeprefix('model.')} is "
                f"{there.get(name, 'not there')} in the checkpoint, {wanted.get(name, 'not trained')} here"
                + (f" (changed since the run began: {', '.join(changed)})" if changed else "")
                + f"; go on with --config {self.folder / 'config.yaml'}, or start another run with --run_dir NAME"
            )
        if changed:
            say(f"warning: changed since the run began, so this is not the run it would have been: {', '.join(changed)}")
        stage.strict_loading = False

    def _changed_keys(self) -> list[str]:
        """Settings that differ from the run's config.yaml and bear on what is learnt."""
        try:
            before = _flat(yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError, yaml.YAMLError):
            return []
        now = _flat(yaml.safe_load(yaml.safe_dump(dataclasses.asdict(self.config))))
        changed = [key for key in now if before.get(key) != now[key] and not key.startswith(FREE_KEYS)]
        values = {key: f"{before.get(key)} -> {now[key]}" for key in changed}
        return [f"{key} ({values[key]})" if len(values[key]) < 100 else key for key in changed]

    def _items(self, model: MultimodalGPT, report: RejectionReport) -> tuple[list[Any], list[Any]]:
        data, seed = self.config.data, self.config.trainer.seed
        if not data.train:
            raise UsageError("data.train names no source: give at least one, for example --data.train '[{path: photos}]'")
        longest = self._longest(model)
        if data.stream:
            if not self.config.trainer.max_steps:
                raise UsageError("data.stream reads sources without knowing their length: set trainer.max_steps")
            validation, total = load_items(data.validation, model.encode, max_length=longest, report=report, seed=seed)
            report.check(total, data.max_bad)
            return [], validation
        train, total = load_items(data.train, model.encode, max_length=longest, report=report, seed=seed)
        report.check(total, data.max_bad)
        if not train:
            raise UserError(f"no usable sample among {total} in {', '.join(source.path for source in data.train)}")
        if data.validation:
            validation, held = load_items(data.validation, model.encode, max_length=longest, report=report, seed=seed)
            report.check(total + held, data.max_bad)
        else:
            train, validation = split_holdout(train, data.holdout, seed, data.fold)
        return train, validation

    def _stage(self, model: MultimodalGPT) -> Instruct:
        """Model and objective, before it is known how many steps there will be."""
        return Instruct(model, self.config, None, total_steps=1)

    def _loaders(
        self,
        model: MultimodalGPT,
        stage: Instruct,
        train: list[Any],
        validation: list[Any],
        report: RejectionReport,
        trainer: L.Trainer,
    ) -> tuple[BatchLoader | StreamLoader, BatchLoader | None]:
        """What training and validation go over."""
        config, shared = self.config, self._loading(model, report, trainer)
        accumulate, varied = config.trainer.accumulate, stage.images
        if varied is not None and config.data.augment:
            varied = dataclasses.replace(varied, augment=varied.encoder.preprocess.augment)
        loader: BatchLoader | StreamLoader
        if config.data.stream:
            loader = StreamLoader(
                config.data.train,
                model.encode,
                config.data,
                total=(config.trainer.max_steps or 0) * accumulate,
                max_length=self._longest(model),
                accumulate=accumulate,
                images=varied,
                **shared,
            )
        else:
            loader = BatchLoader(train, config.data, accumulate=accumulate, images=varied, **shared)
        held = BatchLoader(validation, config.data, shuffle=False, images=stage.images, **shared) if validation else None
        return loader, held

    def _loading(self, model: MultimodalGPT, report: RejectionReport, trainer: L.Trainer) -> dict[str, Any]:
        """What every loader is told."""
        return dict(
            pad_id=model.tokenizer.pad_id,
            report=report,
            seed=self.config.trainer.seed,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )

    def _check_reference(self, model: MultimodalGPT) -> None:
        """Where the reference is a copy, it is made before a new projector sees its first images, and would be another model.

        Raises:
            UsageError: the projector is new.
        """
        if model.projector is not None and self.config.model.init_from is None:
            raise UsageError(
                f"stage {self.config.stage} stays near the model it begins as, whose projector is untrained: set model.init_from"
            )

    def _show_batch(self, model: MultimodalGPT, loader: Any) -> None:
        show_batch(model, loader)

    def _pictures(self, train: list[Any]) -> Iterable[Any]:
        """Images of the training samples, for the projector to see before its first step."""
        samples: Iterable[Sample | Rejected] = [item.sample for item in train]
        if self.config.data.stream:
            samples = (found for source in self.config.data.train for found in read_source(source))
        return (image for sample in samples if isinstance(sample, Sample) for image in sample.images)

    def _longest(self, model: MultimodalGPT) -> int:
        data = self.config.data
        row = data.row_length if data.batching == "packed" and data.row_length else data.max_length
        return min(data.max_length, row, model.context)

    def _images(self, model: MultimodalGPT, device: torch.device) -> ImageSource | None:
        if model.vision is None:
            return None
        frozen = stage_rates(self.config)["vision"] == 0
        cache = None
        if frozen and self.config.data.feature_cache:
            root = artifacts.cache_dir() / "features"
            cache = FeatureCache(root, fingerprint(model.vision), self.config.data.feature_cache_gb)
        return ImageSource(model.vision, cache, frozen)

    def _set_precision(self, model: MultimodalGPT, device: torch.device) -> None:
        """Frozen weights are kept in bf16 where training runs in it: autocast would convert them again in every forward."""
        self.precision = machine.pick_precision(self.config.trainer.precision, device)
        if self.precision == "bf16-mixed":
            if not machine.has_bf16(device) and device.type == "cpu":
                say("warning: this CPU has no bf16 instructions; --trainer.precision fp32 is many times faster")
            for module in (model.vision, model.language):
                frozen = [] if module is None else [p for p in module.parameters() if not p.requires_grad]
                # FSDP joins the weights of a block to one tensor: there, adapters and what they adapt need one type.
                if module is None or (self.config.trainer.strategy == "fsdp" and len(frozen) < len(list(module.parameters()))):
                    continue
                machine.keep_in_bf16(frozen)
        if device.type != "cpu":
            model.to(device)

    def _initialize_projector(self, model: MultimodalGPT, images: ImageSource | None, train: list[Any]) -> None:
        """Show the projector the features of some training images before its first step."""
        if images is None or model.projector is None:
            return
        features = []
        for image in self._pictures(train):
            try:
                shown = images([image])
            except UserError:
                continue  # the loader will report it
            assert shown is not None
            with torch.no_grad():
                features.append(shown if shown.dim() == 3 else model.encode_images(shown.to(model.device)).cpu())
            if len(features) == CALIBRATION_IMAGES:
                break
        if features:
            model.projector.initialize(torch.cat(features).to(next(model.projector.parameters()).device))

    def _callbacks(self, validation: list[Any]) -> list[L.Callback]:
        """What the stage wants to be told of while it trains."""
        return [SampleAnswers(validation, self.config.evaluate)] if validation and self.config.evaluate.generate else []

    def _trainer(self, model: MultimodalGPT, validation: list[Any]) -> L.Trainer:
        settings = self.config.trainer
        self.metrics = MetricsFile(self.folder / "metrics.csv", resume_step=self.resume_step)
        callbacks: list[L.Callback] = [Checkpointer(self.folder / "checkpoints", self._checkpoint_every())]
        if settings.progress:
            callbacks.append(ProgressBar())
        callbacks += self._callbacks(validation)
        return L.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=self._strategy(model),
            precision=self.precision,  # type: ignore[arg-type]
            max_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=self._clip(),
            check_val_every_n_epoch=settings.validate_every or settings.epochs,
            logger=[self.metrics, *self._extra_logger()],
            callbacks=callbacks,
            default_root_dir=str(self.folder),
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )

    def _checkpoint_every(self) -> int | None:
        """Steps between checkpoints; None is once an epoch."""
        return self.config.trainer.checkpoint_every

    def _clip(self) -> float | None:
        """Gradient norm that Lightning clips at."""
        return self.config.optimizer.clip or None

    def _strategy(self, model: MultimodalGPT) -> Any:
        """Lightning's strategy; FSDP shards block by block and gathers whole weights for checkpoints and export."""
        if self.config.trainer.strategy != "fsdp":
            return self.config.trainer.strategy
        from lightning.pytorch.strategies import FSDPStrategy

        return FSDPStrategy(auto_wrap_policy={type(block) for block in model.blocks}, state_dict_type="full")

    def _extra_logger(self) -> list[Any]:
        kind = self.config.trainer.logger
        try:
            if kind == "tensorboard":
                from lightning.pytorch.loggers import TensorBoardLogger

                return [TensorBoardLogger(str(self.folder), name="tensorboard", version="")]
            if kind == "wandb":
                from lightning.pytorch.loggers import WandbLogger

                return [WandbLogger(name=self.folder.name, save_dir=str(self.folder))]
        except ModuleNotFoundError as error:
            raise UsageError(f"trainer.logger {kind} needs `pip install 'mmgpt[loggers]'`: {error}") from error
        return []

    def _describe_run(
        self, model: MultimodalGPT, train: list[Any], validation: list[Any], report: RejectionReport, steps: int
    ) -> None:
        if not train:
            say(f"streaming; {len(validation)} samples to validate; {steps} steps, {self.precision}")
            return
        tokens = sum(len(item.encoded) for item in train)
        supervised = sum(sum(item.encoded.supervised) for item in train)
        say(
            f"{len(train)} samples to train on ({tokens / len(train):.0f} tokens each, {supervised / tokens:.1%} supervised), "
            f"{len(validation)} to validate; {self._what_learns(model, steps)}"
        )
        if len(report):
            say(report.summary())

    def _what_learns(self, model: torch.nn.Module, steps: int) -> str:
        learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in model.parameters())
        return (
            f"{learnt / 1e6:.1f}M of {everything / 1e6:.0f}M weights learn; {steps} steps, {self.precision}, "
            f"{torch.get_num_threads()} threads"
        )

    # After training

    def _export(self, model: MultimodalGPT, stage: Instruct, seconds: float) -> None:
        """Write what was learnt to `model/`."""
        stage.model.to("cpu")
        model.altered |= {part for part in PARTS if stage.rates.get(part, 0) > 0 and not model.lora_rank(part)}
        exported = self.folder / "model"
        stage.model.save_pretrained(exported, full=self.config.export == "all")
        say(f"trained in {seconds:.0f} s; model in {exported}")

    def _finish(self, model: MultimodalGPT, stage: Instruct, validation: list[Any], seconds: float) -> None:
        """Export, load the export again as a user would, measure that."""
        config = self.config
        self._export(model, stage, seconds)
        score: Score | None = None
        answered: list[Answered] = []
        items = validation
        if config.evaluate.source is not None:
            sources = [config.evaluate.source]
            report = RejectionReport(self.folder / "bad_samples.jsonl")
            longest = self._longest(model)
            items, _ = load_items(sources, model.encode, max_length=longest, report=report, seed=config.trainer.seed)
        # Answers that are not counted are shown all the same: captions have no one right form.
        counted = config.evaluate.final != 0
        if items and (counted or config.evaluate.examples):
            import mmgpt

            asked = config.evaluate if counted else dataclasses.replace(config.evaluate, final=config.evaluate.examples)
            score, answered = exact_match(mmgpt.load(self.folder), items, asked, images=stage.images)
            if counted:
                say(f"exact answers on {score.total} held-out samples: {score.share:.1%}")
            else:
                score = None
        examples = write_report(self.folder, answered or items, config, score=score, seconds=seconds)
        say(f"report: {self.folder / 'samples.md'}, {self.folder / 'loss.png'}")
        if examples:
            question = _first_question(items)
            say(f'try it: python demo/ask.py --model {self.folder} --image {examples[0]} "{question}"')


def _first_question(items: list[Item]) -> str:
    from mmgpt.data.messages import text_of

    return next((text_of(m) for m in items[0].sample.messages if m["role"] == "user"), "Describe this image.")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _describe(config: RunConfig) -> str:
    language = config.model.language
    name = language.architecture["model_type"] + " from scratch" if language.architecture else language.name
    vision = config.model.vision
    return name if vision is None else f"{vision.name} + {config.model.projector.kind} + {name}"


def say(text: str) -> None:
    """Tell the person at the terminal; stdout is left to results."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(text, file=sys.stderr, flush=True)
