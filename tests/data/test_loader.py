"""From samples to batches: what a resumed epoch, several ranks and broken pictures lead to."""

from pathlib import Path

import pytest
import torch
from tiny_models import VIT, noise, talk, tiny_model

from mmgpt.config import DataConfig, SourceConfig, VisionConfig
from mmgpt.data.features import ImageSource
from mmgpt.data.loader import BatchLoader, Item, load_items, make_item, split_holdout
from mmgpt.data.messages import Rejected, Sample, normalize
from mmgpt.data.rejections import RejectionReport
from mmgpt.data.template import encode, get_template
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.errors import UserError
from mmgpt.model.vision import load_vision

TOKENIZER = Tokenizer.bytes()


def render(messages):
    return encode(messages, TOKENIZER, get_template("chatml"), 16)


def item(number: int, image=None) -> Item:
    question = [f"q{number}"] if image is None else [image, f"q{number}"]
    sample = Sample(normalize(talk(question, "a" * (1 + number % 7))), f"data:{number}")
    return Item(sample, render(sample.messages))


def loader(items, report=None, images=None, **settings) -> BatchLoader:
    names = ("seed", "shuffle", "accumulate", "rank", "world")
    own = {name: settings.pop(name) for name in names if name in settings}
    config = DataConfig(**{"batch_size": 4, "max_length": 128, "row_length": 160, **settings})
    return BatchLoader(
        items,
        config,
        pad_id=TOKENIZER.pad_id,
        images=images,
        report=RejectionReport(None) if report is None else report,
        **{"seed": 0, **own},
    )


