"""KID, CMMD, MIND and the inception score: fixture F, closed forms, torch-fidelity and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffgen.eval import functional as f

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# KID


def test_kid_of_fixture_f_over_all_pairs_is_minus_0_1701436(X, Y):
    assert f.kid(X, Y) == pytest.approx(-0.1701435914925522, rel=1e-10)
    assert f.kid(X, Y[:12]) == pytest.approx(-0.208783516535751, rel=1e-10)


def test_kid_equals_torchmetrics_and_torch_fidelity_on_equal_sets(X, Y):
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import poly_mmd

    assert f.kid(X, Y[:12]) == pytest.approx(float(poly_mmd(X, Y[:12])), rel=1e-10)
    theirs = kid_features_to_metric(X, Y[:12], kid_subsets=1, kid_subset_size=12, verbose=False)
    assert f.kid(X, Y[:12]) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-10)


def test_kid_subsets_in_compat_mode_are_those_of_torch_fidelity(X, Y, normal):
    from torch_fidelity.metric_kid import kid_features_to_metric

    values = f.kid_subsets(X, Y, subset_size=8, subsets=5, compat="torch-fidelity")
    assert float(values.mean()) == pytest.approx(-0.2712163977269094, rel=1e-10)
    assert float(values.std(correction=0)) == pytest.approx(0.09196631963800274, rel=1e-10)
    assert f.kid(X, Y, 8, 5, compat="torch-fidelity") == float(values.mean())
    x, y = normal(90, 16), 1.1 * normal(70, 16, seed=1)
    theirs = kid_features_to_metric(x, y, kid_subsets=7, kid_subset_size=30, rng_seed=5, verbose=False)
    ours = f.kid_subsets(x, y, 30, 7, seed=5, compat="torch-fidelity")
    assert float(ours.mean()) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert float(ours.std(correction=0)) == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kid_subsets_repeat_under_one_seed_only(X, Y):
    assert f.kid(X, Y, 8, 5, seed=1) == f.kid(X, Y, 8, 5, seed=1) != f.kid(X, Y, 8, 5, seed=2)


def test_a_subset_size_above_the_smaller_set_is_reduced_with_a_warning(X, Y):
    with pytest.warns(UserWarning, match=r"subset_size=1000 exceeds the smaller set \(N=12, M=15\); reduced to 12"):
        value = f.kid(X, Y, subset_size=1000, subsets=3)
    assert value == f.kid(X, Y, subset_size=12, subsets=3)
    with pytest.warns(UserWarning, match="reduced to 12"):
        assert f.kid(X, Y[:12], subset_size=13, subsets=2) == pytest.approx(f.kid(X, Y[:12]), rel=1e-10)


def test_kid_in_blocks_equals_kid_at_once(normal):
    x, y = normal(2100, 3), 1.1 * normal(2300, 3, seed=1)

    def mean_kernel(a, b):
        return float(((a @ b.T) / 3 + 1).pow(3).sum())

    within = [
        (mean_kernel(a, a) - float((a.square().sum(1) / 3 + 1).pow(3).sum())) / len(a) / (len(a) - 1) for a in (x, y)
    ]
    assert f.kid(x, y) == pytest.approx(sum(within) - 2 * mean_kernel(x, y) / len(x) / len(y), rel=1e-9)


def test_kid_is_zero_on_average_under_the_null(normal):
    values = [f.kid(normal(40, 8, 2 * i), normal(60, 8, 2 * i + 1)) for i in range(100)]
    assert abs(np.mean(values)) < 5 * np.std(values) / math.sqrt(len(values))
    assert min(values) < 0 < max(values)
    shifted = [f.kid(normal(40, 8, 2 * i) + 0.5, normal(60, 8, 2 * i + 1)) for i in range(20)]
    assert np.mean(shifted) > 5 * np.std(values)


@QUICK
@given(n=st.integers(2, 20), m=st.integers(2, 20), d=st.integers(1, 8), seed=st.integers(0, 999))
def test_kid_and_cmmd_ignore_the_order_of_rows_and_are_symmetric(normal, n, m, d, seed):
    x, y = normal(n, d, seed), normal(m, d, seed + 1) + 0.3
    for metric in (f.kid, f.cmmd, f.mind, lambda a, b: f.cmmd(a, b, estimator="u")):
        value = metric(x, y)
        assert metric(x.flip(0), y.roll(1, 0)) == pytest.approx(value, rel=1e-9, abs=1e-9)
        assert metric(y, x) == pytest.approx(value, rel=1e-9, abs=1e-9)
        assert metric(x.float(), y.float()) == pytest.approx(value, rel=1e-5, abs=1e-4)
    assert f.cmmd(x, y) >= -1e-9
    assert f.cmmd(x, x) == pytest.approx(0, abs=1e-9)
    assert f.mind(x, x) == 0


# CMMD


def test_cmmd_of_fixture_f_equals_its_oracles(X, Y):
    assert f.cmmd(X, Y) == pytest.approx(0.35420359671123336, rel=1e-9)
    assert f.cmmd(X, Y, estimator="u") == pytest.approx(-1.217441279253384, rel=1e-9)
    assert f.cmmd(X, Y, normalize=False) == pytest.approx(1.0224726829466402, rel=1e-9)


def test_cmmd_of_two_orthogonal_rows_is_its_closed_form(t):
    assert f.cmmd(t([1.0, 0.0]), t([0.0, 1.0])) == pytest.approx(2000 * (1 - math.exp(-0.01)), rel=1e-12)
    assert f.cmmd(t([1.0, 0.0]), t([0.0, 1.0])) == pytest.approx(19.90033250166401, rel=1e-12)


def test_cmmd_equals_the_formula_at_another_sigma_over_several_blocks(normal):
    x, y = normal(2100, 2), normal(300, 2, seed=1) + 1

    def kernel(a, b):
        return float(torch.exp(-torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square() / 2).mean())

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert f.cmmd(x, y, sigma=1, normalize=False) == pytest.approx(expected, rel=1e-9)


def test_cmmd_takes_zero_rows_as_one_direction_of_their_own(X):
    zeros = torch.zeros(12, 4)
    assert f.cmmd(zeros, zeros) == 0
    extended = torch.nn.functional.pad(X, (0, 1)), torch.eye(5)[[4] * 12]
    assert f.cmmd(X, zeros) == pytest.approx(f.cmmd(*extended), rel=1e-12)


# MIND


def test_mind_of_a_pure_shift_is_three_times_its_square(normal, t):
    x = normal(50, 6)
    shift = t(1.0, 2, 0, 0, -1, 0.5)
    assert f.mind(x, x + shift, directions=20_000) == pytest.approx(3 * float(shift.square().sum()), rel=0.05)
    assert f.mind(x[:, :1], x[:, :1] + 2) == pytest.approx(12, rel=1e-12)  # one dimension has one direction


def test_mind_of_sets_of_different_size_is_the_exact_distance_of_their_distributions(normal):
    x, y = normal(10, 3), normal(15, 3, seed=1)
    exact = f.mind(x.repeat_interleave(3, 0), y.repeat_interleave(2, 0))  # the same distributions with N = M = 30
    assert f.mind(x, y) == pytest.approx(exact, rel=1e-12)
    assert f.mind(x, x.repeat(4, 1)) == pytest.approx(0, abs=1e-12)


# Inception score


def test_inception_score_of_fixture_f_equals_its_oracles(X):
    assert f.inception_score(3 * X, splits=1) == (pytest.approx(2.1281014407403656, rel=1e-12), 0)
    thirds = f.inception_score(3 * X, splits=3, shuffle=False)
    assert thirds == pytest.approx((2.071386384360029, 0.4452508367725149), rel=1e-10)


@pytest.mark.parametrize("splits", [1, 3, 10])
@pytest.mark.parametrize("shuffle", [True, False])
def test_inception_score_equals_torch_fidelity(normal, splits, shuffle):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * normal(47, 9)  # splits of unequal size
    theirs = isc_features_to_metric(logits, splits, shuffle)
    expected = (theirs["inception_score_mean"], theirs["inception_score_std"])
    assert f.inception_score(logits, splits, shuffle) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_inception_score_equals_torchmetrics_for_one_split(normal):
    from torchmetrics.image.inception import InceptionScore

    class LogitsAsImages(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1)

    logits = 3 * normal(47, 9)
    metric = InceptionScore(feature=LogitsAsImages(), splits=1)
    metric.update(logits[:, :, None, None])
    assert f.inception_score(logits, 1)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-6)


@QUICK
@given(n=st.integers(1, 30), c=st.integers(1, 12), splits=st.integers(1, 5), seed=st.integers(0, 999))
def test_inception_score_lies_between_one_and_the_number_of_classes(normal, n, c, splits, seed):
    mean, sd = f.inception_score(5 * normal(max(n, splits), c, seed), splits)
    assert 1 - 1e-12 <= mean <= c + 1e-9
    assert sd >= 0


def test_inception_score_of_balanced_certain_classes_is_their_number_even_for_huge_logits():
    assert f.inception_score(1e5 * torch.eye(7).repeat(10, 1), 1)[0] == pytest.approx(7, rel=1e-12)
    assert f.inception_score(torch.ones(20, 7), 2) == pytest.approx((1, 0), abs=1e-12)
