"""The feature cache: exact, bounded, safe for two processes; and what it does when the disk does not help."""

import multiprocessing
import os
import random
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VIT, noise

from mmgpt.config import VisionConfig
from mmgpt.data.features import FeatureCache, ImageSource, Prepared, fingerprint, merge_prepared
from mmgpt.data.images import ImageError, image_key
from mmgpt.errors import UserError
from mmgpt.model.vision import load_vision

FILE = 128 + 4 * 8 * 2
"""Bytes of [4, 8] in fp16 as .npy."""


def key(number: int) -> str:
    return f"{number:064x}"


def value(number: int) -> torch.Tensor:
    return torch.full((4, 8), float(number), dtype=torch.float16)


def stored(root) -> int:
    return sum(path.stat().st_size for path in root.rglob("*.npy"))


def age(root, seconds: float) -> None:
    for path in root.rglob("*.npy"):
        then = time.time() - seconds
        os.utime(path, (then, then))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return make_encoder()


def make_encoder(**changes):
    torch.manual_seed(0)
    return load_vision(VisionConfig(**{"name": "timm:vit_tiny_patch16_224", "layer": -1, "options": dict(VIT), **changes})).eval()


def test_what_is_put_is_got_bit_for_bit(tmp_path):
    cache = FeatureCache(tmp_path, "f", 1)
    wanted = torch.randn(4, 8)
    assert cache.get(key(1)) is None
    cache.put(key(1), wanted)
    assert torch.equal(cache.get(key(1)), wanted.half())
    assert (cache.hits, cache.misses) == (1, 1)
    again = FeatureCache(tmp_path, "f", 1)
    assert torch.equal(again.get(key(1)), wanted.half()) and again.size == stored(tmp_path) == FILE
    assert FeatureCache(tmp_path, "other", 1).get(key(1)) is None
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"not an array", b"PK\x03\x04 not a zip", None])
def test_a_damaged_file_counts_as_absent_and_is_replaced(tmp_path, damage):
    cache = FeatureCache(tmp_path, "f", 1)
    cache.put(key(1), value(1))
    [path] = tmp_path.rglob("*.npy")
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    assert cache.get(key(1)) is None and cache.misses == 1
    cache.put(key(1), value(1))
    assert torch.equal(cache.get(key(1)), value(1))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, FILE - 1), st.integers(1, 255))
def test_no_flipped_byte_gives_another_kind_of_array(tmp_path_factory, position, flip):
    root = tmp_path_factory.mktemp("flip")
    cache = FeatureCache(root, "f", 1)
    cache.put(key(1), value(1))
    [path] = root.rglob("*.npy")
    data = bytearray(path.read_bytes())
    data[position] ^= flip
    path.write_bytes(data)
    found = cache.get(key(1))
    assert found is None or (found.dtype == torch.float16 and found.dim() == 2)


def test_the_size_is_bounded_and_old_features_make_room(tmp_path):
    first = FeatureCache(tmp_path, "old", 5.5 * FILE / 1e9)
    for number in range(9):
        first.put(key(number), value(number))
    # Nothing is older than this cache, so what does not fit is not kept.
    assert stored(tmp_path) == 5 * FILE and first.get(key(4)) is not None and first.get(key(5)) is None
    age(tmp_path, 1000)
    second = FeatureCache(tmp_path, "new", 5.5 * FILE / 1e9)
    time.sleep(0.02)  # a file system's clock ticks in milliseconds
    assert FeatureCache(tmp_path, "old", 1).get(key(0)) is not None  # read now, so it is not old any more
    for number in range(9):
        second.put(key(number), value(number))
        assert stored(tmp_path) <= second.limit
    kept = {path.parent.parent.name + path.stem[-1] for path in tmp_path.rglob("*.npy")}
    assert kept == {"old0", "new0", "new1", "new2", "new3"}


def test_a_full_cache_is_not_searched_again_and_again(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, "f", 2 * FILE / 1e9)
    searches = []
    monkeypatch.setattr(cache, "_files", lambda: searches.append(1) or FeatureCache._files(cache))
    for number in range(20):
        cache.put(key(number), value(number))
    assert len(searches) == 1 and stored(tmp_path) == 2 * FILE


def test_a_full_disk_costs_the_cache_not_the_run(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, "f", 1)
    cache.put(key(1), value(1))

    def fail(file, array, **options):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", fail)
    cache.put(key(2), value(2))
    monkeypatch.undo()
    cache.put(key(3), value(3))
    assert cache.get(key(2)) is None and cache.get(key(3)) is None and torch.equal(cache.get(key(1)), value(1))
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npy"]


def test_a_file_that_cannot_be_removed_is_left(tmp_path, monkeypatch):
    FeatureCache(tmp_path, "f", 1).put(key(1), value(1))
    age(tmp_path, 1000)
    cache = FeatureCache(tmp_path, "g", 1.5 * FILE / 1e9)

    def refuse(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    cache.put(key(2), value(2))
    assert stored(tmp_path) == FILE


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "features").write_text("")
    with pytest.raises(UserError, match="feature_cache"):
        FeatureCache(tmp_path / "features", "f", 1)


