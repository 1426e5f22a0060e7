"""Training against transformers' `LlavaForConditionalGeneration` and `Trainer`: samples a second and peak memory.

    python benchmarks/training.py [--tasks align,instruct,lora] [--samples 96] [--rounds 2] [--data FILE.parquet]

Same weights (SmolLM2-135M-Instruct, CLIP ViT-B/16, one projector), same photographs and conversations, 196 image tokens, same
precision, optimizer and batch size. Ours is the run that `python -m mmgpt.train` makes, from an empty feature cache, without
checkpoints and final report. The peer groups by length, logs and saves nothing, and gets its photographs decoded and
preprocessed beforehand, which is not timed; the memory they take is not counted.

Every side runs in a process of its own, in turns (ours, peer, ours, peer), and the best round of each counts. Before it
trains, each side computes the loss of the same first samples in fp32: where the two differ, weights or data do, and the
benchmark stops. One JSON object on stdout; progress on stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import peak_memory_mb

MAX_LENGTH = 1024
TOLERANCE = 1e-3
"""Relative difference of the first loss: our features are rounded to half precision."""

# LLaVA-1.5's rates for its two stages (Liu et al. 2023b, table 9) and for LoRA; one for all parts, as `Trainer` has it.
RATES = {"align": 1e-3, "instruct": 2e-5, "lora": 2e-4}


def run_config(options: argparse.Namespace, task: str, folder: Path) -> Any:
    """The run of one task, as a configuration file would describe it."""
    from mmgpt.config import (
        DataConfig,
        EvaluateConfig,
        LanguageConfig,
        LoraConfig,
        ModelConfig,
        OptimizerConfig,
        PartRates,
        ProjectorConfig,
        RunConfig,
        SourceConfig,
        TrainerConfig,
    )

    source = SourceConfig(path="fruit", split="train", question="What fruit is this?", limit=options.samples)
    if options.data:
        source = SourceConfig(path=options.data, limit=options.samples)
    rate = RATES[task]
    return RunConfig(
        stage="align" if task == "align" else "instruct",
        run_dir=str(folder / "run"),
        overwrite=True,
        model=ModelConfig(
            projector=ProjectorConfig(kind="mlp2x_gelu"),
            language=LanguageConfig(lora=LoraConfig(rank=options.rank if task == "lora" else 0)),
        ),
        data=DataConfig(
            train=[source],
            holdout=0.0,
            batching=options.batching,
            batch_size=options.batch_size,
            max_length=MAX_LENGTH,
            row_length=options.row_length,
        ),
        optimizer=OptimizerConfig(lr=PartRates(projector=rate, language=rate)),
        trainer=TrainerConfig(
            epochs=options.epochs,
            precision=options.precision,
            accelerator=options.device,
            threads=options.threads,
            progress=False,
        ),
        evaluate=EvaluateConfig(generate=0, final=0),
    )


# What both start from


def prepare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write our fresh model under the peer's names, and the samples as the peer takes them."""
    import lightning as L
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    from mmgpt.artifacts import resolve
    from mmgpt.data.images import open_image
    from mmgpt.model.multimodal import MultimodalGPT

    config = run_config(options, "align", folder)
    L.seed_everything(config.trainer.seed, verbose=False)
    ours = MultimodalGPT.from_config(config.model)
    items = samples_of(config, ours)
    # The peer looks every id up before it puts the images in: their token must be one that its vocabulary has.
    used = {token for item in items for token in item.encoded.ids} | {ours.tokenizer.pad_id}
    stand_in = next(token for token in range(ours.tokenizer.text_vocabulary) if token not in used)
    assert ours.vision is not None and ours.projector is not None
    grid = ours.vision.grid
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                image_size=grid[0] * 16,
                patch_size=16,
                hidden_act="quick_gelu",
            ),
            text_config=AutoConfig.from_pretrained(resolve(config.model.language.name)),
            image_token_index=stand_in,
            image_seq_length=ours.tokens_per_image,
            vision_feature_layer=config.model.vision.layer,
        )
    )
    tower = timm_to_clip(load_file(resolve(config.model.vision.name) / "model.safetensors"))
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in theirs.model.vision_tower.state_dict()) else ""
    theirs.model.vision_tower.load_state_dict({f"{prefix}{name}": value for name, value in tower.items()})
    theirs.model.language_model.load_state_dict(ours.language.model.state_dict())
    theirs.lm_head.load_state_dict(ours.language.lm_head.state_dict())
    theirs.model.multi_modal_projector.linear_1.load_state_dict(ours.projector.fc1.state_dict())
    theirs.model.multi_modal_projector.linear_2.load_state_dict(ours.projector.fc2.state_dict())
    theirs.save_pretrained(folder / "llava")
    save_file(ours.projector.state_dict(), folder / "projector.safetensors")
    preprocess = ours.vision.preprocess
    pixels = [torch.stack([preprocess(open_image(image)) for image in item.encoded.images]) for item in items]
    np.save(folder / "pixels.npy", torch.cat(pixels).numpy())
    samples = [
        {
            "input_ids": [stand_in if token == ours.tokenizer.image_id else token for token in item.encoded.ids],
            "labels": [token if learnt else -100 for token, learnt in zip(item.encoded.ids, item.encoded.supervised)],
            "images": len(item.encoded.images),
        }
        for item in items
    ]
    (folder / "samples.json").write_text(json.dumps({"pad_id": ours.tokenizer.pad_id, "samples": samples}), encoding="utf-8")
    return {
        "samples": len(items),
        "image_tokens": ours.tokens_per_image,
        "tokens_per_sample": round(sum(len(item.encoded) for item in items) / len(items), 1),
    }


