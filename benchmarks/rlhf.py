"""What the three steps reach on the task whose best reward is known to be 1 (`mmgpt/data/letters.py`), from scratch on a CPU.

    python benchmarks/rlhf.py stability [--seeds 10] [--target 0.9]    how many of several seeds reach the target
    python benchmarks/rlhf.py policies                                 supervised, best of n, DPO and PPO side by side
    python benchmarks/rlhf.py ptx                                      what PPO does to other text, without and with the mix

Runs go to --folder, and one that stands there already is taken as it is; without it they go nowhere that stays. Rewards are those
of answers drawn to the prompts that were learnt from and to held-out ones, not what a reward model says of them.

stability  every seed makes its own supervised model, reward model and policy. Published: 7 of 10 of a public trainer (TRL #417).
policies   KL to the supervised model in nats an answer (of best of n, log n - (n - 1) / n at most); win rate against its answers
           by a judge that learnt from other rankings with another seed.
ptx        the supervised model also reads this project's own pages; loss per token on pages that it never saw.

One JSON object on stdout; progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmgpt.data.letters import letter_prompts, letter_reward
from mmgpt.data.messages import Message, user
from mmgpt.data.packing import collate
from mmgpt.loop.metrics import read_metrics
from mmgpt.model.heads import RewardModel
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.rl.rollout import Rollout, draw, replay

ANSWERS = 32
"""Drawn to every prompt."""
DOCS = Path(__file__).parent.parent / "docs"


def run(config: str, folder: Path, seed: int = 0, *more: str) -> Path:
    """One training run, unless its model is there."""
    if not (folder / "model" / "config.json").is_file():
        arguments = ["--config", config, "--run_dir", str(folder), "--trainer.seed", str(seed), "--overwrite", "true"]
        arguments += ["--trainer.progress", "false", "--evaluate.generate", "0", *more]
        done = subprocess.run([sys.executable, "-m", "mmgpt.train", *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{config} with seed {seed} failed:\n{done.stderr[-2000:]}")
    say(f"{folder.name} done")
    return folder


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def policy_run(folder: Path, seed: int, supervised: Path, reward: Path, *more: str) -> Path:
    """PPO from a supervised model against a reward model."""
    learned = {"class_path": "mmgpt.rl.rewards.LearnedReward", "init_args": {"path": str(reward), "batch_size": 256}}
    terms = json.dumps([learned, {"class_path": "mmgpt.data.letters.LetterReward", "weight": 0.0}])
    parts = ["--first", "[]", "--model.init_from", str(supervised), "--ppo.value_from", str(reward), "--ppo.rewards", terms]
    return run("rlhf-nano", folder, seed, *parts, *more)


def prompts_of(split: str) -> list[list[Message]]:
    return [[user(f"say {letter} {count}")] for letter, count in letter_prompts(split)]


def answers_of(model: MultimodalGPT, split: str, seed: int = 0) -> Rollout:
    return draw(model, prompts_of(split), samples=ANSWERS, max_new_tokens=12, seed=seed, batch_size=256)


def worth(prompts: Sequence[list[Message]], texts: Sequence[str]) -> float:
    """Mean reward that the task pays."""
    return sum(letter_reward(prompt, text) for prompt, text in zip(prompts, texts)) / len(texts)


def load(folder: Path) -> MultimodalGPT:
    return MultimodalGPT.from_pretrained(folder)


def stability(folder: Path, seeds: int, target: float) -> dict[str, Any]:
    """All three steps with each seed."""
    rows = []
    for seed in range(seeds):
        supervised = run("nano/letters", folder / f"{seed}-letters", seed)
        reward = run("nano/reward", folder / f"{seed}-reward", seed)
        policy = policy_run(folder / f"{seed}-ppo", seed, supervised, reward)
        series = read_metrics(policy / "metrics.csv")
        worths = {name: worth(r.prompts, r.texts) for name, r in _rollouts(supervised, policy).items()}
        rows.append(
            {
                "seed": seed,
                "reward_model_accuracy": round(read_metrics(reward / "metrics.csv")["val/accuracy"][-1][1], 4),
                **{name: round(value, 4) for name, value in worths.items()},
                "kl": round(series["val/kl"][-1][1], 3),
                "largest_ratio_deviation": max(value for _, value in series["train/ratio_deviation"]),
            }
        )
        say(json.dumps(rows[-1]))
    reached = {name: sum(row[name] >= target for row in rows) for name in ("after", "after_held_out")}
    return {
        "target": target,
        "seeds": seeds,
        "reached": reached["after"],
        "reached_on_held_out": reached["after_held_out"],
        "runs": rows,
    }


def _rollouts(supervised: Path, policy: Path) -> dict[str, Rollout]:
    after = load(policy)
    return {
        "before": answers_of(load(supervised), "train"),
        "after": answers_of(after, "train"),
        "after_held_out": answers_of(after, "val"),
    }


def policies(folder: Path) -> dict[str, Any]:
    """One table: what each way of using preferences gains, and what it costs in KL."""
    supervised = run("nano/letters", folder / "0-letters")
    reward = run("nano/reward", folder / "0-reward")
    judge_run = run("nano/reward", folder / "judge", 1, "--data.train", "[{path: letters, limit: 3000}]", "--data.holdout", "0.1")
    dpo = run("nano/preference", folder / "0-dpo", 0, "--first", "[]", "--model.init_from", str(supervised))
    ppo = policy_run(folder / "0-ppo", 0, supervised, reward)
    scorer, judge = RewardModel.from_pretrained(reward), RewardModel.from_pretrained(judge_run)
    reference = load(supervised)
    base = answers_of(reference, "val", seed=1)
    base_scores = judge.score(base.prompts, base.texts, batch_size=256)

    def row(prompts: Sequence[list[Message]], texts: Sequence[str], kl: float) -> dict[str, float]:
        scores = judge.score(prompts, texts, batch_size=256)
        other = base_scores.view(-1, ANSWERS)[:, : len(texts) // (len(base) // ANSWERS)].flatten()
        wins = (scores > other).float().mean() + 0.5 * (scores == other).float().mean()
        learned = scorer.score(prompts, texts, batch_size=256)
        return {
            "reward": round(worth(prompts, texts), 4),
            "reward_model": round(float(learned.mean()), 3),
            "kl": round(kl, 3),
            "win_rate": round(float(wins), 4),
        }

    table = {}
    for name, path in (("supervised", supervised), ("dpo", dpo), ("ppo", ppo)):
        model = load(path)
        answers = answers_of(model, "val")
        table[name] = row(answers.prompts, answers.texts, divergence(model, reference, answers))
    drawn = answers_of(reference, "val")
    scores = scorer.score(drawn.prompts, drawn.texts, batch_size=256)
    for n in (4, 16):
        groups = range(0, len(drawn), n)
        best = [start + int(scores[start : start + n].argmax()) for start in groups]
        kl = math.log(n) - (n - 1) / n  # an upper bound (Beirami et al. 2024)
        table[f"best of {n}"] = row([drawn.prompts[place] for place in best], [drawn.texts[place] for place in best], kl)
    return {"held_out_prompts": len(prompts_of("val")), "answers": ANSWERS, "table": table}


@torch.no_grad()
def divergence(model: MultimodalGPT, reference: MultimodalGPT, answers: Rollout) -> float:
    """Mean KL of answers, in nats an answer."""
    batch, places = answers.minibatch(range(len(answers)), model.tokenizer.pad_id)
    batch.images = None
    own, other = (replay(each, batch, places, answers.tokens, answers.mask).log_probs for each in (model, reference))
    return float((own - other).sum() / len(answers))


def ptx(folder: Path, coefficient: float) -> dict[str, Any]:
    """Reward, and loss on pages that were never seen, of the supervised model and of policies with and without the mix."""
    pieces = [text[start : start + 100] for text in _pages() for start in range(0, len(text) - 100, 100)]
    seen, unseen = [p for n, p in enumerate(pieces) if n % 5], pieces[::5]
    book = folder / "pages.jsonl"
    book.write_text("".join(json.dumps({"messages": _page(piece)}) + "\n" for piece in seen), encoding="utf-8")
    both = json.dumps([{"path": "letters", "split": "train", "limit": 2048}, {"path": str(book)}])
    supervised = run("nano/letters", folder / "pages-letters", 0, "--data.train", both, "--data.max_length", "128")
    reward = run("nano/reward", folder / "0-reward")
    result: dict[str, Any] = {"coefficient": coefficient, "supervised": _both(supervised, unseen)}
    for gamma in (0.0, coefficient):
        mix = json.dumps(
            {"sources": [{"path": str(book)}] if gamma else [], "coefficient": gamma, "batch_size": 48, "length": 128}
        )
        result[f"ppo, gamma {gamma:g}"] = _both(
            policy_run(folder / f"pages-ppo-{gamma:g}", 0, supervised, reward, "--ppo.ptx", mix), unseen
        )
    losses = [part["loss_on_pages"] for part in result.values() if isinstance(part, dict)]
    return {**result, "rise_without": round(losses[1] - losses[0], 4), "rise_with": round(losses[2] - losses[0], 4)}


def _pages() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))]


def _page(piece: str) -> list[Message]:
    return [user("read"), {"role": "assistant", "content": [{"type": "text", "text": piece}]}]


@torch.no_grad()
def _both(folder: Path, pieces: Sequence[str]) -> dict[str, float]:
    model = load(folder)
    total, count = 0.0, 0
    for start in range(0, len(pieces), 64):
        batch = collate([[model.encode(_page(piece))] for piece in pieces[start : start + 64]], model.tokenizer.pad_id)
        batch.images = None
        found = model.loss(batch)
        total, count = total + float(found.loss), count + found.count
    answers = answers_of(model, "val")
    return {"reward": round(worth(answers.prompts, answers.texts), 4), "loss_on_pages": round(total / count, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stability", "policies", "ptx"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--coefficient", type=float, default=1.0, help="of the mix")
    parser.add_argument("--folder", type=Path, help="where the runs go, to be taken up again")
    settings = parser.parse_args()
    measures: dict[str, Callable[[Path], dict[str, Any]]] = {
        "stability": lambda folder: stability(folder, settings.seeds, settings.target),
        "policies": policies,
        "ptx": lambda folder: ptx(folder, settings.coefficient),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = settings.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measures[settings.what](folder), indent=1))


if __name__ == "__main__":
    main()
