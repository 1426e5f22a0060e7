"""Images of every kind people have, against what the pixels must be; the transform against timm's and transformers'."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmgpt.data.images import Augment, ImageError, Preprocess, image_bytes, image_key, open_image
from mmgpt.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colour with fine noise: shows errors of position as well as of antialiasing."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([128 + 120 * np.sin(x / 17 + c) * np.cos(y / 23 - c) for c in range(3)], -1)
    return Image.fromarray(np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8))


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def reason(ref, **options) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        open_image(ref, **options)
    assert isinstance(caught.value, UserError)
    return caught.value.reason, str(caught.value)


class Lazy:
    name = "shard.tar[7]"

    def __init__(self, data: bytes):
        self.data = data

    def read(self) -> bytes:
        return self.data


def test_every_kind_of_reference_gives_the_same_picture(tmp_path):
    image = photo(31, 17)
    data = encoded(image)
    path = tmp_path / "bild ä 图.png"
    path.write_bytes(data)
    for ref in (path, str(path), data, Lazy(data), image, Image.open(path)):
        assert np.array_equal(np.asarray(open_image(ref)), np.asarray(image))
    for ref in (path, str(path), data, Lazy(data)):
        assert image_bytes(ref) == data
    assert image_bytes(image) is None
    assert len({image_key(ref) for ref in (path, data, Lazy(data))}) == 1
    with pytest.raises(TypeError):
        open_image(17)


def test_a_picture_in_memory_is_not_changed_and_not_shared():
    image = photo(5, 5)
    copy = open_image(image)
    copy.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)


def test_keys_differ_with_pixels_size_palette():
    flat = Image.new("RGB", (4, 6), "red")
    palette_a, palette_b = (flat.convert("P", palette=Image.Palette.ADAPTIVE) for _ in range(2))
    palette_b.putpalette([0, 0, 255] * 256)
    others = [flat.rotate(90, expand=True), Image.new("RGB", (4, 6), "blue")]
    assert len({image_key(image) for image in (flat, *others)}) == 3
    assert image_key(palette_a) != image_key(palette_b)
    assert image_key(flat) == image_key(flat.copy())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation(orientation, kind):
    # Bits of the EXIF specification (tag 274): where the stored row 0 and column 0 belong in the upright picture.
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = (255, 0, 0)
    upright[8:, 16:] = (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    opened = open_image(data)
    assert opened.size == (32, 16)
    assert np.abs(np.asarray(opened).astype(int) - upright).max() <= 3
    assert np.array_equal(np.asarray(open_image(opened)), np.asarray(opened)), "rotated twice"


def test_broken_exif_is_no_reason_to_lose_a_picture():
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff")
    assert open_image(data).size == (8, 8)


def test_transparency_is_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    opened = open_image(encoded(rgba))
    assert [pixel(opened, x) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (127, 127, 127)]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(10, 255), (10, 0)])
    opened = open_image(encoded(grey))
    assert [pixel(opened, x) for x in range(2)] == [(10, 10, 10), (255, 255, 255)]


def test_transparent_colours_without_an_alpha_channel():
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 90, 200])
    palette.putdata([0, 1])
    for data in (encoded(palette, transparency=0), encoded(palette, "GIF", transparency=0)):
        opened = open_image(data)
        assert [pixel(opened, x) for x in range(2)] == [(255, 255, 255), (9, 90, 200)]
    assert pixel(open_image(encoded(palette, transparency=bytes([128, 255])))) == (127, 127, 127)
    rgb = Image.new("RGB", (2, 1))
    rgb.putdata([(1, 2, 3), (4, 5, 6)])
    opened = open_image(encoded(rgb, transparency=(1, 2, 3)))
    assert [pixel(opened, x) for x in range(2)] == [(255, 255, 255), (4, 5, 6)]


def test_cmyk_one_bit_and_grey():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixel(open_image(encoded(cmyk, "JPEG", quality=100)), 4, 4)
    assert red[0] > 245 and max(red[1:]) < 10
    bits = Image.new("1", (2, 1))
    bits.putdata([0, 1])
    opened = open_image(encoded(bits))
    assert [pixel(opened, x) for x in range(2)] == [(0, 0, 0), (255, 255, 255)]
    assert pixel(open_image(encoded(Image.new("L", (1, 1), 77)))) == (77, 77, 77)
    assert pixel(open_image(Image.new("HSV", (1, 1), (0, 255, 255)))) == (255, 0, 0)


def test_16_bit_levels_are_scaled_and_not_clipped():
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    expected = [0, 1, 128, 255]
    for image in (
        Image.fromarray(levels),
        Image.fromarray(levels.astype(np.int32)),
        open_image(encoded(Image.fromarray(levels), "PNG")),
        open_image(encoded(Image.fromarray(levels), "TIFF")),
        Image.frombytes("I;16B", (4, 1), levels.byteswap().tobytes()),
    ):
        opened = open_image(image)
        assert [pixel(opened, x)[0] for x in range(4)] == expected


def test_16_bit_colour_png_is_scaled():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">6H", 0, 32768, 65535, 65535, 256, 1)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    opened = open_image(data)
    assert [pixel(opened, x) for x in range(2)] == [(0, 128, 255), (255, 1, 0)]


@pytest.mark.parametrize(
    "levels, expected",
    [
        ([0.0, 0.5, 1.0, float("nan")], [0, 128, 255, 0]),
        ([0.0, 100.0, 255.0, 1.5], [0, 100, 255, 2]),
        ([-10.0, 0.0, 10.0, 10.0], [0, 128, 255, 255]),
    ],
)
def test_float_levels(levels, expected):
    image = Image.fromarray(np.array([levels], np.float32))
    assert [pixel(open_image(encoded(image, "TIFF")), x)[0] for x in range(4)] == expected


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixel(open_image(data)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.95])
def test_truncated_files(kind, share, tmp_path):
    data = encoded(photo(120, 90), kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(data[: int(len(data) * share)])
    word, message = reason(path)
    assert word == "truncated_image" and str(path) in message


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]), st.data())
def test_damaged_bytes_give_a_picture_or_an_image_error(kind, data):
    content = bytearray(encoded(photo(24, 24), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert open_image(bytes(content)).mode == "RGB"
    except ImageError as error:
        assert error.reason in {"truncated_image", "not_an_image", "too_large", "zero_size"}


def test_what_is_no_image(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("shopping list: apples and pears\n" * 20)
    assert reason(text)[0] == "not_an_image" and "notes.png" in reason(text)[1]
    empty = tmp_path / "empty.jpg"
    empty.touch()
    assert reason(empty)[0] == "truncated_image" and "0 bytes" in reason(empty)[1]
    assert reason(tmp_path)[0] == "directory"
    assert reason(tmp_path / "gone.jpg")[0] == "missing_file"
    assert reason(text / "x.jpg")[0] == "missing_file"
    assert "download" in reason("https://example.org/a.jpg")[1]
    assert reason("nul\0byte.png")[0] == "unreadable_file"
    word, message = reason("a" * 5000 + ".png")  # somebody may hand in the picture itself, in base64
    assert word == "unreadable_file" and len(message) < 400 and message.endswith("(5,004 characters): File name too long")
    assert reason("/dev/zero")[0] == "not_an_image"
    assert reason(b"")[0] == "truncated_image"
    assert reason(Image.new("RGB", (0, 5)))[0] == "zero_size"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    assert reason(postscript)[0] == "not_an_image", "Pillow would start a program to draw this"


def test_a_pipe_is_read(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    source = tmp_path / "a.png"
    Image.new("RGB", (3, 2), "red").save(source)
    with subprocess.Popen(["cp", "--no-preserve=all", str(source), str(path)]) as writer:
        assert open_image(path).size == (3, 2)
        writer.wait(10)


def test_decompression_bomb_is_refused_by_its_header():
    def png(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + header
        return (
            b"\x89PNG\r\n\x1a\n"
            + struct.pack(">I", 13)
            + chunk
            + struct.pack(">I", zlib.crc32(chunk))
            + (struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in (7_100, 10_000, 60_000):
            # Were a pixel decoded first, the missing data would make it `truncated_image`.
            assert reason(png(side, side))[0] == "too_large"
    assert reason(png(100, 100))[0] == "truncated_image"
    assert reason(png(100, 101), max_pixels=10_000)[0] == "too_large"
    assert reason(photo(20, 20), max_pixels=399)[0] == "too_large"
    assert open_image(photo(20, 20), max_pixels=400).size == (20, 20)


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 20000), (3, 2), (1, 2)])
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_extreme_shapes_are_resized(size, resize):
    image = open_image(encoded(Image.new("RGB", size, (255, 0, 128))))
    preprocess = Preprocess(32, resize, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    tensor = preprocess(image)
    assert tensor.shape == (3, 32, 32) and str(tensor.dtype) == "torch.float32"
    assert tensor.amax((1, 2)).tolist() == pytest.approx([1.0, 0.0, 128 / 255], abs=1e-6)
    if resize != "pad":
        assert tensor.amin((1, 2)).tolist() == pytest.approx([1.0, 0.0, 128 / 255], abs=1e-6)
    assert preprocess(preprocess.augment(image, random.Random(0))).shape == (3, 32, 32)


def test_extreme_shapes_need_no_memory():
    import tracemalloc

    image = Image.new("RGB", (40000, 1), "red")
    tracemalloc.start()
    Preprocess(224).square(image)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    # Pillow's buffers are not traced: the whole at 224 high would be 6 GB and take seconds.
    import time

    start = time.perf_counter()
    Preprocess(224).square(image)
    assert time.perf_counter() - start < 0.5


SIZES = [(300, 200), (201, 333), (224, 224), (97, 101), (640, 481), (50, 30), (500, 77)]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("resize, timm_mode", [("crop", "center"), ("squash", "squash"), ("pad", "border")])
@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_timm(resize, timm_mode, crop_pct, interpolation):
    from timm.data import create_transform

    reference = create_transform(
        96, mean=CLIP_MEAN, std=CLIP_STD, crop_pct=crop_pct, crop_mode=timm_mode, interpolation=interpolation
    )
    ours = Preprocess(96, resize, CLIP_MEAN, CLIP_STD, interpolation, crop_pct)
    for size in SIZES:
        image = photo(*size)
        assert (reference(image) - ours(image)).abs().max() < 1e-5, size
    if resize == "crop":
        # A long strip is cropped before it is resized, which rounds an intermediate level the other way.
        image = photo(1500, 90)
        levels = (reference(image) - ours(image)).abs() * 255 * min(CLIP_STD)
        assert levels.max() <= 4 and levels.mean() < 0.3


def test_equals_transformers_clip():
    from transformers import CLIPImageProcessorPil

    reference = CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    ours = Preprocess(96, "crop", CLIP_MEAN, CLIP_STD)
    for size in [(300, 200), (192, 300), (96, 96)]:
        image = photo(*size)
        theirs = reference(image, return_tensors="pt")["pixel_values"][0]
        assert (theirs - ours(image)).abs().max() < 1e-5, size


def test_preprocess_survives_json_and_checks_itself():
    from dataclasses import asdict

    preprocess = Preprocess(64, "pad", CLIP_MEAN, CLIP_STD)
    assert Preprocess(**json.loads(json.dumps(asdict(preprocess)))) == preprocess
    assert hash(preprocess) == hash(Preprocess(64, "pad", list(CLIP_MEAN), list(CLIP_STD)))
    for wrong in (
        {"size": 0},
        {"size": 8, "resize": "stretch"},
        {"size": 8, "mean": (0.5,)},
        {"size": 8, "std": (1, 1, 0)},
    ):
        with pytest.raises(ValueError):
            Preprocess(**wrong)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_augment_is_decided_by_the_rng(resize):
    image, preprocess = photo(90, 60), Preprocess(32, resize)
    before = image.tobytes()
    pictures = [preprocess.augment(image, random.Random(seed)).tobytes() for seed in (1, 1, 2)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert image.tobytes() == before
    assert preprocess.augment(image, random.Random(0)).size == (32, 32) or resize == "pad"


def test_augment_off_is_the_plain_picture():
    image = photo(80, 80)
    off = Augment(scale=(1, 1), ratio=(1, 1), flip=0, jitter=0)
    for resize in ("crop", "squash", "pad"):
        preprocess = Preprocess(32, resize)
        plain, same = preprocess(image), preprocess(preprocess.augment(image, random.Random(3), off))
        assert (plain - same).abs().max() == 0
    mirrored = Preprocess(32).augment(image, random.Random(3), Augment((1, 1), (1, 1), flip=1, jitter=0))
    assert np.array_equal(np.asarray(mirrored)[:, ::-1], np.asarray(Preprocess(32).square(image)))


def test_augment_covers_the_scales_it_says():
    # Red grows from left to right and green from top to bottom: the crop can be read off its corners.
    y, x = np.mgrid[0:200, 0:200]
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    policy = Augment(flip=0, jitter=0)
    areas = []
    for seed in range(60):
        crop = np.asarray(Preprocess(64).augment(image, random.Random(seed), policy)).astype(float)
        areas.append(np.ptp(crop[..., 0]) * np.ptp(crop[..., 1]) / 199**2)
    assert 0.5 < min(areas) < 0.7 and 0.9 < max(areas) <= 1.0


def test_import_is_light():
    code = "import sys, mmgpt.data.images; print({'torch', 'torchvision', 'timm', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
