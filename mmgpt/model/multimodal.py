"""The whole model: image encoder, projector, language model, and the conversation form that joins them."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from mmgpt.config import LanguageConfig, LoraConfig, ModelConfig, ProjectorConfig, VisionConfig
from mmgpt.data.messages import Message, MessageError, normalize, user
from mmgpt.data.packing import Batch
from mmgpt.data.template import Encoded, control_id, encode, get_template
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.errors import UserError
from mmgpt.model.adapters import add_lora, merge_lora
from mmgpt.model.attention import Segments
from mmgpt.model.language import by_segments, hidden_states, load_language, load_tokenizer, logits_of, make_language, width_of
from mmgpt.model.projector import Projector, make_projector
from mmgpt.model.vision import VisionEncoder, load_vision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mmgpt.generate import Answer, Sampling
    from mmgpt.model.decoder import Decoder

PARTS = ("vision", "projector", "language")
LOSS_CHUNK = 1024
"""Supervised positions whose logits exist at one time: [LOSS_CHUNK, V]."""


@dataclass
class LossSum:
    """Cross-entropy over a batch.

    Args:
        loss: Sum over the supervised positions, scalar with gradient.
        count: Supervised positions.
        correct: Those whose most likely token is the target, scalar.
    """

    loss: torch.Tensor
    count: int
    correct: torch.Tensor


class MultimodalGPT(nn.Module):
    """Image patches enter a decoder-only language model as rows of its input.

    Every image stands in `input_ids` as `tokens_per_image` image tokens, whose embeddings are replaced by the projected patch
    features in one scatter. Images may stand anywhere in a conversation, any number of them.

    Args:
        config: What the model was built from; saved beside the weights.
        tokenizer: Text to ids; holds the image token.
        language: The decoder.
        vision: The encoder; None makes a model of text alone.
        projector: Joins the two; None exactly where `vision` is.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        language: PreTrainedModel,
        vision: VisionEncoder | None = None,
        projector: Projector | None = None,
    ):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.template = get_template(config.template)
        self.vision = vision
        self.projector = projector
        self.language = language
        # What `mmgpt.load` prepared to answer with; without, every call of `generate` makes one from the weights as they are.
        self.decoder: Decoder | None = None
        self.image_source: Callable[[Sequence[Any]], torch.Tensor] | None = None
        # Parts that are no longer what their name stands for, and so are stored whole.
        self.altered: set[str] = {"projector"} if vision is not None else set()
        if config.language.architecture is not None:
            self.altered.add("language")
        if config.vision is not None and config.vision.options.get("pretrained") is False:
            self.altered.add("vision")

    @classmethod
    def from_config(cls, config: ModelConfig) -> MultimodalGPT:
        """Build the model with the weights its configuration names; `init_from` starts from a trained model instead."""
        if config.init_from is not None:
            return cls.from_pretrained(config.init_from).restart(config)
        tokenizer = load_tokenizer(config.language)
        # A template that does not fit is reported before the large part is read.
        control_id(tokenizer, get_template(config.template).end)
        language = load_language(config.language, tokenizer)
        vision = projector = None
        if config.vision is not None:
            vision = load_vision(config.vision)
            projector = make_projector(config.projector, grid=vision.grid, width=vision.width, hidden=width_of(language))
        model = cls(config, tokenizer, language, vision, projector)
        model.add_adapters()
        return model

    def restart(self, config: ModelConfig) -> MultimodalGPT:
        """Begin a new run from this model: its parts stay, adapters and template are the new configuration's."""
        kept = dataclasses.replace(self.config, template=config.template, init_from=config.init_from)
        kept.language = dataclasses.replace(kept.language, lora=config.language.lora)
        if kept.vision is not None and config.vision is not None:
            kept.vision = dataclasses.replace(kept.vision, lora=config.vision.lora)
        self.config = kept
        self.template = get_template(kept.template)
        # A frozen part may have been stored in half precision; what learns is kept in single.
        self.float()
        self.add_adapters()
        return self

    def add_adapters(self) -> None:
        """Put LoRA where the configuration asks for it."""
        if self.config.language.lora.rank:
            add_lora(self.language, self.config.language.lora)
        if self.vision is not None and self.config.vision is not None and self.config.vision.lora.rank:
            add_lora(self.vision, self.config.vision.lora)

    # What the model is

    @property
    def accepts_images(self) -> bool:
        return self.vision is not None

    @property
    def tokens_per_image(self) -> int:
        return 0 if self.projector is None else self.projector.tokens

    @property
    def context(self) -> int:
        """Longest sequence the language model has positions for."""
        settings = self.language.config
        for name in ("max_position_embeddings", "n_positions"):
            if getattr(settings, name, None):
                return int(getattr(settings, name))
        return 1 << 20

    @property
    def embedding(self) -> nn.Embedding:
        """The language model's token embedding."""
        embedding: Any = self.language.get_input_embeddings()
        return embedding

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    # Forward

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, 3, S, S] normalised pixels -> [N, P, D] patch features."""
        assert self.vision is not None
        return self.vision(pixels.to(self.vision.trunk.patch_embed.proj.weight.dtype))

    def embed(self, input_ids: torch.Tensor, images: torch.Tensor | None, where: Sequence[str] = ()) -> torch.Tensor:
        """Token embeddings with the images in their places.

        Args:
            input_ids: [B, L].
            images: Pixels [N, 3, S, S] or patch features [N, P, D], in the order of their placeholders; None: no images.
            where: Samples of the batch, for the message.

        Returns:
            [B, L, H].

        Raises:
            MessageError: `image_count` where placeholders and feature rows differ in number.
        """
        slots = input_ids == self.tokenizer.image_id
        embeds = self.embedding(input_ids.masked_fill(slots, 0))
        placeholders = int(slots.sum())
        if images is None or images.shape[0] == 0:
            rows = embeds.new_zeros(0, embeds.shape[-1])
        else:
            assert self.projector is not None
            features = self.encode_images(images) if images.dim() == 4 else images
            dtype = next(self.projector.parameters()).dtype
            rows = self.projector(features.to(dtype)).flatten(0, 1).to(embeds.dtype)
        if placeholders != rows.shape[0]:
            names = f" in {', '.join(where)}" if where else ""
            raise MessageError("image_count", f"{placeholders} image tokens but {rows.shape[0]} feature rows{names}")
        return embeds.masked_scatter(slots[..., None], rows) if placeholders else embeds

    def hidden(self, batch: Batch) -> torch.Tensor:
        """[B, L, H] final hidden states of a batch whose `images` are tensors; samples of one row do not see each other."""
        embeds = self.embed(batch.input_ids, batch.images, batch.where)
        if by_segments(self.language) and batch.separate:
            positions = batch.position_ids if batch.packed else None
            return hidden_states(self.language, embeds, positions, None, Segments.of(batch.segment_ids))
        mask = batch.mask()
        return hidden_states(self.language, embeds, None if mask is None else batch.position_ids, mask)

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, L, V] next-token logits in fp32."""
        return logits_of(self.language, self.hidden(batch))

    def loss(self, batch: Batch, *, label_smoothing: float = 0.0) -> LossSum:
        """Cross-entropy summed over the supervised positions; logits are made for those alone, a chunk at a time."""
        hidden = self.hidden(batch)
        learnt = batch.targets >= 0
        rows, targets = hidden[learnt], batch.targets[learnt]
        # The sum of nothing keeps the graph, so that a batch without targets has a (zero) gradient like any other.
        total = rows[:0].float().sum()
        correct = torch.zeros((), device=rows.device, dtype=torch.long)
        many = rows.shape[0] > LOSS_CHUNK and torch.is_grad_enabled()
        for start in range(0, rows.shape[0], LOSS_CHUNK):
            chunk = rows[start : start + LOSS_CHUNK], targets[start : start + LOSS_CHUNK], label_smoothing
            if many:
                from torch.utils.checkpoint import checkpoint

                part, right = checkpoint(self._chunk_loss, *chunk, use_reentrant=False)
            else:
                part, right = self._chunk_loss(*chunk)
            total, correct = total + part, correct + right
        return LossSum(total, int(targets.numel()), correct)

    def _chunk_loss(self, rows: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits_of(self.language, rows)
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
        return loss, (logits.detach().argmax(-1) == targets).sum()

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's layers."""
        base: Any = self.language.base_model
        blocks = getattr(base, "layers", None) or getattr(base, "h", None)
        if blocks is None:
            raise UserError(f"{type(base).__name__} has no list of blocks that is known here: neither `layers` nor `h`")
        return list(blocks)

    def compile_blocks(self) -> None:
        """`torch.compile` every decoder block; they share one compilation, so it takes seconds, not minutes."""
        for block in self.blocks:
            block.compile(dynamic=True)

    # Prompts and answers

    def encode(self, messages: Sequence[Message], *, prompt: bool = False) -> Encoded:
        """Ids and loss mask of a conversation in this model's template."""
        return encode(messages, self.tokenizer, self.template, self.tokens_per_image, prompt=prompt)

    def prompt(self, messages: Any) -> tuple[torch.Tensor, list[Any]]:
        """Render a conversation up to where the assistant speaks.

        Returns:
            Ids [L] and the images in the order of their placeholders.

        Raises:
            UserError: the conversation breaks the form, or is longer than the model's window.
        """
        encoded = self.encode(normalize(messages), prompt=True)
        if len(encoded) >= self.context:
            raise UserError(
                f"the conversation has {len(encoded)} tokens, this model reads fewer than {self.context}: shorten the question"
            )
        return torch.tensor(encoded.ids, dtype=torch.long), encoded.images

    def pixels(self, images: Sequence[Any]) -> torch.Tensor:
        """Open and preprocess images: [N, 3, S, S] on the model's device."""
        from mmgpt.data.images import open_image

        assert self.vision is not None
        return torch.stack([self.vision.preprocess(open_image(image)) for image in images]).to(self.device)

    @torch.inference_mode()
    def embed_prompts(self, conversations: Sequence[Any], *, chunk: int = 16) -> list[torch.Tensor]:
        """Input embeddings of prompts, one [L_i, H] each; the images of `chunk` prompts are encoded together."""
        result: list[torch.Tensor] = []
        for start in range(0, len(conversations), chunk):
            prompts = [self.prompt(messages) for messages in conversations[start : start + chunk]]
            images = [image for _, found in prompts for image in found]
            features = self.image_features(images) if images else None
            at = 0
            for ids, found in prompts:
                own = None if features is None else features[at : at + len(found)]
                at += len(found)
                result.append(self.embed(ids[None].to(self.device), own)[0])
        return result

    def image_features(self, images: Sequence[Any]) -> torch.Tensor:
        """Patch features of images, [N, P, D]; from `image_source` where training left one with its cache."""
        if self.image_source is not None:
            return self.image_source(images).to(self.device)
        return self.encode_images(self.pixels(images))

    def ask(self, image: Any, question: str = "Describe this image.", *, sampling: Sampling | None = None) -> str:
        """Answer a question about an image (a path, bytes, a PIL image; a list of them; or None for text alone).

        >>> mmgpt.load("runs/quickstart").ask("photo.jpg", "What fruit is this?")  # doctest: +SKIP
        'Granny Smith'
        """
        return self.generate([[user(question, _as_list(image))]], sampling=sampling)[0].text

    def ask_batch(self, pairs: Sequence[tuple[Any, str]], *, sampling: Sampling | None = None, batch_size: int = 16) -> list[str]:
        """Answer many (image, question) pairs, `batch_size` side by side; the same answers as one by one."""
        conversations = [[user(question, _as_list(image))] for image, question in pairs]
        return [answer.text for answer in self.generate(conversations, sampling=sampling, batch_size=batch_size)]

    def generate(self, conversations: Sequence[Any], *, sampling: Sampling | None = None, batch_size: int = 16) -> list[Answer]:
        """Answer conversations, at most `batch_size` side by side; see `mmgpt.generate.generate`."""
        from mmgpt.generate import Sampling, generate

        return generate(self, conversations, sampling or Sampling(), batch_size, decoder=self.decoder)

    def stream(self, messages: Any, *, sampling: Sampling | None = None) -> Iterator[str]:
        """Answer one conversation piece by piece; see `mmgpt.generate.stream`."""
        from mmgpt.generate import Sampling, stream

        return stream(self, messages, sampling or Sampling(), decoder=self.decoder)

    # Files

    def save_pretrained(self, folder: str | Path, *, full: bool = True, beside: Callable[[Path], None] | None = None) -> None:
        """Write config.json, model.safetensors, the tokenizer and preprocessor_config.json, all or nothing.

        Args:
            folder: Replaced where it exists.
            full: Store every weight; False stores what training changed (adapters, where that is all that changed in a part)
                and leaves the rest to be found by name when the model is loaded.
            beside: Writes more files into the folder it is given, before that takes its place.

        Raises:
            UserError: the disk is full or cannot be written to; what was in `folder` is still there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        folder = Path(folder)
        altered = [part for part in PARTS if full or part in self.altered]
        weights = self.state_dict()
        state = {key: weights[key].detach().contiguous().cpu() for key in self._stored(altered)}
        description = {
            "format": 1,
            **dataclasses.asdict(self.config),
            "altered": altered,
            "vision_info": self.vision.info if self.vision is not None else None,
            "language_info": self.language.config.to_diff_dict(),
        }
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
                fresh = Path(temporary) / "model"
                fresh.mkdir()
                save_file(state, fresh / "model.safetensors", metadata={"format": "pt"})
                (fresh / "config.json").write_text(json.dumps(description, indent=2, default=str) + "\n", encoding="utf-8")
                self.tokenizer.save(fresh)
                if self.vision is not None:
                    settings = dataclasses.asdict(self.vision.preprocess)
                    (fresh / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
                if beside is not None:
                    beside(fresh)
                old = Path(temporary) / "old"
                if folder.exists():
                    os.replace(folder, old)
                try:
                    os.replace(fresh, folder)
                except OSError:
                    if old.exists():
                        os.replace(old, folder)
                    raise
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot save the model in {folder}: {error} (is the disk full?)") from error

    def lora_rank(self, part: str) -> int:
        """Rank of the adapters in a part; 0 where there are none."""
        if part == "vision":
            return self.config.vision.lora.rank if self.config.vision is not None else 0
        return self.config.language.lora.rank if part == "language" else 0

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> MultimodalGPT:
        """Read a model that `save_pretrained` wrote, or the exported model of a run folder; adapters are merged.

        Args:
            folder: Where it is.
            dtype: Of the parts that are found by name, which then never stand in memory in single precision.

        Raises:
            UserError: the folder holds no model, or its weights do not fit its configuration.
        """
        from accelerate import init_empty_weights
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = find_model(folder)
        try:
            description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            config = model_config(description)
            altered = set(description["altered"])
            state = load_file(folder / "model.safetensors")
        except (OSError, KeyError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder} does not hold a complete mmgpt model (was it cut short?): {error}") from error
        tokenizer = Tokenizer.load(folder)
        vision = projector = None
        if config.vision is not None:
            vision = load_vision(config.vision, info=description["vision_info"] if "vision" in altered else None, dtype=dtype)
        if "language" in altered:
            with init_empty_weights(include_buffers=False):
                language = make_language(description["language_info"], tokenizer, initialize=False)
        else:
            language = load_language(config.language, tokenizer, dtype)
        if vision is not None:
            hidden = width_of(language)
            projector = make_projector(config.projector, grid=vision.grid, width=vision.width, hidden=hidden)
        model = cls(config, tokenizer, language, vision, projector)
        model.altered |= altered
        model.add_adapters()
        model._load(state, folder)
        model.merge_adapters()
        return model.eval()

    def _stored(self, whole: Collection[str]) -> list[str]:
        """Names of the weights in a file: all of the parts stored whole, the adapters of the others; tied ones once."""
        tied = {f"language.{key}" for key in getattr(self.language, "all_tied_weights_keys", None) or ()}
        return [key for key in self.state_dict() if key not in tied and (key.split(".")[0] in whole or ".lora_" in key)]

    def _load(self, state: dict[str, torch.Tensor], folder: Path) -> None:
        expected = self.state_dict()
        if missing := [key for key in self._stored(self.altered) if key not in state]:
            raise UserError(f"{folder}/model.safetensors lacks {missing[0]} and {len(missing) - 1} more: save or copy it again")
        for key, value in state.items():
            if key not in expected:
                raise UserError(f"{folder}/model.safetensors has {key}, which this configuration has no place for")
            if expected[key].shape != value.shape:
                raise UserError(
                    f"{folder}/model.safetensors: {key} is {list(value.shape)}, config.json says {list(expected[key].shape)}"
                )
        self.load_state_dict(state, strict=False, assign=True)
        self.language.tie_weights()

    def merge_adapters(self) -> None:
        """Add every adapter to its weight; the model is then plain, and the parts that had them count as altered."""
        if self.lora_rank("language"):
            merge_lora(self.language)
            self.config.language = dataclasses.replace(self.config.language, lora=LoraConfig())
            self.altered.add("language")
        if self.vision is not None and self.config.vision is not None and self.lora_rank("vision"):
            merge_lora(self.vision)
            self.config.vision = dataclasses.replace(self.config.vision, lora=LoraConfig())
            self.altered.add("vision")


def find_model(folder: str | Path) -> Path:
    """The folder with config.json: the one named, or `model/` in a run's. Raises UserError where there is neither."""
    folder = Path(folder)
    for candidate in (folder / "model", folder):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    raise UserError(f"{folder} holds no model: expected config.json and model.safetensors there or in {folder / 'model'}")


def model_config(description: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` inside an exported config.json."""

    def lora(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "lora": LoraConfig(**part["lora"])}

    vision = description["vision"]
    return ModelConfig(
        vision=None if vision is None else VisionConfig(**lora(vision)),
        projector=ProjectorConfig(**description["projector"]),
        language=LanguageConfig(**lora(description["language"])),
        template=description["template"],
        init_from=description.get("init_from"),
    )


def _as_list(image: Any) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]
