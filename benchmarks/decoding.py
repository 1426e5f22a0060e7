"""Decoding against `transformers.generate`: speed at batch 1 and 16, and whether the text is the same.

    python benchmarks/decoding.py [--formats fp32,bf16] [--tokens 128] [--prompts 100] [--rounds 3]

Same weights, same prompts, same process; the two take turns (A B A B), and the best round of each counts, so that other
work on the machine disturbs both alike. transformers runs in fp32 beside fp32 and fp16, and in bf16 beside bf16 and int8.
One JSON object on stdout; progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import torch

from mmgpt.artifacts import resolve
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.generate import Sampling, generate
from mmgpt.machine import has_bf16, set_threads
from mmgpt.model.decoder import Decoder, LlamaDecoder

TOPICS = """the sea|bread|a bicycle|the moon|a compiler|Rome|gravity|a pear|the violin|winter|chess|a bridge|coffee|the heart|
paper|a volcano|maps|the printing press|honey|rain""".replace("\n", "").split("|")
REQUESTS = [
    "Tell me something surprising about {}.",
    "Write two sentences for a child about {}.",
    "Why does {} matter to people?",
    "List three facts about {}.",
    "Write the first lines of a story in which {} plays a part.",
]


class TextModel:
    """A language model without images, in the form `generate` takes."""

    def __init__(self, language: Any, tokenizer: Tokenizer):
        self.language, self.tokenizer = language, tokenizer

    def prompt(self, messages: str) -> tuple[torch.Tensor, list[Any]]:
        control, encode = self.tokenizer.control, self.tokenizer.encode
        ids = [control("<|im_start|>"), *encode(f"user\n{messages}"), control("<|im_end|>"), *encode("\n")]
        return torch.tensor([*ids, control("<|im_start|>"), *encode("assistant\n")]), []

    def embed_prompts(self, conversations: Any) -> list[torch.Tensor]:
        return [self.language.get_input_embeddings()(self.prompt(messages)[0]) for messages in conversations]

    def peer(self, prompt: str, tokens: int, *, fixed: bool) -> list[int]:
        """Greedy ids of `transformers.generate`; `fixed` goes on past the end token."""
        ids = self.prompt(prompt)[0][None]
        output = self.language.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens if fixed else None,
            do_sample=False,
            eos_token_id=self.tokenizer.eos_id,
            pad_token_id=self.tokenizer.pad_id,
        )
        return [token for token in output[0, ids.shape[1] :].tolist() if token != self.tokenizer.eos_id]


def timed_steps(model: TextModel, decoder: Decoder, prompts: list[str], tokens: int) -> float:
    """Tokens a second of all rows together, reading the prompts included; greedy, no stop at the end token."""
    embedded = model.embed_prompts(prompts)
    start = time.perf_counter()
    lengths = torch.tensor([len(prompt) for prompt in embedded])
    embeds = embedded[0].new_zeros(len(prompts), int(lengths.max()), embedded[0].shape[1])
    for row, prompt in zip(embeds, embedded):
        row[len(row) - len(prompt) :] = prompt
    logits, cache = decoder.prefill(embeds, lengths, reserve=tokens)
    for _ in range(tokens - 1):
        logits = decoder.step(logits.argmax(-1), cache)
    logits.argmax(-1).tolist()
    return len(prompts) * tokens / (time.perf_counter() - start)


def speed(
    peers: dict[str, TextModel], decoders: dict[str, Decoder], prompts: list[str], tokens: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second by format, the best of `rounds` turns; `peers` hold the weights in transformers' own formats."""
    theirs: dict[str, list[float]] = {name: [] for name in peers}
    ours: dict[str, dict[int, list[float]]] = {name: {1: [], len(prompts): []} for name in decoders}
    for turn in range(rounds + 1):  # the first turn warms up
        for name, peer in peers.items():
            start = time.perf_counter()
            peer.peer(prompts[0], tokens, fixed=True)
            theirs[name].append(tokens / (time.perf_counter() - start))
        for name, decoder in decoders.items():
            for rows, speeds in ours[name].items():
                speeds.append(timed_steps(peers["fp32"], decoder, prompts[:rows], tokens))
        last = {f"transformers {name}": values[-1] for name, values in theirs.items()}
        last |= {f"{name}, batch {rows}": values[-1] for name, by_rows in ours.items() for rows, values in by_rows.items()}
        print(f"turn {turn}, tokens/s:", {name: round(value, 1) for name, value in last.items()}, file=sys.stderr)
    report = {}
    for name, by_rows in ours.items():
        one, many = (max(values[1:]) for values in by_rows.values())
        kind = peer_format(name)
        best = max(theirs[kind][1:])
        report[name] = {
            "ours": round(one, 1),
            "peer": round(best, 1),
            "peer_weights": kind,
            "ratio": round(one / best, 2),
            f"batch{len(prompts)}": round(many, 1),
            f"batch{len(prompts)}_over_batch1": round(many / one, 2),
        }
    return report


