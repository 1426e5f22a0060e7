"""Plans of an epoch and batches, as properties and against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgpt.data.packing import balanced_rows, block_mask, collate, plan_epoch
from mmgpt.data.template import Encoded

PAD = 999
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@st.composite
def encoded_rows(draw):
    """Rows of samples of distinct ids, with a random loss mask."""
    rows, next_id = [], 1
    for _ in range(draw(st.integers(1, 4))):
        row = []
        for _ in range(draw(st.integers(1, 3))):
            flags = draw(st.lists(st.booleans(), min_size=1, max_size=7))
            row.append(Encoded(list(range(next_id, next_id + len(flags))), flags, [f"image {next_id}"]))
            next_id += len(flags)
        rows.append(row)
    return rows


@given(LENGTHS, st.integers(60, 200))
def test_balanced_rows_hold_every_sample_once_within_capacity(lengths, capacity):
    rows = balanced_rows(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < total <= capacity for total in filled)
    # Longest-first into the emptiest row: the fullest row exceeds the emptiest by at most the shortest sample it took last.
    assert max(filled) - min(filled) <= max(lengths)
    assert rows == balanced_rows(lengths, capacity)


def test_balanced_rows_refuse_a_sample_that_does_not_fit():
    with pytest.raises(ValueError, match="61 tokens does not fit into a row of 60"):
        balanced_rows([3, 61], 60)
    assert balanced_rows([], 60) == []


def test_balanced_rows_waste_less_than_first_fit():
    """Four samples of 30 and one of 20 in rows of 100: 70 + 70 instead of 90 + 50."""
    lengths = [30, 30, 30, 30, 20]
    assert sorted(sum(lengths[i] for i in row) for row in balanced_rows(lengths, 100)) == [60, 80]


@settings(max_examples=50)
@given(LENGTHS, st.sampled_from(["packed", "grouped"]), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_is_a_permutation_and_a_function_of_its_arguments(lengths, batching, batch_size, seed, epoch):
    arguments = {"batching": batching, "batch_size": batch_size, "row_length": 60, "seed": seed, "epoch": epoch}
    plan = plan_epoch(lengths, **arguments)
    assert plan == plan_epoch(lengths, **arguments)
    assert sorted(i for batch in plan for row in batch for i in row) == list(range(len(lengths)))
    counts = sorted(sum(len(row) for row in batch) for batch in plan)
    assert counts[-1] <= batch_size and all(count == batch_size for count in counts[1:])
    assert all(sum(lengths[i] for i in row) <= 60 for batch in plan for row in batch)
    if batching == "grouped":
        assert all(len(row) == 1 for batch in plan for row in batch)


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_epochs_and_seeds_differ(batching):
    lengths = [1 + 7 * i % 50 for i in range(64)]
    plans = [
        plan_epoch(lengths, batching=batching, batch_size=8, row_length=100, seed=seed, epoch=epoch)
        for seed in range(2)
        for epoch in range(3)
    ]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_grouped_batches_pad_little():
    lengths = [1 + 37 * i % 100 for i in range(400)]
    plan = plan_epoch(lengths, batching="grouped", batch_size=8, row_length=100, seed=0, epoch=0)
    padded = sum(len(batch) * max(lengths[row[0]] for row in batch) for batch in plan)
    assert padded < 1.05 * sum(lengths)
    # Batches come in random order, not from short to long.
    firsts = [lengths[batch[0][0]] for batch in plan]
    assert firsts != sorted(firsts)


@given(encoded_rows())
def test_collate_against_a_loop(rows):
    batch = collate(rows, PAD, where=["here"])
    length = max(sum(len(sample) for sample in row) for row in rows)
    assert batch.input_ids.shape == (len(rows), length)
    for row, ids, positions, segments, targets in zip(
        rows, batch.input_ids.tolist(), batch.position_ids.tolist(), batch.segment_ids.tolist(), batch.targets.tolist()
    ):
        expected = []
        for number, sample in enumerate(row, start=1):
            for place, token in enumerate(sample.ids):
                last = place + 1 == len(sample)
                target = -100 if last or not sample.supervised[place + 1] else sample.ids[place + 1]
                expected.append((token, place, number, target))
        expected += [(PAD, 0, 0, -100)] * (length - len(expected))
        assert list(zip(ids, positions, segments, targets)) == expected
    samples = [sample for row in rows for sample in row]
    assert batch.images == [image for sample in samples for image in sample.images]
    assert batch.samples == len(samples) and batch.tokens == sum(map(len, samples))
    assert batch.supervised == batch.target_count == sum(sum(sample.supervised[1:]) for sample in samples)
    assert batch.packed == any(len(row) > 1 for row in rows)
    assert collate(rows, PAD, target_count=77).target_count == 77


@given(encoded_rows())
def test_block_mask_against_brute_force(rows):
    segments = collate(rows, PAD).segment_ids
    mask = block_mask(segments)
    count, length = segments.shape
    assert mask.shape == (count, 1, length, length) and mask.dtype == torch.bool
    for row in range(count):
        for query in range(length):
            for key in range(length):
                allowed = key <= query and segments[row, query] == segments[row, key]
                assert bool(mask[row, 0, query, key]) == bool(allowed)
    assert mask.any(-1).all()  # an empty row of the softmax would be NaN


def test_moving_a_batch_keeps_everything():
    batch = collate([[Encoded([1, 2], [False, True], ["a"])]], PAD, where=["x"])
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == "meta" and moved.images == ["a"] and moved.where == ["x"]
    assert (moved.target_count, moved.samples) == (1, 1) and batch.input_ids.device.type == "cpu"