def samples_of(config: Any, model: Any) -> list[Any]:
    """The samples of a run, encoded, in the order of their source."""
    from mmgpt.data.loader import load_items
    from mmgpt.data.rejections import RejectionReport

    report, seed = RejectionReport(None), config.trainer.seed
    return load_items(config.data.train, model.encode, max_length=MAX_LENGTH, report=report, seed=seed)[0]


def timm_to_clip(state: dict[str, Any]) -> dict[str, Any]:
    """timm's names of a CLIP image tower -> transformers'; the way back from `mmgpt.convert.clip_to_timm`."""
    renames = (
        ("patch_embed.proj.", "embeddings.patch_embedding."),
        ("norm_pre.", "pre_layrnorm."),
        ("blocks.", "encoder.layers."),
        (".attn.proj.", ".self_attn.out_proj."),
        (".norm1.", ".layer_norm1."),
        (".norm2.", ".layer_norm2."),
    )
    out: dict[str, Any] = {}
    for name, value in state.items():
        if name == "cls_token":
            out["embeddings.class_embedding"] = value.flatten()
        elif name == "pos_embed":
            out["embeddings.position_embedding.weight"] = value[0]
        elif ".attn.qkv." in name:
            before, _, kind = name.replace("blocks.", "encoder.layers.").partition(".attn.qkv.")
            for part, piece in zip("qkv", value.chunk(3)):
                out[f"{before}.self_attn.{part}_proj.{kind}"] = piece
        else:
            for old, new in renames:
                name = name.replace(old, new)
            out["post_layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name] = value
    return out


# The two sides


def train_ours(options: argparse.Namespace, task: str, folder: Path) -> dict[str, Any]:
    import random

    import lightning as L
    import torch
    from safetensors.torch import load_file

    from mmgpt.data.features import ImageSource
    from mmgpt.data.loader import Item, build_batch
    from mmgpt.data.packing import balanced_rows
    from mmgpt.loop.checkpoint import Checkpointer
    from mmgpt.model.multimodal import MultimodalGPT
    from mmgpt.run import Run

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.times.append(now())

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.times.append(now())

    class TimedRun(Run):
        """A run that is looked at: nothing of its training is replaced."""

        def __init__(self) -> None:
            super().__init__(run_config(options, task, folder))
            self.clock = Clock()
            self.first: list[Item] = []
            self.first_loss = 0.0

        def _items(self, model: MultimodalGPT, *arguments: Any) -> tuple[list[Item], list[Item]]:
            assert model.projector is not None
            model.projector.load_state_dict(load_file(folder / "projector.safetensors"))  # the one both sides start from
            # In the order of the source, as the peer's samples are; a run shuffles its own.
            self.first = samples_of(self.config, model)[: options.batch_size]
            return super()._items(model, *arguments)

        def _set_precision(self, model: MultimodalGPT, device: torch.device) -> None:
            # Here the model is still in fp32.
            self.first_loss = self._first_loss(model)
            super()._set_precision(model, device)

        @torch.no_grad()
        def _first_loss(self, model: MultimodalGPT) -> float:
            assert model.vision is not None
            images = ImageSource(model.vision, None, frozen=True)
            rows = balanced_rows([len(item.encoded) for item in self.first], MAX_LENGTH)
            packed = [[self.first[i] for i in row] for row in rows]
            batch, _ = build_batch(packed, images, random.Random(0), pad_id=model.tokenizer.pad_id, target_count=1)
            assert batch is not None
            batch.images = images.finish(batch.images)
            result = model.loss(batch)
            return float(result.loss) / result.count

        def _trainer(self, *arguments: Any) -> L.Trainer:
            trainer = super()._trainer(*arguments)
            kept = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpointer)]  # type: ignore[attr-defined]
            trainer.callbacks = [*kept, self.clock]  # type: ignore[attr-defined]
            return trainer

        def _finish(self, *arguments: Any) -> None:
            """No export, no report."""

    run = TimedRun()
    run.execute()
    return measured(run.clock.times, run.first_loss, bf16=run.precision == "bf16-mixed")