def _put_many(root: str, own: int, start) -> None:
    cache = FeatureCache(root, "f", 1)
    start.wait()
    for number in range(60):
        for which in (number, 1000 * own + number):
            if (found := cache.get(key(which))) is not None and not torch.equal(found, value(which % 50)):
                raise SystemExit(3)
            cache.put(key(which), value(which % 50))


def test_two_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=_put_many, args=(tmp_path, own, start)) for own in (1, 2)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    cache = FeatureCache(tmp_path, "f", 1)
    for which in [*range(60), *range(1000, 1060), *range(2000, 2060)]:
        assert torch.equal(cache.get(key(which)), value(which % 50))
    assert cache.size == stored(tmp_path) == 180 * FILE and not list(tmp_path.rglob("*.tmp"))


def test_fingerprint_changes_with_whatever_changes_the_features(encoder):
    names = {fingerprint(encoder)}
    assert fingerprint(make_encoder()) in names
    for changed in (
        make_encoder(layer=0),
        make_encoder(resize="pad"),
        make_encoder(image_size=48),
        make_encoder(options={**VIT, "patch_size": 16}),
    ):
        names.add(fingerprint(changed))
    trained = make_encoder()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    names.add(fingerprint(trained))
    assert len(names) == 6


def test_a_hit_equals_a_miss_bit_for_bit(tmp_path, encoder):
    images = [noise(0), noise(1), noise(0), noise(2)]
    plain = ImageSource(encoder, None, frozen=True)(images)
    cache = FeatureCache(tmp_path, fingerprint(encoder), 1)
    source = ImageSource(encoder, cache, frozen=True)
    missed, hit = source(images), source(images)
    assert missed.dtype == torch.float16 and missed.shape == (4, 16, 32)
    assert torch.equal(missed, hit) and torch.equal(missed, plain)
    assert torch.equal(missed[0], missed[2]) and not torch.equal(missed[0], missed[1])
    assert cache.misses == 3 and cache.hits == 3 and len(list(tmp_path.rglob("*.npy"))) == 3
    with torch.no_grad():
        direct = encoder(torch.stack([encoder.preprocess(image) for image in images]))
    torch.testing.assert_close(missed.float(), direct, atol=2e-3, rtol=2e-3)


def test_a_frozen_encoder_runs_once_an_image(tmp_path, encoder):
    source = ImageSource(encoder, FeatureCache(tmp_path, "f", 1), frozen=True, chunk=2)
    seen = []
    encoder.register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    source([noise(i) for i in range(5)])
    source([noise(i) for i in range(6)])
    assert seen == [2, 2, 1, 1]


def test_autocast_around_it_changes_nothing(tmp_path, encoder):
    """PPO asks for features inside the training step, where there is autocast."""
    plain, cached = (ImageSource(encoder, cache, frozen=True) for cache in (None, FeatureCache(tmp_path, "f", 1)))
    wanted = plain([noise(1), noise(2)])
    with torch.autocast("cpu", torch.bfloat16):
        for source in (plain, cached, cached):
            assert torch.equal(source([noise(1), noise(2)]), wanted)


def test_a_trained_encoder_gets_pixels(encoder):
    pixels = ImageSource(encoder, None, frozen=False)([noise(0), noise(1)])
    assert torch.equal(pixels, torch.stack([encoder.preprocess(noise(i)) for i in range(2)]))
    assert ImageSource(encoder, None, frozen=False)([]) is None and ImageSource(encoder, None, frozen=True)([]) is None


def test_augmented_pictures_pass_the_cache_by(tmp_path, encoder):
    cache = FeatureCache(tmp_path, "f", 1)
    source = ImageSource(encoder, cache, frozen=True, augment=encoder.preprocess.augment)
    draws = [source.finish(source.prepare([noise(0)], random.Random(seed))) for seed in (1, 2, 1)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    assert not list(tmp_path.rglob("*.npy")) and cache.misses == 0


def test_a_broken_picture_is_an_image_error(tmp_path, encoder):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ImageError) as caught:
        ImageSource(encoder, None, frozen=True).prepare([tmp_path / "a.png"])
    assert caught.value.reason == "not_an_image"


@pytest.mark.parametrize("frozen", [True, False])
def test_merged_samples_equal_one_by_one(tmp_path, encoder, frozen):
    groups = [[noise(0), noise(1)], [], [noise(1)], [noise(2), noise(0)]]
    cache = FeatureCache(tmp_path, "f", 1) if frozen else None
    source = ImageSource(encoder, cache, frozen)
    if frozen:
        source([noise(1)])  # some are found, others are not
    merged = source.finish(merge_prepared([source.prepare(group) for group in groups]))
    flat = [image for group in groups for image in group]
    assert torch.equal(merged, ImageSource(encoder, None, frozen)(flat))
    assert merge_prepared([]) == Prepared([], {}, {})
    if frozen:
        assert all(cache.get(image_key(noise(i))) is not None for i in range(3))


def test_features_that_are_not_half_precision_are_not_trusted(tmp_path):
    cache = FeatureCache(tmp_path, "f", 1)
    cache.put(key(1), value(1))
    [path] = tmp_path.rglob("*.npy")
    np.save(path, np.zeros((4, 8), dtype=np.int64))
    assert cache.get(key(1)) is None
