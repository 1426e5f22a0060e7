"""The whole model: packing, images in their places, the loss, and files."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import ARCHITECTURES, VIT, enliven, grads, make_batch, noise, talk, tiny_config, tiny_model, write_clip
from torch.nn import functional as F

from mmgpt.config import LanguageConfig, LoraConfig, ModelConfig, ProjectorConfig
from mmgpt.data import packing
from mmgpt.data.messages import MessageError, normalize
from mmgpt.data.packing import collate
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.errors import UsageError, UserError
from mmgpt.model import multimodal
from mmgpt.model.attention import Segments
from mmgpt.model.multimodal import MultimodalGPT

CONVERSATIONS = [
    talk([noise(0), "What is it?"], "A pear."),
    talk("No picture.", "So it is."),
    talk(["First", noise(1), "second", noise(2), "?"], "Different.") + talk("Sure?", "Yes."),
    talk([noise(3)], "A plum on a plate."),
]
FAMILIES = [family for family in ARCHITECTURES if family != "tied"]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_by_one(family):
    model = tiny_model(family)
    alone = [model(make_batch(model, [[conversation]]))[0] for conversation in CONVERSATIONS]
    assert all(logits.std() > 0.1 for logits in alone)
    packed = make_batch(model, [[CONVERSATIONS[0], CONVERSATIONS[1], CONVERSATIONS[3]], [CONVERSATIONS[2]]])
    assert packed.packed
    logits, real = model(packed), packed.segment_ids > 0
    expected = torch.cat([alone[0], alone[1], alone[3], alone[2]])
    torch.testing.assert_close(logits[real], expected, atol=1e-5, rtol=1e-5)
    grouped = make_batch(model, [[conversation] for conversation in CONVERSATIONS])
    assert not grouped.packed
    torch.testing.assert_close(model(grouped)[grouped.segment_ids > 0], torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(logits).all()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_another_document_changes_nothing_and_a_leak_would_be_seen(family, monkeypatch):
    """With plain causal attention the same comparison fails: the test can."""
    model = tiny_model(family)

    def second_document(first):
        batch = make_batch(model, [[first, CONVERSATIONS[2]]])
        return model(batch)[0, batch.segment_ids[0] == 2]

    firsts = [talk([noise(seed), "What is it?"], answer) for seed, answer in ((0, "A pear."), (9, "A plum!"))]
    torch.testing.assert_close(second_document(firsts[0]), second_document(firsts[1]), atol=1e-5, rtol=1e-5)
    leaky = torch.ones(512, 512, dtype=torch.bool).tril()
    monkeypatch.setattr(
        packing, "block_mask", lambda segments: leaky[None, None, : segments.shape[1], : segments.shape[1]]
    )
    monkeypatch.setattr(Segments, "of", classmethod(lambda cls, segment_ids: cls(None)))
    leaked = (second_document(firsts[0]) - second_document(firsts[1])).abs().max()
    assert leaked > 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_loss_of_a_packed_batch_is_the_sum_of_its_samples(family):
    model = tiny_model(family)
    packed = model.loss(make_batch(model, [CONVERSATIONS[:2], CONVERSATIONS[2:]]))
    packed.loss.backward()
    together = grads(model)
    model.zero_grad(set_to_none=True)
    parts = [model.loss(make_batch(model, [[conversation]])) for conversation in CONVERSATIONS]
    torch.testing.assert_close(packed.loss, sum(part.loss for part in parts), atol=1e-4, rtol=1e-5)
    assert packed.count == sum(part.count for part in parts)
    assert packed.correct == sum(part.correct for part in parts)
    for part in parts:
        part.loss.backward()
    for name, gradient in grads(model).items():
        torch.testing.assert_close(together[name], gradient, atol=1e-4, rtol=1e-3, msg=name)
    assert together["projector.fc1.weight"].abs().max() > 1e-3
    assert together["vision.trunk.patch_embed.proj.weight"].abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_loss_equals_cross_entropy_with_ignored_labels(family):
    model = tiny_model(family)
    batch = make_batch(model, [CONVERSATIONS[:2], CONVERSATIONS[2:]])
    logits = model(batch)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum")
    result = model.loss(batch)
    torch.testing.assert_close(result.loss, expected, atol=1e-4, rtol=1e-6)
    # Smoothed: (1 - e) of the loss, and e of the mean loss over the whole vocabulary.
    log_probs = logits.log_softmax(-1)[batch.targets >= 0]
    smoothed = 0.9 * expected - 0.1 * log_probs.mean(-1).sum()
    torch.testing.assert_close(model.loss(batch, label_smoothing=0.1).loss, smoothed, atol=1e-3, rtol=1e-5)
    learnt = batch.targets >= 0
    assert result.count == int(learnt.sum()) == batch.supervised
    assert result.correct == int((logits.argmax(-1) == batch.targets)[learnt].sum())


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_loss_in_chunks_is_the_same(monkeypatch, chunk):
    model = tiny_model("llama")
    batch = make_batch(model, [CONVERSATIONS])
    whole = model.loss(batch)
    whole.loss.backward()
    expected = grads(model)
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(multimodal, "LOSS_CHUNK", chunk)
    sizes = []
    chunk_loss = model._chunk_loss
    monkeypatch.setattr(model, "_chunk_loss", lambda rows, *rest: sizes.append(len(rows)) or chunk_loss(rows, *rest))
    result = model.loss(batch)
    result.loss.backward()
    assert max(sizes) <= chunk < result.count
    assert (result.count, int(result.correct)) == (whole.count, int(whole.correct))
    torch.testing.assert_close(result.loss, whole.loss, atol=1e-4, rtol=1e-6)
    for name, gradient in grads(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=name)


# Images in their places


@torch.no_grad()
@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "pixel_shuffle", "pool", "resampler"])
def test_embeddings_of_images_stand_where_their_placeholders_are(projector):
    model = tiny_model("llama", projector=projector)
    batch = make_batch(model, [[CONVERSATIONS[0]], [CONVERSATIONS[2]], [CONVERSATIONS[1]]])
    embeds = model.embed(batch.input_ids, batch.images)
    tokens = model.projector(model.vision(batch.images)).flatten(0, 1)
    at = 0
    table = model.language.get_input_embeddings().weight
    for row in range(3):
        for place, token in enumerate(batch.input_ids[row].tolist()):
            if token == model.tokenizer.image_id:
                torch.testing.assert_close(embeds[row, place], tokens[at], atol=1e-6, rtol=1e-6)
                at += 1
            else:
                assert torch.equal(embeds[row, place], table[token])
    assert at == len(tokens) == 3 * model.tokens_per_image


@torch.no_grad()
def test_features_stand_for_pixels():
    model = tiny_model("llama")
    batch = make_batch(model, [CONVERSATIONS[:1]])
    from_pixels = model(batch)
    batch.images = model.encode_images(batch.images)
    assert torch.equal(model(batch), from_pixels)


def test_a_wrong_number_of_images_names_the_samples():
    model = tiny_model("llama")
    batch = make_batch(model, [CONVERSATIONS[:1], CONVERSATIONS[2:3]])
    for images in (None, batch.images[:2], torch.cat([batch.images, batch.images])):
        with pytest.raises(MessageError, match=r"48 image tokens but \d+ feature rows in a\.json:1, a\.json:2") as caught:
            model.embed(batch.input_ids, images, ["a.json:1", "a.json:2"])
        assert caught.value.reason == "image_count"


def test_a_prompt_that_does_not_fit_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(UserError, match=r"this model reads fewer than 512"):
        model.prompt(talk("x" * 600)[:1])
    ids, images = model.prompt(talk([noise(0), "x"])[:1])
    assert images and int((ids == model.tokenizer.image_id).sum()) == 16
    with pytest.raises(MessageError):
        tiny_model("llama", vision=False).prompt(talk([noise(0), "x"])[:1])


@torch.no_grad()
def test_prompts_are_embedded_the_same_in_chunks():
    model = tiny_model("llama")
    prompts = [conversation[:1] for conversation in CONVERSATIONS]
    whole = model.embed_prompts(prompts)
    for a, b in zip(whole, model.embed_prompts(prompts, chunk=2)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    encoded = model.encode(normalize(prompts[2]), prompt=True)
    batch = collate([[encoded]], model.tokenizer.pad_id)
    torch.testing.assert_close(whole[2], model.embed(batch.input_ids, model.pixels(batch.images))[0], atol=1e-6, rtol=1e-6)


# From a configuration


def test_from_scratch_weights_follow_gpt2():
    torch.manual_seed(0)
    model = MultimodalGPT.from_config(
        ModelConfig(
            vision=None,
            language=LanguageConfig(architecture={**ARCHITECTURES["gpt2"], "n_embd": 128, "n_layer": 8}),
        )
    )
    for name, parameter in model.language.named_parameters():
        if parameter.dim() >= 2:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
    assert model.accepts_images is False and model.tokens_per_image == 0 and model.context == 512


def test_architectures_that_do_not_exist_are_named():
    for architecture, message in (
        ({"hidden_size": 32}, "model_type"),
        ({"model_type": "llamma"}, "llamma"),
        ({"model_type": "llama", "hiden_size": 32}, "hiden_size: did you mean hidden_size"),
        ({**ARCHITECTURES["llama"], "hidden_size": 33}, "architecture"),
    ):
        with pytest.raises(UsageError, match=message):
            MultimodalGPT.from_config(ModelConfig(vision=None, language=LanguageConfig(architecture=architecture)))


def test_a_language_model_is_read_without_a_word(parts, capfd):
    MultimodalGPT.from_config(named_config(parts))
    assert capfd.readouterr() == ("", "")


def test_a_language_model_that_lacks_weights_is_refused(parts):
    from safetensors.torch import load_file, save_file

    weights = parts / "language" / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "layers.1.mlp" not in k}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: model\.layers\.1\.mlp"):
        MultimodalGPT.from_config(named_config(parts))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a language model that transformers reads"):
        MultimodalGPT.from_config(named_config(parts))
    with pytest.raises(UserError, match="</s>"):
        MultimodalGPT.from_config(replace(named_config(parts), template="vicuna"))


# Files


@pytest.fixture
def parts(tmp_path):
    """A language model and an encoder in directories, as named parts are."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tokenizer = Tokenizer.bytes()
    from mmgpt.model.language import make_language

    torch.manual_seed(0)
    enliven(make_language(ARCHITECTURES["tied"], tokenizer)).save_pretrained(tmp_path / "language")
    tokenizer.save(tmp_path / "language")
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
        )
    )
    write_clip(tmp_path / "vision", enliven(tower))
    return tmp_path


