"""An iteration of PPO against TRL's: answers drawn, judged, read again, learnt from.

    python benchmarks/ppo.py [--tasks full,lora] [--rounds 2] [--iterations 2] [--batch_size 32] [--new_tokens 48] [--threads 2]

Both sides have the same language model (SmolLM2-135M-Instruct), the same prompts (AlpacaEval's instructions of up to 64 tokens),
a reward model of the same size with a new head, one pass over the answers in minibatches of half the batch, sampling at
temperature 0.7, bf16 where the CPU has it, and no gradient checkpointing. `full` learns every weight of the policy and of a
value network that begins as the reward model, beside a copied reference. `lora` learns adapters (rank 16, all linear layers),
which turned off are the reference; ours then has its values from a head on the policy's states, where TRL always has a second
network.

The peer is trl 1.12.0, the last release with `trl.experimental.ppo`, in a virtual environment of its own, made at the first
start. The sides take turns, a process each (both at once need more than 24 GB); of a process's iterations the first warms up.
One JSON object on stdout: seconds of the best and the median iteration, answers a second, peak memory, and the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import Answers, Side, environment, peak_memory_mb

REPOSITORY = Path(__file__).resolve().parents[1]
PEER = ("trl==1.12.0", "torch", "transformers", "peft", "accelerate")
MODEL, PROMPTS = "smollm2-135m-instruct", "alpaca-eval-prompts"
LONGEST_PROMPT = 64
TEMPERATURE = 0.7


# A side's own process


class Turns:
    """Says when an iteration may begin, and how long it took."""

    def __init__(self) -> None:
        self.answers = Answers()
        self.requests = self.answers.requests()
        self.started = 0.0

    def wait(self) -> None:
        """Ready: until the next iteration is asked for."""
        self.answers.give("ready")
        if next(self.requests, None) is None:
            os._exit(0)
        self.started = time.perf_counter()

    def done(self, tokens: float) -> None:
        seconds = time.perf_counter() - self.started
        self.answers.give({"seconds": seconds, "tokens": tokens, "peak_memory_mb": peak_memory_mb()})


def ours(task: dict[str, Any]) -> None:
    sys.path.insert(0, str(REPOSITORY))
    import lightning as L

    from mmgpt.run_ppo import PpoRun
    from mmgpt.train import _quiet, parse

    turns = Turns()

    class Clock(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            turns.wait()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            turns.done(float(trainer.callback_metrics["train/length"]))

    class Timed(PpoRun):
        def _callbacks(self, validation: list[Any]) -> list[L.Callback]:
            return [*super()._callbacks(validation), Clock()]

    _quiet()
    full = task["name"] == "full"
    rewards = [{"class_path": "mmgpt.rl.rewards.LearnedReward", "init_args": {"path": task["reward"], "batch_size": 32}}]
    settings = {
        "run_dir": task["folder"],
        "first": "[]",
        "data.train": json.dumps([{"path": task["prompts"]}]),
        "data.holdout": 0,
        "model.language.lora.rank": 0 if full else 16,
        "optimizer.lr.language": 1e-6 if full else 1e-4,
        "ppo.iterations": 1000,
        "ppo.evaluate_every": 1000,
        "ppo.batch_size": task["batch_size"],
        "ppo.minibatch_size": task["batch_size"] // 2,
        "ppo.max_new_tokens": task["new_tokens"],
        "ppo.temperature": TEMPERATURE,
        "ppo.rewards": json.dumps(rewards),
        "ppo.value_from": task["reward"] if full else "null",
        "ppo.ema": 0.0 if full else 0.95,
        "ppo.ptx.sources": "[]",
        "ppo.no_eos_score": -1.0,
        "ppo.max_kl": 1e6,
        "trainer.progress": "false",
        "trainer.threads": task["threads"],
        "evaluate.batch_size": task["batch_size"],
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    Timed(parse(["--config", "rlhf-text", *arguments])).execute()


def trl(task: dict[str, Any]) -> None:
    turns = Turns()
    import torch
    from datasets import Dataset  # type: ignore[import-untyped]
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # type: ignore[import-not-found]

    torch.set_num_threads(task["threads"])
    full = task["name"] == "full"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(task["model"], "tokenizer.json")),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    # What does not learn is kept in bf16, as ours is.
    kept = torch.bfloat16 if task["bf16"] else torch.float32
    policy = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32 if full else kept)

    def judge(dtype: torch.dtype) -> Any:
        found = AutoModelForSequenceClassification.from_pretrained(task["model"], num_labels=1, dtype=dtype)
        found.config.pad_token_id = tokenizer.pad_token_id
        return found

    class Clock(TrainerCallback):
        def on_train_begin(self, *parts: Any, **more: Any) -> None:
            turns.wait()

        def on_step_end(self, *parts: Any, **more: Any) -> None:
            turns.done(float("nan"))
            turns.wait()

    rows = [{"input_ids": ids} for ids in task["ids"]]
    config = PPOConfig(
        output_dir=task["folder"],
        per_device_train_batch_size=task["batch_size"] // 2,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=1,
        total_episodes=task["batch_size"] * 1000,
        local_rollout_forward_batch_size=task["batch_size"],
        response_length=task["new_tokens"],
        stop_token="eos",
        missing_eos_penalty=1.0,
        temperature=TEMPERATURE,
        learning_rate=1e-6 if full else 1e-4,
        gradient_checkpointing=False,
        bf16=task["bf16"],
        use_cpu=True,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=judge(kept),
        value_model=judge(torch.float32),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        peft_config=None if full else LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()


# The measuring process


def begin(name: str, python: str, task: dict[str, Any], folder: Path) -> Side:
    """A side that waits for its first iteration."""
    own = f"{name}-{task['name']}"
    written = folder / f"{own}.json"
    written.write_text(json.dumps({**task, "folder": str(folder / own)}), encoding="utf-8")
    command = [python, str(Path(__file__).resolve()), "--serve", name, "--task", str(written)]
    return Side(name, command, task["threads"])


def iterate(side: Side) -> dict[str, float]:
    """One iteration; the side is ready for the next one then."""
    found: dict[str, float] = side.ask("go")
    side.answer()
    return found


def prepare(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What both sides are given."""
    import pyarrow.parquet as pq

    from mmgpt import artifacts, machine
    from mmgpt.config import LanguageConfig, ModelConfig
    from mmgpt.data.messages import user
    from mmgpt.model.heads import RewardModel
    from mmgpt.model.multimodal import MultimodalGPT

    model = MultimodalGPT.from_config(ModelConfig(vision=None, language=LanguageConfig(name=MODEL)))
    texts = [row["text"] for row in pq.read_table(artifacts.resolve(PROMPTS, kind="dataset")).to_pylist()]
    encoded = {text: model.prompt([user(text)])[0].tolist() for text in texts}
    chosen = [text for text in texts if len(encoded[text]) <= LONGEST_PROMPT]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in chosen), encoding="utf-8")
    RewardModel(model).save_pretrained(folder / "reward")
    return {
        "model": str(artifacts.resolve(MODEL, kind="language")),
        "reward": str(folder / "reward"),
        "prompts": str(path),
        "ids": [encoded[text] for text in chosen],
        "bf16": machine.pick_precision("auto", machine.pick_device("cpu")) == "bf16",
        "batch_size": settings.batch_size,
        "new_tokens": settings.new_tokens,
        "iterations": settings.iterations,
        "threads": settings.threads,
    }


