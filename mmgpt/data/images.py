"""Images: from whatever a user or a file hands in to the encoder's input.

    ImageRef -> open_image -> PIL RGB -> (augment) -> Preprocess -> FloatTensor [3, size, size]

`image_key` names an image by its content, for the feature cache. Torch is imported only when a tensor is made.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import random
import stat
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from PIL import Image, ImageEnhance, ImageOps

from mmgpt.data.messages import ImageRef, LazyImage
from mmgpt.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

MAX_PIXELS = 50_000_000
"""Largest image that is decoded: 150 MB as RGB."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")
"""What is read. A closed list: other plug-ins of Pillow start programs (EPS) or have no signature to tell them by."""

_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"RIFF", b"II*\x00", b"MM\x00*")


class ImageError(UserError):
    """An image that cannot be used.

    `reason` is the word bad samples are counted by: `missing_file`, `directory`, `unreadable_file`, `not_an_image`,
    `truncated_image`, `too_large`, `zero_size`, or `missing_image` for a row of a table without one.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def open_image(ref: ImageRef, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to 8-bit RGB, the way it is meant to be seen.

    EXIF rotation is applied, transparency composited on white, 16-bit and float samples scaled to 8 bits, and of an
    animation the first frame is taken. The size is read from the header, before any pixel is decoded.

    Args:
        ref: A path, encoded bytes, a `LazyImage`, or a PIL image (which is left as it is).
        max_pixels: Most pixels (width x height) an image may have.

    Raises:
        ImageError: see there for the reasons.
    """
    name = image_name(ref)
    if isinstance(ref, Image.Image):
        return _decode(ref, name, max_pixels)
    with _opened(ref, name) as file, warnings.catch_warnings():
        # Pillow warns of a bomb where this refuses it, and of damage that is an error here or does not matter.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            # Pillow tells the number of pixels only in the words of its message.
            raise _too_large(name, f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels") from error
        except Exception as error:
            # A damaged header fails with almost any exception type (and KeyError is a Pillow without AVIF).
            raise _not_an_image(file, name) from error
        with image:
            return _decode(image, name, max_pixels)


def image_bytes(ref: ImageRef) -> bytes | None:
    """The encoded bytes of an image; None for a PIL image, which has none.

    Raises:
        ImageError: `missing_file`, `directory`, `unreadable_file` or `missing_image`.
    """
    if isinstance(ref, Image.Image):
        return None
    with _opened(ref, image_name(ref)) as file:
        return file.read()


def image_key(ref: ImageRef) -> str:
    """A name for the content of an image: the sha256 of its encoded bytes, in hex.

    A PIL image is named by mode, size and pixels after `open_image`, so that palette and rotation count too.
    """
    if isinstance(ref, Image.Image):
        image = open_image(ref)
        return hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()
    with _opened(ref, image_name(ref)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def image_name(ref: ImageRef) -> str:
    """How messages call an image: its path, or what it is where it has none."""
    if isinstance(ref, str | Path):
        return shortened(str(ref))
    if isinstance(ref, bytes):
        return f"an image of {len(ref)} bytes"
    if isinstance(ref, Image.Image):
        return getattr(ref, "filename", "") or f"a {ref.width}x{ref.height} image in memory"
    if isinstance(ref, LazyImage):
        return ref.name
    raise TypeError(f"not an image: {type(ref).__name__}; use a path, bytes, a LazyImage or a PIL image")


def shortened(name: str, most: int = 300) -> str:
    """A path for a message: whole unless it is absurd, as where somebody passed the picture itself in base64."""
    return name if len(name) <= most else f"{name[: most // 2]}...{name[-most // 2 :]} ({len(name):,} characters)"


@contextmanager
def _opened(ref: Any, name: str) -> Iterator[IO[bytes]]:
    if isinstance(ref, bytes):
        yield io.BytesIO(ref)
    elif isinstance(ref, str | Path):
        with _open_file(ref, name) as file:
            yield file
    else:
        try:
            data = ref.read()
        except OSError as error:
            raise ImageError("unreadable_file", f"{name}: {error.strerror or error}") from error
        yield io.BytesIO(data)


def _open_file(path: str | Path, name: str) -> IO[bytes]:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ImageError("directory", f"{name} is a directory, not an image: name a file in it")
        if stat.S_ISFIFO(mode):
            with open(path, "rb") as pipe:
                return io.BytesIO(pipe.read())
        if not stat.S_ISREG(mode):
            # Reading a device such as /dev/zero would never end.
            raise ImageError("not_an_image", f"{name} is a device, not an image file")
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "download it first: only local files are read" if "://" in name else f"looked in {os.getcwd()}"
        raise ImageError("missing_file", f"no such image: {name} ({hint})") from error
    except (OSError, ValueError) as error:
        if not isinstance(error, OSError):
            hint = str(error)
        elif error.errno in (errno.EACCES, errno.EPERM):
            hint = f"{error.strerror}; check its permissions"
        else:
            hint = error.strerror or str(error)
        raise ImageError("unreadable_file", f"cannot read {name}: {hint}") from error


def _not_an_image(file: IO[bytes], name: str) -> ImageError:
    file.seek(0)
    head = file.read(16)
    if not head:
        return ImageError("truncated_image", f"{name} is empty (0 bytes): copy it again")
    if head.startswith(_SIGNATURES):
        return ImageError("truncated_image", f"{name} starts like an image but its header is broken: copy it again")
    return ImageError("not_an_image", f"{name} is not an image that can be read; use one of {', '.join(FORMATS[:7])}")


def _too_large(name: str, size: str) -> ImageError:
    return ImageError("too_large", f"{name} is too large to decode ({size}): scale it down first")


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError("zero_size", f"{name} has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise _too_large(name, f"{width}x{height}, at most {max_pixels:,} pixels")
    try:
        image.load()
    except Image.DecompressionBombError as error:
        raise _too_large(name, str(error)) from error
    except MemoryError:
        raise
    except Exception as error:
        # Decoders report damage with almost any exception type; the header was good, so it is the data that is not.
        raise ImageError(
            "truncated_image", f"{name} is cut off or damaged ({str(error)[:120]}): copy or download it again"
        ) from error
    # Damaged EXIF data says nothing about the rotation; the pixels are good.
    with suppress(Exception):
        image = ImageOps.exif_transpose(image)
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _scaled_to_8_bits(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    # The file's metadata is used up, and would only travel along with every copy.
    image.info = {}
    return image


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 or 32 bits, or floats, to 8: Pillow's own conversion clips at 255.

    16-bit levels map 0..65535 to 0..255, floats 0..1 (or 0..255) likewise. Anything outside has no range that could be
    known from the file, and is stretched from its darkest to its brightest level.
    """
    import numpy as np

    levels = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(levels.min()), float(levels.max())
    if image.mode == "F":
        bounds = (0.0, 1.0) if low >= 0 and high <= 1 else (0.0, 255.0)
    else:
        bounds = (0.0, 65535.0)
    if low < bounds[0] or high > bounds[1]:
        bounds = (low, high)
    scaled = (levels - bounds[0]) * (255.0 / (bounds[1] - bounds[0]))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


@dataclass(frozen=True)
class Augment:
    """How training pictures vary (random resized crop, Szegedy et al. 2015; flip; colour jitter).

    Args:
        scale: Range of the crop's share of the area.
        ratio: Range of the crop's aspect, relative to that of the whole.
        flip: Probability of a mirrored picture; 0 where left and right are part of the answer.
        jitter: Brightness, contrast and saturation change by at most this share.
    """

    scale: tuple[float, float] = (0.6, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.2


@dataclass(frozen=True)
class Preprocess:
    """From an RGB picture to the encoder's input; the same as timm's evaluation transform without torchvision.

    Args:
        size: Side of the square, in pixels.
        resize: `crop` scales the short side to `size / crop_pct` and takes the centre (CLIP); `squash` scales both
            sides to that; `pad` scales the long side and fills up with the mean colour.
        mean, std: Of the pixel values in 0..1, for red, green and blue.
        interpolation: Of Pillow, with antialiasing.
        crop_pct: Share of the scaled picture's side that is kept.
    """

    size: int
    resize: Literal["crop", "squash", "pad"] = "crop"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        # Lists come from JSON; tuples keep the instance hashable and equal to the one that was saved.
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if self.resize not in ("crop", "squash", "pad") or self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"unknown resize {self.resize!r} or interpolation {self.interpolation!r}")
        colours = len(self.mean) == len(self.std) == 3 and min(self.std) > 0
        if self.size < 1 or not 0 < self.crop_pct <= 1 or not colours:
            raise ValueError("size and std must be positive, crop_pct in (0, 1], mean and std have three numbers")

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """The normalised picture, float32 [3, size, size].

        Args:
            image: RGB, of any size, as `open_image` gives it.
        """
        import numpy as np
        import torch

        pixels = np.asarray(self.square(image), dtype=np.float32)
        std = np.asarray(self.std, dtype=np.float32)
        pixels = pixels / (255 * std) - np.asarray(self.mean, dtype=np.float32) / std
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32))

    def square(self, image: Image.Image) -> Image.Image:
        """The resized and cropped or padded picture, RGB size x size: what the encoder sees, for people to look at."""
        if image.mode != "RGB":
            image = open_image(image)
        scaled = self._scaled_size(*image.size)
        width, height = (min(length, self.size) for length in scaled)
        left, top = (max(0, round((length - self.size) / 2)) for length in scaled)
        if scaled[0] * scaled[1] <= 8 * self.size**2:
            image = image.resize(scaled, self._resampling()).crop((left, top, left + width, top + height))
        else:
            # Only what is kept of a long strip: 20000x1 would become 224 x 4,480,000 first. Not always so, because
            # Pillow may resize a box rows first and the whole columns first, which rounds differently.
            x, y = image.width / scaled[0], image.height / scaled[1]
            box = (left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height))
            image = image.resize((width, height), self._resampling(), box=box)
        if (width, height) == (self.size, self.size):
            return image
        result = Image.new("RGB", (self.size, self.size), tuple(round(255 * value) for value in self.mean))
        result.paste(image, ((self.size - width) // 2, (self.size - height) // 2))
        return result

    def augment(self, image: Image.Image, rng: random.Random, policy: Augment = Augment()) -> Image.Image:
        """A random variant of an RGB picture for training, decided by `rng` alone.

        The crop follows what `resize` shows of a picture: `crop` takes any near-square part, `squash` and `pad` a part
        with about the picture's own aspect. All but `pad` are resized to the square here, which `__call__` then keeps.
        """
        width, height = image.size
        base_w, base_h = (min(width, height),) * 2 if self.resize == "crop" else (width, height)
        scale = rng.uniform(*policy.scale)
        ratio = math.exp(rng.uniform(math.log(policy.ratio[0]), math.log(policy.ratio[1])))
        crop_w, crop_h = min(width, base_w * math.sqrt(scale * ratio)), min(height, base_h * math.sqrt(scale / ratio))
        left, top = rng.random() * (width - crop_w), rng.random() * (height - crop_h)
        if self.resize == "pad":
            box = (int(left), int(top), min(width, math.ceil(left + crop_w)), min(height, math.ceil(top + crop_h)))
            image = image.crop(box)
        else:
            side = math.floor(self.size / self.crop_pct)
            box_f = (left, top, min(width, left + crop_w), min(height, top + crop_h))
            image = image.resize((side, side), self._resampling(), box=box_f)
        if rng.random() < policy.flip:
            image = ImageOps.mirror(image)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(1 + rng.uniform(-policy.jitter, policy.jitter))
        return image

    def _resampling(self) -> Image.Resampling:
        return Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR

    def _scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that the whole picture is scaled to, rounded as torchvision and timm round."""
        side = math.floor(self.size / self.crop_pct)
        if self.resize == "squash":
            return side, side
        if self.resize == "pad":
            ratio = max(width, height) / side
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        if width <= height:
            return side, int(side * height / width)
        return int(side * width / height), side