def train_peer(options: argparse.Namespace, task: str, folder: Path) -> dict[str, Any]:
    import numpy as np
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import LlavaForConditionalGeneration, Trainer, TrainerCallback, TrainingArguments

    from mmgpt import machine

    machine.set_threads(options.threads)
    model = LlavaForConditionalGeneration.from_pretrained(folder / "llava", dtype=torch.float32, attn_implementation="sdpa")
    model.config.text_config.use_cache = False
    stored = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    pixels = torch.from_numpy(np.load(folder / "pixels.npy"))
    samples, at = [], 0
    for sample in stored["samples"]:
        ids, labels = (torch.tensor(sample[name]) for name in ("input_ids", "labels"))
        samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels[at : at + sample["images"]]})
        at += sample["images"]

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def padded(values: list[torch.Tensor], filler: int) -> torch.Tensor:
            return pad_sequence(values, batch_first=True, padding_value=filler)

        return {
            "input_ids": padded([row["input_ids"] for row in rows], stored["pad_id"]),
            "labels": padded([row["labels"] for row in rows], -100),
            "attention_mask": padded([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        }

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            self.times.append(now())

        def on_epoch_end(self, *arguments: Any, **more: Any) -> None:
            self.times.append(now())

    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if task == "instruct":
        model.model.language_model.requires_grad_(True)  # the head is tied to its embedding
    elif task == "lora":
        from mmgpt.model.adapters import add_lora

        add_lora(model.model.language_model, run_config(options, task, folder).model.language.lora)
    with torch.no_grad():
        first_loss = float(model(**collate(samples[: options.batch_size])).loss)
    device = torch.device("cuda" if options.device == "gpu" else "cpu")
    bf16 = machine.pick_precision(options.precision, device) == "bf16-mixed"
    if bf16:
        # As on our side: autocast would convert frozen weights again in every forward.
        model.model.vision_tower.to(torch.bfloat16)
        if task == "align":
            model.model.language_model.to(torch.bfloat16)
    clock = Clock()
    steps = options.epochs * -(-len(samples) // options.batch_size)
    optimizer = run_config(options, task, folder).optimizer
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "peer"),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            train_sampling_strategy="group_by_length",
            learning_rate=RATES[task],
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_epsilon=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.clip,
            optim="adamw_torch_fused",
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": optimizer.final_lr},
            warmup_steps=max(1, round(optimizer.warmup * steps)),
            bf16=bf16,
            use_cpu=options.device == "cpu",
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=samples,  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[clock],
    ).train()
    result = measured(clock.times, first_loss, bf16=bf16)
    if options.device == "cpu":
        result["peak_memory_mb"] -= pixels.nbytes / 2**20
    return result


def now() -> float:
    """The clock, when a GPU has done what it was given."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(times: list[float], first_loss: float, *, bf16: bool) -> dict[str, Any]:
    import torch

    on_gpu = torch.cuda.is_initialized()
    return {
        "epochs": [end - start for start, end in itertools.pairwise(times)],
        "first_loss": first_loss,
        "peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mb(),
        "precision": "bf16" if bf16 else "fp32",
        "threads": torch.get_num_threads(),
    }


SIDES = {"ours": train_ours, "peer": train_peer}


# The comparison


def in_process(side: str, task: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Run one side in a fresh process, our feature cache empty."""
    cache = Path(tempfile.mkdtemp(prefix="cache-", dir=folder))
    (cache / "parts").symlink_to(parts_folder(), target_is_directory=True)
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    log = folder / f"{side}-{task}.log"
    command = [sys.executable, __file__, *arguments, "--side", side, "--task", task, "--work", str(folder)]
    environment = {**os.environ, "MMGPT_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w", encoding="utf-8") as output:
        done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode or not result.is_file():
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
        raise SystemExit(f"{side}, {task}: exit code {done.returncode}\n{tail}")
    return json.loads(result.read_text(encoding="utf-8"))


def parts_folder() -> Path:
    from mmgpt.artifacts import cache_dir

    parts = (cache_dir() / "parts").absolute()
    parts.mkdir(parents=True, exist_ok=True)
    return parts


def compare(task: str, samples: int, folder: Path, arguments: list[str], rounds: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(rounds):
        for side in SIDES:
            result = in_process(side, task, folder, arguments)
            found[side].append(result)
            speeds = ", ".join(f"{samples / seconds:.2f}" for seconds in result["epochs"])
            memory = result["peak_memory_mb"]
            print(f"{task}, round {turn}: {side} {speeds} samples/s by epoch, peak {memory:.0f} MB", file=sys.stderr, flush=True)
        ours, peer = (found[side][-1]["first_loss"] for side in SIDES)
        if abs(ours - peer) > TOLERANCE * abs(peer):
            raise SystemExit(f"{task}: the first samples' loss is {ours:.6f}, the peer's {peer:.6f}: not the same model or data")
    report: dict[str, Any] = {}
    for name, chosen in (("first_epoch", slice(0, 1)), ("later_epochs", slice(1, None))):
        speed = {
            side: max(samples * len(r["epochs"][chosen]) / sum(r["epochs"][chosen]) for r in results)
            for side, results in found.items()
            if results[0]["epochs"][chosen]
        }
        if speed:
            report[name] = with_ratio(speed, 3)
    report["peak_memory_mb"] = with_ratio({side: min(r["peak_memory_mb"] for r in results) for side, results in found.items()}, 1)
    report["first_loss"] = {side: round(results[-1]["first_loss"], 6) for side, results in found.items()}
    report |= {name: found["ours"][0][name] for name in ("precision", "threads")}
    return report


def with_ratio(values: dict[str, float], digits: int) -> dict[str, float]:
    return {side: round(value, digits) for side, value in values.items()} | {"ratio": round(values["ours"] / values["peer"], 2)}


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", default="align,instruct", help="of align, instruct, lora")
    parser.add_argument("--data", help="parquet file of photographs and captions; default: the fruit photographs")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--batching", choices=("grouped", "packed"), default="grouped", help="of our side")
    parser.add_argument("--row_length", type=int, help="tokens of a packed row")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters of the task lora")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of both sides")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="of both sides; peak memory is then the GPU's")
    parser.add_argument("--threads", type=int, help="of both sides; default: the physical cores")
    parser.add_argument("--side", choices=(*SIDES, "prepare"), help=argparse.SUPPRESS)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.tasks.split(",")) - set(RATES):
        parser.error(f"--tasks: there is no {', '.join(sorted(unknown))}; there are {', '.join(RATES)}")
    return options, sys.argv[1:]


def main() -> None:
    options, arguments = parse()
    if options.side:
        if options.side == "prepare":
            result = prepare(options, options.work)
        else:
            result = SIDES[options.side](options, options.task, options.work)
        (options.work / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return
    if options.data:
        arguments = [*arguments, "--data", str(Path(options.data).resolve())]
    with tempfile.TemporaryDirectory(prefix="mmgpt-training-") as temporary:
        folder = Path(temporary)
        shared = in_process("prepare", "align", folder, arguments)
        print(f"{shared['samples']} samples of {shared['tokens_per_sample']} tokens", file=sys.stderr, flush=True)
        report = {
            task: {**compare(task, shared["samples"], folder, arguments, options.rounds), **shared}
            for task in options.tasks.split(",")
        }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
