"""A step of the reward model on all pairs of a prompt at once, against the same pairs one by one.

    python benchmarks/reward.py [--answers 4] [--prompts 1] [--rounds 3] [--model smollm2-135m-instruct]

Both sides take one optimizer step's gradient from the same prompts and the same ranked answers, on the same weights.
`ours`: a prompt stands once, its K answers look back at it (`mmgpt/data/branching.py`). `rows`: each answer in a row of its own
with a copy of the prompt. `pairs`: every one of the K (K - 1) / 2 pairs as two rows, as a trainer of chosen and rejected has
them. They take turns, and the best round counts. Before it starts, the losses of all three must be equal.
One JSON object on stdout; progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

import torch

from mmgpt import machine
from mmgpt.config import LanguageConfig, ModelConfig
from mmgpt.data.branching import PreferenceBatch, collate_answers
from mmgpt.data.messages import user
from mmgpt.data.ranked import Preference, RankedItem, rank_item, ranked_pairs
from mmgpt.model.heads import RewardModel
from mmgpt.model.multimodal import MultimodalGPT
from mmgpt.rl.losses import reward_loss

WORDS = "the a cat dog house tree river stone walks sings under over near small green old quickly seldom and but"


def make_preferences(prompts: int, answers: int, prompt_words: int, answer_words: int) -> list[Preference]:
    """Prompts and ranked answers of random words, each of its own length."""
    rng = random.Random(0)

    def words(about: int) -> str:
        return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(about // 2, about * 3 // 2)))

    return [
        Preference(
            [user(words(prompt_words))],
            [f"{number} {words(answer_words)}" for number in range(answers)],
            ranked_pairs(range(answers)),
            answers * (answers - 1) // 2,
            f"prompt {place}",
        )
        for place in range(prompts)
    ]


def as_pairs(item: RankedItem, model: MultimodalGPT) -> list[RankedItem]:
    """Every pair of a ranking as a prompt of its own, weighing as much as it does in the whole."""
    preference = item.preference
    found = []
    for better, worse in preference.pairs:
        sides = [preference.answers[better], preference.answers[worse]]
        pair = rank_item(Preference(preference.prompt, sides, [(0, 1)], preference.compared, "pair"), model.encode, model.context)
        assert isinstance(pair, RankedItem)
        found.append(pair)
    return found


def step(model: RewardModel, batch: PreferenceBatch, prompts: int) -> float:
    """Gradients of the loss of a batch; returns the loss."""
    model.zero_grad()
    loss = reward_loss(model(batch), batch.better, batch.worse, batch.weights, prompts)
    loss.backward()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="language model: a named part or a folder")
    parser.add_argument("--answers", type=int, default=4, help="K, answers to a prompt")
    parser.add_argument("--prompts", type=int, default=1, help="prompts of a step")
    parser.add_argument("--prompt_words", type=int, default=60, help="mean words of a prompt")
    parser.add_argument("--answer_words", type=int, default=30, help="mean words of an answer")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each side")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default the physical cores")
    options = parser.parse_args()
    machine.set_threads(options.threads)
    torch.manual_seed(0)
    model = MultimodalGPT.from_config(ModelConfig(vision=None, language=LanguageConfig(name=options.model)))
    reward = RewardModel(model).eval()
    preferences = make_preferences(options.prompts, options.answers, options.prompt_words, options.answer_words)
    items: list[Any] = [rank_item(preference, model.encode, model.context) for preference in preferences]
    pad = model.tokenizer.pad_id
    sides = {
        "ours": collate_answers([[item] for item in items], pad),
        "rows": collate_answers([items], pad, share=False),
        "pairs": collate_answers([[pair for item in items for pair in as_pairs(item, model)]], pad, share=False),
    }
    for batch in sides.values():
        batch.images = None
    losses = {name: step(reward, batch, options.prompts) for name, batch in sides.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-4, losses
    best = dict.fromkeys(sides, float("inf"))
    for number in range(options.rounds):
        for name, batch in sides.items():
            started = time.perf_counter()
            step(reward, batch, options.prompts)
            best[name] = min(best[name], time.perf_counter() - started)
        print(f"round {number + 1}: {best}", file=sys.stderr, flush=True)
    result = {
        "seconds_per_step": {name: round(seconds, 4) for name, seconds in best.items()},
        "ratio": {"pairs": round(best["pairs"] / best["ours"], 3), "rows": round(best["rows"] / best["ours"], 3)},
        "tokens": {name: batch.tokens for name, batch in sides.items()},
        "loss": losses["ours"],
        "answers": options.answers,
        "prompts": options.prompts,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
