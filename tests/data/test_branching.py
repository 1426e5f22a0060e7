"""Answers that share their prompt: the same hidden states as one row an answer, and nothing seen of each other."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_models import noise, tiny_model

from mmgpt.config import DataConfig
from mmgpt.data.branching import PreferenceLoader, branch_mask, collate_answers
from mmgpt.data.features import ImageSource
from mmgpt.data.messages import normalize
from mmgpt.data.ranked import Preference, RankedItem, rank_item
from mmgpt.data.rejections import RejectionReport
from mmgpt.model.multimodal import MultimodalGPT

FAMILIES = ["llama", "gpt2", "qwen2", "gpt_neox"]


def ranked(model: MultimodalGPT, text: str, answers: list[str], *images: object, pairs=((0, 1),)) -> RankedItem:
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    prompt = normalize([{"role": "user", "content": parts}])
    compared = len(answers) * (len(answers) - 1) // 2
    item = rank_item(Preference(prompt, answers, list(pairs), compared, text), model.encode, 400)
    assert isinstance(item, RankedItem)
    return item


def ends(model: MultimodalGPT, batch) -> torch.Tensor:
    batch.images = model.pixels(batch.images) if batch.images else None
    with torch.inference_mode():
        return model.hidden(batch)[batch.rows, batch.columns]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prompts_give_the_hidden_states_of_one_row_an_answer(family):
    model = tiny_model(family)
    items = [
        ranked(model, "first question", ["yes", "no", "yesterday", "y"], noise(1), noise(2)),
        ranked(model, "second", ["a long answer it is", "b"], noise(3)),
        ranked(model, "third", ["b", "a long answer it is", "bb"]),
    ]
    pad = model.tokenizer.pad_id
    alone = [ends(model, collate_answers([[item]], pad, share=False)) for item in items]
    shared = ends(model, collate_answers([items[:2], items[2:]], pad))
    assert torch.allclose(shared, torch.cat(alone), atol=1e-5)
    assert (shared - shared[0]).abs().amax(-1)[1:].min() > 1e-3


def test_a_prompt_and_its_images_stand_once():
    model = tiny_model()
    item = ranked(model, "question", ["yes", "no", "maybe"], noise(1))
    shared, copied = (collate_answers([[item]], 0, share=share) for share in (True, False))
    assert len(shared.images) == 1 and len(copied.images) == 3
    assert shared.tokens == len(item) == len(item.shared) + sum(item.lengths)
    assert copied.tokens == 3 * len(item.shared) + sum(item.lengths)
    assert shared.rows.tolist() == [0, 0, 0]
    assert shared.input_ids[shared.rows, shared.columns].tolist() == [model.tokenizer.eos_id] * 3


def test_who_sees_whom():
    """A prompt of two tokens, answers of one and two, then another prompt, then padding."""
    segments, parents = torch.tensor([[1, 1, 2, 3, 3, 4, 0]]), torch.tensor([[0, 0, 1, 1, 1, 0, 0]])
    seen = branch_mask(segments, parents)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]


def test_pairs_point_at_the_answers_of_their_prompt():
    model = tiny_model(vision=False)
    items = [ranked(model, "p", ["a", "b"], pairs=[(1, 0)]), ranked(model, "q", ["c", "d", "e"], pairs=[(0, 2), (2, 1)])]
    batch = collate_answers([items], 0, prompts=8)
    assert batch.better.tolist() == [1, 2, 4] and batch.worse.tolist() == [0, 4, 3]
    assert torch.allclose(batch.weights, torch.tensor([1, 1 / 3, 1 / 3]))
    assert batch.owners.tolist() == [0, 0, 1, 1, 1]
    assert (batch.samples, batch.target_count) == (2, 8)
    assert batch.to(torch.device("cpu")).lengths.tolist() == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("share", [True, False])
def test_the_loader_gives_every_prompt_once_and_resumes(share):
    model = tiny_model(vision=False)
    rng = random.Random(0)
    items = [ranked(model, f"question {i}" * rng.randint(1, 9), ["yes" * rng.randint(1, 9), "no"]) for i in range(11)]

    def load() -> PreferenceLoader:
        settings = DataConfig(batch_size=4, max_length=200)
        return PreferenceLoader(
            items, settings, pad_id=0, images=None, report=RejectionReport(None), seed=0, share=share, accumulate=2
        )

    first = list(load())
    assert sorted(name for batch in first for name in batch.where) == sorted(item.preference.where for item in items)
    assert [batch.target_count for batch in first] == [8, 8, 3]
    resumed = load()
    resumed.load_state_dict({"epoch": 0, "position": 1})
    for ours, theirs in zip(resumed, first[1:], strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.better, theirs.better)


def test_a_broken_picture_costs_its_prompt(tmp_path):
    model = tiny_model()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    items = [ranked(model, "good", ["a", "b"], noise(1)), ranked(model, "bad", ["a", "b"], tmp_path / "broken.png")]
    report = RejectionReport(None)
    images = ImageSource(model.vision, None, frozen=True)
    settings = DataConfig(batch_size=1, max_length=200, max_bad=0.5)
    batches = list(PreferenceLoader(items, settings, pad_id=0, images=images, report=report, seed=0))
    assert sorted(batch.samples for batch in batches) == [0, 1] and len(report) == 1
    blank = next(batch for batch in batches if not batch.samples)
    assert len(blank.rows) == 0 and blank.input_ids.shape == (1, 1)
