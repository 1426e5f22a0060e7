"""Features of a frozen image encoder, kept on disk: an image is encoded once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgpt.data.images import image_key, open_image
from mmgpt.errors import UserError

if TYPE_CHECKING:
    import torch

    from mmgpt.model.vision import VisionEncoder

_HEADER = 128
"""Bytes of an .npy file in front of its numbers."""


class FeatureCache:
    """One file an image under `root/FINGERPRINT/`, in half precision.

    Files are written to a temporary name and renamed, so a reader sees a whole file or none, and two processes may share a
    cache. When `max_gb` is reached, features that no one has read since this cache was opened make room; where there are none,
    new features are not kept (throwing out what this very run reads again would be of no use).

    Args:
        root: Folder of the cache.
        fingerprint: Changes whenever the same image would give other features: see `fingerprint`.
        max_gb: Most that all files under `root` may take.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, root: Path, fingerprint: str, max_gb: float):
        self.root = root
        self.folder = root / fingerprint
        self.limit = int(max_gb * 1e9)
        self.full = False
        self.opened = time.time()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the feature cache {self.folder}: {error.strerror or error}; "
                "set MMGPT_CACHE to a folder that can be written, or data.feature_cache to false"
            ) from error
        self.size = sum(size for _, size, _ in self._files())
        self.hits = self.misses = 0

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npy"

    def get(self, key: str) -> torch.Tensor | None:
        """Features [P, D] in fp16, or None; a file that cannot be read counts as absent."""
        import numpy as np
        import torch

        path = self._path(key)
        try:
            array = np.load(path, allow_pickle=False)
            if array.dtype != np.float16 or array.ndim != 2:
                raise ValueError
            os.utime(path)
        except Exception:
            # What numpy raises for a damaged header is almost any type, down to those of Python's parser.
            self.misses += 1
            return None
        self.hits += 1
        return torch.from_numpy(array)

    def put(self, key: str, features: torch.Tensor) -> None:
        """Keep features [P, D]. A full disk costs the cache its use, not the run its life."""
        import numpy as np

        if self.full:
            return
        array = features.detach().half().cpu().numpy()
        room = array.nbytes + _HEADER
        path = self._path(key)
        name = None
        try:
            if self.size + room > self.limit:
                self._evict(room)
            if self.size + room > self.limit:
                # What is left was read or written since this cache was opened, and does not get older than that.
                self.full = True
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                name = file.name
                np.save(file, array, allow_pickle=False)
            os.replace(name, path)
            self.size += room
        except OSError:
            if name is not None:
                with contextlib.suppress(OSError):
                    os.unlink(name)
            self.full = True

    def _files(self) -> list[tuple[float, int, Path]]:
        files = []
        for path in self.root.rglob("*.npy"):
            try:
                stat = path.stat()
            except OSError:
                continue  # another process removed it
            files.append((stat.st_mtime, stat.st_size, path))
        return files

    def _evict(self, room: int) -> None:
        files = sorted(self._files())
        self.size = sum(size for _, size, _ in files)
        for used, size, path in files:
            if self.size + room <= self.limit or used >= self.opened:
                return
            path.unlink(missing_ok=True)
            self.size -= size


def fingerprint(encoder: VisionEncoder) -> str:
    """Names encoder, weights, layer and preprocessing: other features, other name."""
    digest = hashlib.sha256()
    digest.update(json.dumps([encoder.name, encoder.info, encoder.layer, asdict(encoder.preprocess)]).encode())
    for name, parameter in encoder.named_parameters():
        # A few numbers of each weight tell two checkpoints apart without reading all of them.
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class Prepared:
    """Images between the loader, which opens files, and the encoder, which lives with the model.

    Args:
        keys: Key of every image, in order; one may occur several times.
        found: Features [P, D] by key, read from the cache.
        pixels: Preprocessed images [3, S, S] by key, for those without.
    """

    keys: list[str]
    found: dict[str, torch.Tensor]
    pixels: dict[str, torch.Tensor]


@dataclass
class ImageSource:
    """Turns image references into what `MultimodalGPT.embed` takes: features where the encoder is frozen, else pixels.

    Args:
        encoder: The image encoder.
        cache: Where features are kept; None computes them every time.
        frozen: Whether features may stand for the image.
        augment: Changes an opened image, drawing from the generator it is given; training only, and it rules out the cache.
        chunk: Images encoded at one time.
    """

    encoder: VisionEncoder
    cache: FeatureCache | None
    frozen: bool
    augment: Callable[[Any, random.Random], Any] | None = None
    chunk: int = 16

    def prepare(self, images: Sequence[Any], rng: random.Random | None = None) -> Prepared:
        """Look images up or open them; may run in a loader process. Raises ImageError for one that cannot be opened."""
        prepared = Prepared([], {}, {})
        for position, image in enumerate(images):
            if self.frozen and self.augment is None:
                key = image_key(image)
                if key not in prepared.found and key not in prepared.pixels:
                    features = self.cache.get(key) if self.cache is not None else None
                    if features is None:
                        prepared.pixels[key] = self.encoder.preprocess(open_image(image))
                    else:
                        prepared.found[key] = features
            else:
                key = str(position)
                opened = open_image(image)
                if self.augment is not None and rng is not None:
                    opened = self.augment(opened, rng)
                prepared.pixels[key] = self.encoder.preprocess(opened)
            prepared.keys.append(key)
        return prepared

    def finish(self, prepared: Prepared) -> torch.Tensor | None:
        """[N, P, D] features in fp16 of a frozen encoder, or [N, 3, S, S] pixels; None for no images."""
        import torch

        if not prepared.keys:
            return None
        if not self.frozen:
            return torch.stack([prepared.pixels[key] for key in prepared.keys])
        # Whoever asks may be under autocast: what is kept must not depend on that, and fp16 cannot be stacked under it on a CPU.
        with torch.autocast(self.encoder.trunk.patch_embed.proj.weight.device.type, enabled=False):
            names = list(prepared.pixels)
            for start in range(0, len(names), self.chunk):
                part = names[start : start + self.chunk]
                for key, features in zip(part, self._encode(torch.stack([prepared.pixels[name] for name in part]))):
                    prepared.found[key] = features
                    if self.cache is not None and _names_image(key):
                        self.cache.put(key, features)
            return torch.stack([prepared.found[key] for key in prepared.keys])

    def __call__(self, images: Sequence[Any]) -> torch.Tensor | None:
        """Both steps at once."""
        return self.finish(self.prepare(images))

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Rounded to fp16 whether or not they go to disk, so that a first and a later epoch see the same numbers."""
        import torch

        weight = self.encoder.trunk.patch_embed.proj.weight
        with torch.no_grad():
            return self.encoder(pixels.to(weight.device, weight.dtype)).half().cpu()


def _names_image(key: str) -> bool:
    """Whether a key is an image's hash; those of pixels that differ each time only count within their sample."""
    return len(key) == 64


def merge_prepared(parts: Sequence[Prepared]) -> Prepared:
    """Join the images of several samples into those of a batch."""
    merged = Prepared([], {}, {})
    for number, part in enumerate(parts):
        names = {key: key if _names_image(key) else f"{number}/{key}" for key in part.keys}
        merged.keys.extend(names[key] for key in part.keys)
        merged.found.update({names[key]: value for key, value in part.found.items()})
        merged.pixels.update({names[key]: value for key, value in part.pixels.items()})
    return merged
