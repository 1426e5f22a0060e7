"""The whole forward pass against transformers' LlavaForConditionalGeneration on the same weights."""

import pytest
import torch
from tiny_models import enliven, make_batch, noise, talk, write_clip

from mmgpt.config import LanguageConfig, ModelConfig, ProjectorConfig
from mmgpt.data.tokenizer import Tokenizer
from mmgpt.model.multimodal import MultimodalGPT

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
CONVERSATIONS = {
    "no image": [talk("What is a pear?", "A fruit.")],
    "image first": [talk([noise(0), "What?"], "A pear.")],
    "image last": [talk(["Look at this:", noise(1)], "A plum.")],
    "three images": [talk([noise(2), "or", noise(3), noise(4), "?"]) + talk("And now?", "No.")],
    "in a later turn": [talk("Hello", "Hi.") + talk(["And this:", noise(5), "?"], "An apple.")],
    "lengths": [
        talk([noise(6), "What is shown in this picture, in a few words?"], "A cherry on a table."),
        talk("No picture here."),
        talk(["Two:", noise(7), noise(8)], "Different."),
    ],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = Tokenizer.bytes()
    text = LlamaConfig(
        vocab_size=264, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER, image_size=32, patch_size=8, hidden_act="quick_gelu"),
        text_config=text,
        image_token_index=tokenizer.image_id,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    theirs = enliven(LlavaForConditionalGeneration(config)).eval()
    language = LlamaForCausalLM(text)
    language.model.load_state_dict(theirs.model.language_model.state_dict())
    language.lm_head.load_state_dict(theirs.lm_head.state_dict())
    language.save_pretrained(folder / "language")
    tokenizer.save(folder / "language")
    ours = MultimodalGPT.from_config(
        ModelConfig(
            vision=write_clip(folder / "vision", theirs.model.vision_tower, layer=-2),
            projector=ProjectorConfig(kind="mlp2x_gelu"),
            language=LanguageConfig(name=str(folder / "language")),
        )
    ).eval()
    projector = theirs.model.multi_modal_projector
    ours.projector.fc1.load_state_dict(projector.linear_1.state_dict())
    ours.projector.fc2.load_state_dict(projector.linear_2.state_dict())
    return ours, theirs


def their_logits(theirs, batch):
    return theirs(
        input_ids=batch.input_ids, attention_mask=(batch.segment_ids > 0).long(), pixel_values=batch.images, use_cache=False
    ).logits


@torch.no_grad()
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_logits_equal_transformers_llava(pair, name):
    ours, theirs = pair
    batch = make_batch(ours, [[conversation] for conversation in CONVERSATIONS[name]])
    real = batch.segment_ids > 0
    expected = their_logits(theirs, batch)[real]
    assert expected.std() > 0.3  # the comparison is of something
    torch.testing.assert_close(ours(batch)[real], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_packed_row_equals_transformers_llava_one_by_one(pair):
    ours, theirs = pair
    conversations = CONVERSATIONS["lengths"]
    packed = ours(make_batch(ours, [conversations]))[0]
    alone = [their_logits(theirs, make_batch(ours, [[conversation]]))[0] for conversation in conversations]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=0)


@torch.no_grad()
def test_order_of_images_matters(pair):
    ours, _ = pair
    first, second = (make_batch(ours, [[talk([noise(a), "and", noise(b)])]]) for a, b in ((1, 2), (2, 1)))
    assert (ours(first)[0, -1] - ours(second)[0, -1]).abs().max() > 0.01


def test_loss_and_gradients_equal_transformers_llava(pair):
    """Their loss is the mean over labels that are not -100; ours is the sum with its count."""
    ours, theirs = pair
    batch = make_batch(ours, [[conversation] for conversation in CONVERSATIONS["lengths"]])
    labels = torch.full_like(batch.input_ids, -100)
    labels[:, 1:] = batch.targets[:, :-1]
    expected = theirs(
        input_ids=batch.input_ids, attention_mask=(batch.segment_ids > 0).long(), pixel_values=batch.images, labels=labels
    ).loss
    result = ours.loss(batch)
    assert result.count == int((labels >= 0).sum())
    torch.testing.assert_close(result.loss / result.count, expected, atol=1e-5, rtol=0)
    expected.backward()
    (result.loss / result.count).backward()
    their_projector = theirs.model.multi_modal_projector
    for mine, other in (
        (ours.projector.fc1.weight, their_projector.linear_1.weight),
        (ours.vision.trunk.patch_embed.proj.weight, _patch_embedding(theirs)),
        (ours.language.lm_head.weight, theirs.lm_head.weight),
    ):
        assert other.grad.abs().max() > 1e-4
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-3)
    for model in pair:
        model.zero_grad(set_to_none=True)


def _patch_embedding(theirs):
    return next(p for n, p in theirs.model.vision_tower.named_parameters() if n.endswith("patch_embedding.weight"))
