"""Divergence estimates against the divergence itself, and the controllers."""

from __future__ import annotations

import pytest
import torch

from mmgpt.rl.kl import AdaptiveKL, FixedKL, estimate


def expectation(kind: str, policy: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean of an estimator over every token, each as often as the policy draws it."""
    return float((policy.exp() * estimate(policy, reference, kind)).sum())  # type: ignore[arg-type]


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_k1_and_k3_are_unbiased_and_k3_is_never_negative(spread):
    generator = torch.Generator().manual_seed(0)
    policy, reference = (spread * torch.randn(2, 50, generator=generator, dtype=torch.float64)).log_softmax(-1)
    exact = float(torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum"))
    assert expectation("k1", policy, reference) == pytest.approx(exact, rel=1e-9)
    assert expectation("k3", policy, reference) == pytest.approx(exact, rel=1e-9)
    assert (estimate(policy, reference, "k3") >= 0).all()
    assert (estimate(policy, reference, "k1") < 0).any()


def test_k2_is_right_to_second_order():
    generator = torch.Generator().manual_seed(0)
    logits, step = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    for size, tolerance in ((1e-2, 1e-2), (1e-4, 1e-4)):
        policy, reference = logits.log_softmax(-1), (logits + size * step).log_softmax(-1)
        exact = float(torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum"))
        assert expectation("k2", policy, reference) == pytest.approx(exact, rel=tolerance)


def test_k3_keeps_its_digits_near_zero():
    single = estimate(torch.zeros(1), torch.tensor([1e-4]), "k3")
    assert float(single) == pytest.approx(1e-8 / 2, rel=1e-2)
    assert float(estimate(torch.zeros(1), torch.zeros(1), "k3")) == 0


def test_an_unknown_estimator():
    with pytest.raises(ValueError, match="k4"):
        estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_the_fixed_weight_stays():
    controller = FixedKL(0.05)
    controller.update(1e9)
    assert controller.beta == 0.05


def test_the_adaptive_weight_moves_as_in_the_paper():
    """+2 % at most, -2 % at most, and in proportion in between (K_beta 0.1, error clipped at 0.2)."""
    for kl, factor in ((60.0, 1.02), (0.0, 0.98), (6.0, 1.0), (6.6, 1.01)):
        controller = AdaptiveKL(beta=1.0, target=6.0)
        controller.update(kl)
        assert controller.beta == pytest.approx(factor)


def test_the_adaptive_weight_holds_a_divergence_that_answers_to_it():
    """A policy whose KL is 1 / beta settles at the target."""
    controller = AdaptiveKL(beta=5.0, target=2.0)
    for _ in range(400):
        controller.update(1 / controller.beta)
    assert 1 / controller.beta == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("kind", [FixedKL, AdaptiveKL])
def test_state_goes_on(kind):
    first, second = kind(beta=0.3), kind(beta=0.7)
    for controller in (first, second):
        controller.update(1.0)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(20.0)
    assert first.beta == second.beta


def test_what_cannot_be_controlled():
    with pytest.raises(ValueError, match="above 0"):
        AdaptiveKL(target=0.0)
    with pytest.raises(ValueError, match="nan"):
        AdaptiveKL().update(float("nan"))
