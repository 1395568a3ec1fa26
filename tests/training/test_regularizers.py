"""The KL to the reference policy, against torch.distributions."""

import torch
from torch.distributions import Normal, kl_divergence

from diffgen.samplers import Step
from diffgen.training.regularizers import kl
from diffgen.training.rollout import Evaluation


def evaluation(std=(0.3, 0.7), reference_std=(0.3, 0.7)):
    generator = torch.Generator().manual_seed(0)
    means = [[torch.randn(2, 3, 4, generator=generator) for _ in std] for _ in range(2)]
    steps = [[Step(m, s, -0.1) for m, s in zip(row, stds)] for row, stds in zip(means, [std, reference_std])]
    return Evaluation(torch.zeros(2, len(std)), *steps)


def expected(e):
    pairs = zip(e.steps, e.reference)
    return torch.stack(
        [kl_divergence(Normal(p.mean, p.std), Normal(q.mean, q.std)).flatten(1).mean(1) for p, q in pairs], 1
    )


def test_it_is_the_kl_of_torch_distributions_times_coef():
    e = evaluation()
    got = kl(e, coef=0.5)
    assert got.shape == (2, 2)
    torch.testing.assert_close(got, 0.5 * expected(e))


def test_different_stds_are_taken_into_account():
    e = evaluation(reference_std=(0.5, 0.2))
    torch.testing.assert_close(kl(e, coef=1.0), expected(e))


def test_flow_grpos_formula_holds_where_stds_are_equal():
    """mean(|mu - mu_ref|^2) / (2 std^2), times beta = 0.04."""
    e = evaluation()
    formula = [(p.mean - q.mean).square().flatten(1).mean(1) / (2 * p.std**2) for p, q in zip(e.steps, e.reference)]
    torch.testing.assert_close(kl(e), 0.04 * torch.stack(formula, 1))


def test_it_is_zero_for_the_reference_itself():
    e = evaluation()
    assert torch.equal(kl(Evaluation(e.logp, e.steps, e.steps)), torch.zeros(2, 2))