def compare(task: dict[str, Any], pythons: dict[str, str], rounds: int, folder: Path) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for number in range(rounds):
        for name, python in pythons.items():
            side = begin(name, python, task, folder)
            for iteration in range(task["iterations"] + 1):
                row = iterate(side)
                print(f"{task['name']}, round {number}, {name}: {row}", file=sys.stderr, flush=True)
                if iteration:
                    found[name].append(row)
            side.close()
    report: dict[str, Any] = {}
    for name, rows in found.items():
        seconds = [row["seconds"] for row in rows]
        report[name] = {
            "seconds": {"best": round(min(seconds), 2), "median": round(statistics.median(seconds), 2)},
            "answers_per_second": round(task["batch_size"] / min(seconds), 2),
            "peak_memory_mb": round(max(row["peak_memory_mb"] for row in rows)),
        }
    if len(report) == 2:
        a, b = report["ours"], report["trl"]
        report["ratio"] = {
            "best": round(b["seconds"]["best"] / a["seconds"]["best"], 2),
            "median": round(b["seconds"]["median"] / a["seconds"]["median"], 2),
            "peak_memory": round(a["peak_memory_mb"] / b["peak_memory_mb"], 2),
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="full,lora")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--iterations", type=int, default=2, help="measured of each process")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=max(1, len(os.sched_getaffinity(0)) if sys.platform == "linux" else 2))
    parser.add_argument("--sides", default="ours,trl")
    parser.add_argument("--serve", choices=("ours", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.serve:
        {"ours": ours, "trl": trl}[settings.serve](json.loads(settings.task.read_text(encoding="utf-8")))
        return
    sys.path.insert(0, str(REPOSITORY))
    wanted = settings.sides.split(",")
    pythons = {name: sys.executable if name == "ours" else str(environment(*PEER)) for name in wanted}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = prepare(settings, folder)
        report = {task: compare({**given, "name": task}, pythons, settings.rounds, folder) for task in settings.tasks.split(",")}
    print(json.dumps({"batch_size": settings.batch_size, "new_tokens": settings.new_tokens, **report}, indent=1))


if __name__ == "__main__":
    main()