def peer_format(name: str) -> str:
    """The number format that transformers is measured in beside one of ours."""
    return "bf16" if name in ("bf16", "int8") else "fp32"


def top1(decoder: LlamaDecoder, model: TextModel, prompt: str, answer: list[int]) -> list[int]:
    """The likeliest next token at each position of an answer, every earlier token given."""
    embeds = model.embed_prompts([prompt])[0][None]
    logits, cache = decoder.prefill(embeds, torch.tensor([embeds.shape[1]]), reserve=len(answer))
    chosen = [int(logits.argmax())]
    for token in answer[:-1]:
        chosen.append(int(decoder.step(torch.tensor([token]), cache).argmax()))
    return chosen


def agreement(model: TextModel, decoders: dict[str, Any], prompts: list[str], tokens: int) -> dict[str, Any]:
    answers = [model.peer(prompt, tokens, fixed=False) for prompt in prompts]
    report: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(map(len, answers))}
    for batch_size in (1, 16):
        ours = generate(model, prompts, Sampling(tokens), batch_size, decoders["fp32"])
        same = sum(answer.token_ids == theirs for answer, theirs in zip(ours, answers))
        report[f"fp32_same_text_batch{batch_size}"] = same
        print(f"fp32, batch {batch_size}: {same} of {len(prompts)} texts equal", file=sys.stderr)
    read = [(prompt, answer) for prompt, answer in zip(prompts, answers) if answer]
    for name, decoder in decoders.items():
        if name != "fp32":
            # The likeliest tokens of transformers in fp32 are its greedy answer itself.
            pairs = [pair for prompt, answer in read for pair in zip(top1(decoder, model, prompt, answer), answer)]
            report[f"{name}_top1"] = round(sum(a == b for a, b in pairs) / len(pairs), 4)
            print(f"{name}: {report[f'{name}_top1']:.2%} of {len(pairs)} tokens as in fp32", file=sys.stderr)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    formats = "fp32,bf16,int8" if has_bf16(torch.device("cpu")) else "fp32,fp16"
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a named part or a directory")
    parser.add_argument("--formats", default=formats, help="weight formats, separated by commas; fp32 is always measured")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens a prompt")
    parser.add_argument("--prompts", type=int, default=100, help="prompts whose text is compared; 0 skips it")
    parser.add_argument("--agree_tokens", type=int, default=64, help="new tokens of a compared text")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns; 0 skips them")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    set_threads()
    from transformers import AutoModelForCausalLM

    folder = resolve(options.model)
    language = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = TextModel(language, Tokenizer.load(folder))
    prompts = [request.format(topic) for topic in TOPICS for request in REQUESTS]
    names = dict.fromkeys(["fp32", *options.formats.split(",")])
    decoders = {name: Decoder.from_language(language, name) for name in names}  # type: ignore[arg-type]
    peers = {"fp32": model}
    if any(peer_format(name) == "bf16" for name in names):
        peers["bf16"] = TextModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), model.tokenizer)
    report: dict[str, Any] = {"threads": torch.get_num_threads()}
    with torch.inference_mode():
        if options.rounds:
            report["tokens_per_second"] = speed(peers, decoders, prompts[: options.batch], options.tokens, options.rounds)
        if options.prompts:
            report["agreement"] = agreement(model, decoders, prompts[: options.prompts], options.agree_tokens)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
