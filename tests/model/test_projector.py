"""Projectors: how many tokens, from which patches, and that all of them learn."""

import pytest
import torch
from torch.nn import functional as F

from mmgpt.config import ProjectorConfig
from mmgpt.errors import UsageError
from mmgpt.model.projector import PixelShuffle, make_projector

GRID, WIDTH, HIDDEN = (4, 6), 5, 8
TOKENS = {"linear": 24, "mlp2x_gelu": 24, "pixel_shuffle": 6, "pool": 6, "resampler": 3}


def make(kind, grid=GRID, **changes):
    torch.manual_seed(0)
    config = ProjectorConfig(kind=kind, **{"queries": 3, "heads": 2, **changes})
    return make_projector(config, grid=grid, width=WIDTH, hidden=HIDDEN)


def test_every_kind_of_the_configuration_is_tested():
    from typing import get_args, get_type_hints

    assert set(TOKENS) == set(get_args(get_type_hints(ProjectorConfig)["kind"]))


@pytest.mark.parametrize("kind", TOKENS)
def test_shapes_and_gradients(kind):
    projector = make(kind)
    assert projector.tokens == TOKENS[kind]
    features = torch.randn(2, 24, WIDTH, requires_grad=True)
    tokens = projector(features)
    assert tokens.shape == (2, TOKENS[kind], HIDDEN)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters() if p.requires_grad)
    assert (features.grad.abs().sum(-1) > 0).all()  # every patch is seen


@torch.no_grad()
@pytest.mark.parametrize("kind", TOKENS)
def test_images_of_a_batch_do_not_mix(kind):
    projector = make(kind)
    features = torch.randn(3, 24, WIDTH)
    together = projector(features)
    alone = torch.cat([projector(features[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
    assert projector(features[:0]).shape == (0, TOKENS[kind], HIDDEN)


@torch.no_grad()
def test_mlp_is_two_layers_with_exact_gelu():
    projector = make("mlp2x_gelu", width=7)
    x = torch.randn(1, 24, WIDTH)
    hidden = x @ projector.fc1.weight.T + projector.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    assert hidden.shape[-1] == 7
    torch.testing.assert_close(projector(x), hidden @ projector.fc2.weight.T + projector.fc2.bias, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("factor", [1, 2])
def test_pixel_shuffle_against_a_loop(factor):
    projector = make("pixel_shuffle", factor=factor)
    features = torch.arange(2 * 24 * WIDTH).float().view(2, 24, WIDTH)
    found = projector.shuffle(features)
    rows, columns = GRID
    assert found.shape == (2, 24 // factor**2, factor**2 * WIDTH)
    for image in range(2):
        token = 0
        for top in range(0, rows, factor):
            for left in range(0, columns, factor):
                block = [
                    features[image, (top + y) * columns + left + x] for y in range(factor) for x in range(factor)
                ]
                assert torch.equal(found[image, token], torch.cat(block))
                token += 1


@torch.no_grad()
def test_pool_against_average_pooling():
    projector = make("pool", factor=2)
    features = torch.randn(2, 24, WIDTH)
    expected = F.avg_pool2d(features.transpose(1, 2).view(2, WIDTH, *GRID), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(projector.pool(features), expected)


@pytest.mark.parametrize("kind", ["pixel_shuffle", "pool"])
@pytest.mark.parametrize("factor", [0, 3, 4, 5])
def test_a_factor_that_does_not_divide_the_grid(kind, factor):
    with pytest.raises(UsageError, match=rf"factor {factor} does not divide the 4 x 6 patch grid; these do: \[1, 2\]"):
        make(kind, factor=factor)


def test_resampler_knows_where_patches_stand_and_checks_its_heads():
    projector = make("resampler")
    features = torch.randn(1, 24, WIDTH)
    with torch.no_grad():
        projector.positions.mul_(50)
        assert (projector(features) - projector(features.flip(1))).abs().max() > 1e-3
    assert make("resampler", grid=(9, 9)).tokens == 3
    with pytest.raises(UsageError, match=r"model\.projector\.heads 3"):
        make("resampler", heads=3)


def test_width_is_the_hidden_layer():
    assert make("pixel_shuffle", width=11).fc1.out_features == 11
    assert isinstance(make("pixel_shuffle"), PixelShuffle) and make("pixel_shuffle").fc1.out_features == HIDDEN


@torch.no_grad()
def test_features_are_evened_out_by_what_is_seen_of_them():
    """A few channels a hundred times larger than the rest, as before a ViT's final norm."""
    projector = make("pixel_shuffle")
    features = torch.randn(50, 24, WIDTH) * torch.tensor([100.0, 1.0, 0.1, 3.0, 1.0]) + torch.tensor([50.0, 0.0, 1.0, -3.0, 0.0])
    assert torch.equal(projector.norm(features), features)
    projector.initialize(features)
    evened = projector.norm(features).flatten(0, 1)
    torch.testing.assert_close(evened.mean(0), torch.zeros(WIDTH), atol=1e-4, rtol=0)
    torch.testing.assert_close(evened.std(0), torch.ones(WIDTH), atol=1e-4, rtol=0)


def test_pool_evens_out_the_means_it_makes():
    projector = make("pool").train()
    projector.drop = 0.5
    features = torch.randn(50, 24, WIDTH) * 10 + 3
    projector.initialize(features)
    assert projector.training
    evened = projector.norm(projector.eval().pool(features)).flatten(0, 1)
    torch.testing.assert_close(evened.mean(0), torch.zeros(WIDTH), atol=1e-4, rtol=0)
    torch.testing.assert_close(evened.std(0), torch.ones(WIDTH), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pixel_shuffle", "pool"])
def test_noise_is_added_to_the_normalised_features_in_training_alone(kind):
    projector = make(kind, noise=0.5)
    torch.manual_seed(0)
    rows = torch.randn(4000, WIDTH) * 7 + 3
    projector.norm.initialize(rows)
    clean = projector.eval().norm(rows)
    added = projector.train().norm(rows) - clean
    assert torch.equal(projector.eval().norm(rows), clean)
    assert added.mean().abs() < 0.02
    torch.testing.assert_close(added.std(0), torch.full((WIDTH,), 0.5), atol=0.02, rtol=0)
    assert not torch.equal(projector.train()(torch.ones(1, 24, WIDTH)), projector(torch.ones(1, 24, WIDTH)))