def same(a, b) -> bool:
    tensors = ("input_ids", "position_ids", "segment_ids", "targets")
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors)
    return equal and a.where == b.where and a.target_count == b.target_count


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return load_vision(VisionConfig(name="timm:vit_tiny_patch16_224", layer=-1, options=dict(VIT)))


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_epochs_hold_every_sample_once_in_another_order(batching):
    items = [item(i) for i in range(23)]
    batches = loader(items, batching=batching)
    epochs = [list(batches) for _ in range(3)]
    for epoch in epochs:
        assert sorted(where for batch in epoch for where in batch.where) == sorted(i.sample.where for i in items)
        assert len(epoch) == len(batches) == 6
    orders = [[where for batch in epoch for where in batch.where] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    fixed = loader(items, batching=batching, shuffle=False)
    assert all(same(a, b) for a, b in zip(list(fixed), list(fixed)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_gives_the_very_same_batches(encoder, workers):
    items = [item(i, noise(i) if i % 2 else None) for i in range(23)]
    images = ImageSource(encoder, None, frozen=False, augment=encoder.preprocess.augment)
    again = loader(items, images=images)
    expected = [*again, *again]
    for stop in (1, 4, 6) if workers == 0 else (4,):
        first = loader(items, images=images, workers=workers)
        seen = []
        for batch in first:
            seen.append(batch)
            if len(seen) == stop:
                break
        state = first.state_dict()
        resumed = loader(items, images=images, workers=workers)
        resumed.load_state_dict(state)
        while len(seen) < len(expected):
            seen += list(resumed)
        assert len(seen) == len(expected) == 12
        for a, b in zip(seen, expected):
            assert same(a, b) and a.images.keys == b.images.keys
            assert all(torch.equal(a.images.pixels[key], b.images.pixels[key]) for key in b.images.pixels)


def test_the_loader_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader([item(i) for i in range(9)]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world", [1, 2])
def test_batches_of_a_step_share_the_number_of_its_supervised_tokens(world):
    items = [item(i) for i in range(41)]
    ranks = [list(loader(items, accumulate=3, rank=rank, world=world)) for rank in range(world)]
    for start in range(0, len(ranks[0]), 3):
        step = [batch for rank in ranks for batch in rank[start : start + 3]]
        assert {batch.target_count for batch in step} == {sum(batch.supervised for batch in step)}
    assert len({batch.target_count for batch in ranks[0]}) > 1


def test_ranks_share_an_epoch_out():
    items = [item(i) for i in range(43)]
    single = list(loader(items))
    ranks = [list(loader(items, rank=rank, world=2)) for rank in range(2)]
    assert len(single) == 11 and [len(rank) for rank in ranks] == [5, 5]
    assert all(batch.where == single[2 * n + rank].where for rank in range(2) for n, batch in enumerate(ranks[rank]))
    validation = [list(loader(items, rank=rank, world=2, shuffle=False)) for rank in range(2)]
    assert sorted(w for rank in validation for batch in rank for w in batch.where) == sorted(i.sample.where for i in items)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_left_out_and_reported(tmp_path, encoder, workers):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    items = [item(i, noise(i)) for i in range(9)]
    items[4] = item(4, tmp_path / "bad.png")
    items[6] = item(6, tmp_path / "gone.png")
    report = RejectionReport(tmp_path / "bad_samples.jsonl")
    images = ImageSource(encoder, None, frozen=False)
    batches = loader(items, report, images, max_bad=0.5, workers=workers)
    epochs = [list(batches), list(batches)]
    for epoch in epochs:
        assert sorted(w for batch in epoch for w in batch.where) == sorted(f"data:{i}" for i in range(9) if i not in (4, 6))
        for batch in epoch:
            assert batch.samples == len(batch.where) == len(batch.images.keys)
            assert int((batch.input_ids == TOKENIZER.image_id).sum()) == 16 * batch.samples
    assert report.counts == {"truncated_image": 1, "missing_file": 1}
    assert len((tmp_path / "bad_samples.jsonl").read_text().splitlines()) == 2
    with pytest.raises(UserError, match=r"data:[46]: .*(\n.*)*data\.max_bad"):
        list(loader(items, RejectionReport(None), images, max_bad=0.01, workers=workers))


def test_a_batch_of_broken_pictures_alone_keeps_its_place_without_teaching(tmp_path, encoder):
    items = [item(i, tmp_path / "gone.png" if i == 1 else None) for i in range(3)]
    images = ImageSource(encoder, None, frozen=False)
    batches = list(loader(items, images=images, batch_size=1, max_bad=1.0))
    assert sorted(batch.where[0] for batch in batches if batch.where) == ["data:0", "data:2"]
    (blank,) = [batch for batch in batches if not batch.where]
    assert blank.supervised == blank.samples == 0
    # Its loss is zero and still has a gradient, which backward and data-parallel ranks wait for.
    model = tiny_model("llama")
    blank.images = None
    loss = model.loss(blank).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert any(parameter.grad is not None for parameter in model.language.parameters())


def test_an_epoch_without_anything_to_learn_is_an_error():
    encoded = render(normalize(talk("q", "a")[:1]))
    with pytest.raises(UserError, match=r"no supervised token in a batch \(here\)"):
        list(loader([Item(Sample(normalize(talk("q", "a")), "here"), encoded)]))


def test_samples_become_items_or_say_why_not():
    def made(messages, max_length=100):
        return make_item(Sample(messages, "x:3"), render, max_length)

    good = made(talk([noise(0), "q"], "a"))
    assert isinstance(good, Item) and len(good.encoded) == len(render(normalize(talk([noise(0), "q"], "a"))))
    assert isinstance(made(talk("q", "a"), len(render(normalize(talk("q", "a"))))), Item)
    for messages, reason in (
        (talk("q", " "), "empty_answer"),
        (talk("q" * 200, "a"), "too_long"),
        ([{"role": "x", "content": "y"}], "bad_role"),
    ):
        found = made(messages)
        assert isinstance(found, Rejected) and (found.reason, found.where) == (reason, "x:3")


def test_load_items_counts_everything():
    report = RejectionReport(None)
    sources = [SourceConfig(path="shapes", split="train", limit=30), SourceConfig(path="shapes", split="val", limit=5)]
    everything, _ = load_items(sources, render, max_length=1000, report=report, seed=0)
    middle = sorted(len(found.encoded) for found in everything)[17]
    items, total = load_items(sources, render, max_length=middle, report=report, seed=0)
    assert total == len(everything) == 35 and len(items) + len(report) == 35 and 0 < len(report) < 35
    assert set(report.counts) == {"too_long"} and all(len(found.encoded) <= middle for found in items)


def test_holdout_keeps_a_picture_on_one_side():
    items = [item(i, Path(f"photo{i // 3}.jpg")) for i in range(60)]
    train, held = split_holdout(items, 0.2, seed=1)
    assert len(held) == 12 and len(train) == 48
    assert not {i.sample.images[0] for i in train} & {i.sample.images[0] for i in held}
    assert split_holdout(items, 0.2, seed=1) == (train, held)
    assert split_holdout(items, 0.2, seed=2) != (train, held)
    everything, nothing = split_holdout(items, 0.0, seed=1)
    assert sorted(i.sample.where for i in everything) == sorted(i.sample.where for i in items) and nothing == []
    assert split_holdout(items[:3], 0.5, seed=1) == (items[:3], [])  # one picture cannot be on both sides
    deep = [item(i, f"{'a' * 200}/{i}/{'b' * 200}.jpg") for i in range(10)]  # messages cut such names short
    assert len(split_holdout(deep, 0.2, seed=1)[1]) == 2


def test_holdout_tells_pictures_in_memory_apart_by_content():
    """Encoded bytes share their header, and the address of a PIL image is another one in every process."""
    import io

    files = []
    for number in range(20):
        file = io.BytesIO()
        noise(number).save(file, "BMP")
        files.append(file.getvalue())
    for images in (files, [noise(number) for number in range(20)]):
        items = [item(number, image) for number, image in enumerate([*images, *images])]
        train, held = split_holdout(items, 0.1, seed=0)
        assert len(held) == 4 and {int(i.sample.where[5:]) % 20 for i in held}.isdisjoint(
            {int(i.sample.where[5:]) % 20 for i in train}
        )
    again = [item(number, noise(number % 20)) for number in range(40)]
    assert [i.sample.where for i in split_holdout(again, 0.1, seed=0)[1]] == [i.sample.where for i in held]