def named_config(parts, *, language: int = 0, vision: int = 0, **changes) -> ModelConfig:
    """Parts by name, with adapters of the given ranks."""
    from mmgpt.config import VisionConfig

    shape = {key: value for key, value in VIT.items() if key not in ("pretrained", "img_size")}
    return ModelConfig(
        vision=VisionConfig(
            name=str(parts / "vision"), layer=-1, options={**shape, "mlp_ratio": 2}, lora=LoraConfig(rank=vision)
        ),
        projector=ProjectorConfig(kind="pixel_shuffle"),
        language=LanguageConfig(name=str(parts / "language"), lora=LoraConfig(rank=language)),
        **changes,
    )


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        images = [0, 2, 3] if model.accepts_images else []
        chosen = [CONVERSATIONS[i] for i in images] or [CONVERSATIONS[1]]
        return torch.cat([model(make_batch(model, [[conversation]]))[0] for conversation in chosen])


def train(model, *names: str) -> None:
    """Change the weights whose name holds one of `names`, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("family", ["llama", "tied", "gpt2", "gemma3"])
def test_a_model_from_scratch_round_trips(tmp_path, family, full):
    model = tiny_model(family, projector="resampler", template="plain")
    model.save_pretrained(tmp_path / "model", full=full)
    loaded = MultimodalGPT.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    assert loaded.template.name == "plain" and loaded.config == model.config
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    tied = family != "llama"
    embedding, output = loaded.language.get_input_embeddings().weight, loaded.language.get_output_embeddings().weight
    assert (embedding.data_ptr() == output.data_ptr()) == tied
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_text_model_round_trips(tmp_path):
    model = tiny_model("qwen2", vision=False)
    model.save_pretrained(tmp_path / "model")
    loaded = MultimodalGPT.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model)) and loaded.vision is None and loaded.projector is None
    assert not (tmp_path / "model" / "preprocessor_config.json").exists()


def stored(folder) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("full", [True, False])
def test_named_parts_and_what_is_stored_of_them(parts, full):
    model = MultimodalGPT.from_config(named_config(parts))
    train(model, "projector")
    model.save_pretrained(parts / "model", full=full)
    assert {key.split(".")[0] for key in stored(parts / "model")} == (
        {"vision", "projector", "language"} if full else {"projector"}
    )
    assert torch.equal(logits(MultimodalGPT.from_pretrained(parts / "model")), logits(model))
    if full:
        # A whole model needs its parts no more.
        (parts / "language").rename(parts / "moved")
        (parts / "vision").rename(parts / "moved-too")
        assert torch.equal(logits(MultimodalGPT.from_pretrained(parts / "model")), logits(model))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("ranks", [{"language": 4}, {"vision": 4}, {"language": 4, "vision": 2}])
def test_adapters_round_trip_and_come_back_merged(parts, ranks, full):
    model = MultimodalGPT.from_config(named_config(parts, **ranks))
    train(model, "projector", ".lora_")
    expected = logits(model)
    model.save_pretrained(parts / "model", full=full)
    if not full:
        assert all(key.startswith("projector.") or ".lora_" in key for key in stored(parts / "model"))
    loaded = MultimodalGPT.from_pretrained(parts / "model")
    assert not any(".lora_" in name for name in loaded.state_dict()) and set(ranks) <= loaded.altered
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)
    # What was merged is not what its name stands for: it is stored whole from now on.
    loaded.save_pretrained(parts / "again", full=False)
    torch.testing.assert_close(logits(MultimodalGPT.from_pretrained(parts / "again")), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("full", [True, False])
def test_two_stages(parts, full):
    """Stage 1 trains the projector, stage 2 adapters on top of it, in the names of the parts given at the start."""
    first = MultimodalGPT.from_config(named_config(parts))
    train(first, "projector")
    first.save_pretrained(parts / "run1" / "model", full=full)
    config = named_config(parts, language=4, vision=2, template="plain", init_from=str(parts / "run1"))
    second = MultimodalGPT.from_config(config)
    assert second.template.name == "plain" and second.lora_rank("language") == 4 and second.lora_rank("vision") == 2
    third = tiny_restart(first, "plain")
    torch.testing.assert_close(logits(second), logits(third))
    train(second, "projector", ".lora_")
    second.save_pretrained(parts / "run2", full=False)
    loaded = MultimodalGPT.from_pretrained(parts / "run2")
    torch.testing.assert_close(logits(loaded), logits(second), atol=1e-5, rtol=1e-5)
    assert loaded.config.init_from == str(parts / "run1")


def tiny_restart(model, template):
    return model.restart(replace(model.config, template=template))


def test_a_part_that_was_stored_in_half_precision_is_trained_in_single(tmp_path):
    model = tiny_model("llama")
    model.language.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    config = replace(tiny_config("llama"), init_from=str(tmp_path / "model"))
    again = MultimodalGPT.from_config(config)
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_saving_replaces_what_was_there(tmp_path):
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "left-over.txt").write_text("")
    second = tiny_model("llama", seed=2)
    second.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(MultimodalGPT.from_pretrained(tmp_path / "model")), logits(second))
    assert not (tmp_path / "model" / "left-over.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_leaves_the_model_before_it_whole(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    before = logits(model)
    train(model, "projector")
    for error in (OSError(28, "No space left on device"), SafetensorError("IoError: No space left on device")):

        def fail(state, path, metadata=None, error=error):
            path.write_bytes(b"half of it")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr("safetensors.torch.save_file", fail)
            with pytest.raises(UserError, match="No space left"):
                model.save_pretrained(tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert torch.equal(logits(MultimodalGPT.from_pretrained(tmp_path / "model")), before)
    replace_file = multimodal.os.replace

    def fail_at_the_end(source, target):
        if source.name == "model" and source.parent.name.startswith("."):
            raise OSError(5, "Input/output error")
        replace_file(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(multimodal.os, "replace", fail_at_the_end)
        with pytest.raises(UserError, match="cannot save the model in"):
            model.save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(logits(MultimodalGPT.from_pretrained(tmp_path / "model")), before)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot save the model in"):
        model.save_pretrained(tmp_path / "file" / "model")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("llama").save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("truncated", "model"),
        ("no weights", "model"),
        ("no config", "model"),
        ("bad json", "model"),
        ("another project's config", "model"),
        ("no altered", "altered"),
        ("no tokenizer", r"tokenizer\.json"),
        ("other shape", r"projector\.fc2\.weight is \[32, 16\], config\.json says \[32, 32\]"),
        ("lacks a weight", r"lacks language\.model\.norm\.weight"),
        ("unknown weight", r"has projector\.fc3"),
    ],
)
def test_damaged_models_are_named(tmp_path, saved, damage, named):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    state, description = load_file(weights), json.loads(config.read_text())
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "bad json":
        config.write_text(config.read_text()[:-20])
    elif damage == "another project's config":
        config.write_text('{"model_type": "llama"}')
    elif damage == "no altered":
        del description["altered"]
        config.write_text(json.dumps(description))
    elif damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        if damage == "other shape":
            state["projector.fc2.weight"] = state["projector.fc2.weight"][:, :16].contiguous()
        elif damage == "lacks a weight":
            del state["language.model.norm.weight"]
        else:
            state["projector.fc3"] = torch.zeros(1)
        save_file(state, weights)
    with pytest.raises(UserError, match=named) as caught:
        MultimodalGPT.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_a_run_folder_stands_for_its_model(saved):
    assert torch.equal(logits(MultimodalGPT.from_pretrained(saved.parent)), logits(MultimodalGPT.from_pretrained(saved)))
    with pytest.raises(UserError, match="holds no model"):
        MultimodalGPT.from_pretrained(saved.parent / "nothing")
