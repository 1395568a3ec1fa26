"""Fréchet distance, its floor and extrapolation: fixture F, closed forms, torch-fidelity, torchmetrics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffgen.eval import functional as f

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_fd_of_fixture_f_is_0_6088299(X, Y):
    assert f.fd(X, Y) == pytest.approx(0.6088299022750916, rel=1e-12)


def test_fd_from_stats_equals_fd_from_features(X, Y):
    assert f.fd_from_stats(X.mean(0), X.T.cov(), Y.mean(0), Y.T.cov()) == pytest.approx(f.fd(X, Y), rel=1e-12)


def test_fd_equals_torch_fidelity_on_the_same_features(X, Y, normal):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    def reference(x, y):
        stats = (fid_features_to_statistics(x), fid_features_to_statistics(y))
        return float(fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"])

    assert f.fd(X, Y) == pytest.approx(reference(X, Y), rel=1e-10)
    assert reference(X.float(), Y.float()) == pytest.approx(f.fd(X, Y), rel=1e-6)
    x, y = normal(300, 32), 1.2 * normal(400, 32, seed=1) + 0.1
    assert f.fd(x, y) == pytest.approx(reference(x, y), rel=1e-9)
    x, y = normal(20, 64), normal(30, 64, seed=1) + 0.5
    assert f.fd(x, y) == pytest.approx(reference(x, y), rel=1e-6)  # theirs is inexact when N <= D


def test_fd_equals_torchmetrics_on_the_same_features(X, Y):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class FeaturesAsImages(torch.nn.Module):
        num_features = 4

        def forward(self, images):
            return images.flatten(1)

    metric = FrechetInceptionDistance(feature=FeaturesAsImages()).set_dtype(torch.float64)
    metric.update(Y[:, :, None, None], real=True)
    metric.update(X[:, :, None, None], real=False)
    assert f.fd(X, Y) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fd_equals_its_closed_forms(X, t):
    one_dimension = f.fd(t([0.0], [1], [2]), t([1.0], [3], [5], [7]))
    assert one_dimension == pytest.approx(11.502688871723445, rel=1e-12)
    square = t([0.0, 0], [0, 1], [1, 0], [1, 1])
    assert f.fd(square, 2 * square + t(1.0, 0.0)) == pytest.approx(19 / 6, rel=1e-12)
    assert f.fd(X[:, :2], X[:, :2] + t(3.0, 4.0)) == pytest.approx(25, rel=1e-12)
    assert f.fd(torch.ones(10, 4), torch.full((10, 4), 2.0)) == pytest.approx(4, rel=1e-12)


def test_fd_from_stats_equals_its_closed_forms(t):
    diagonal = f.fd_from_stats(t(1.0, 2, 3), t(1.0, 4, 9).diag(), torch.zeros(3), t(4.0, 4, 1).diag())
    assert diagonal == pytest.approx(19, rel=1e-12)
    zero = torch.zeros(2)
    non_commuting = f.fd_from_stats(zero, t([2.0, 1], [1, 2]), zero, t([3.0, -1], [-1, 1]))
    assert non_commuting == pytest.approx(1.3972795044568622, rel=1e-12)


def test_fd_of_rank_deficient_sets_equals_fd_in_a_full_rank_basis(normal):
    x, y = normal(20, 6), 2 * normal(30, 6, seed=1) + 1
    basis = torch.linalg.qr(normal(64, 6, seed=2)).Q.T  # 6 orthonormal rows of R^64
    assert f.fd(x @ basis, y @ basis) == pytest.approx(f.fd(x, y), rel=1e-9)
    x, y = normal(200, 6), 2 * normal(300, 6, seed=1) + 1  # now N > D with a singular covariance
    assert f.fd(x @ basis, y @ basis) == pytest.approx(f.fd(x, y), rel=1e-9)


def test_fd_takes_one_small_and_one_large_set(normal):
    x, y = normal(20, 32), normal(100, 32, seed=1)
    from_stats = f.fd_from_stats(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert f.fd(x, y) == pytest.approx(from_stats, rel=1e-6)


@QUICK
@given(n=st.integers(2, 30), m=st.integers(2, 30), d=st.integers(1, 20), seed=st.integers(0, 999))
def test_fd_is_a_squared_distance_that_ignores_rigid_motion(normal, n, m, d, seed):
    x, y = normal(n, d, seed), 1.5 * normal(m, d, seed + 1) + 0.3
    value, scale = f.fd(x, y), float(x.var(0).sum() + y.var(0).sum())
    close = {"rel": 1e-7, "abs": 1e-7 * scale}
    rotation = torch.linalg.qr(normal(d, d, seed + 2)).Q
    assert f.fd(x, x) <= 1e-9 * scale
    assert f.fd(y, x) == pytest.approx(value, **close)
    assert f.fd(x @ rotation + 5, y @ rotation + 5) == pytest.approx(value, **close)
    assert f.fd(3 * x, 3 * y) == pytest.approx(9 * value, **close)
    assert value >= float((x.mean(0) - y.mean(0)).square().sum()) - 1e-9 * scale
    assert f.fd(torch.nn.functional.pad(x, (0, 1)), torch.nn.functional.pad(y, (0, 1))) == pytest.approx(value, **close)
    assert f.fd(x.float(), y.float()) == pytest.approx(value, rel=1e-5, abs=1e-5 * scale)


# Noise floor


def test_fd_floor_of_a_unit_gaussian_is_its_closed_form():
    n, m, d = 400, 500, 16
    expected = d * (1 / n + 1 / m) + d * (d + 1) / 4 * (1 / (n - 1) + 1 / (m - 1))
    assert f.fd_floor(torch.ones(d), n, m) == pytest.approx(expected, rel=1e-12)
    assert f.fd_floor(torch.ones(16), 400, 400) == pytest.approx(0.4209, abs=5e-5)


def test_fd_floor_predicts_the_mean_fd_of_two_samples_of_one_gaussian(normal):
    lam = torch.arange(1, 33, dtype=torch.float64) ** -1.5
    fds = [f.fd(normal(300, 32, 2 * i) * lam.sqrt(), normal(400, 32, 2 * i + 1) * lam.sqrt()) for i in range(40)]
    standard_error = np.std(fds) / math.sqrt(len(fds))
    assert abs(np.mean(fds) - f.fd_floor(lam, 300, 400)) < 5 * standard_error + 0.03 * np.mean(fds)


@pytest.mark.parametrize(
    ("lam", "n", "m", "expected"),
    [
        (torch.ones(16), 1000, 500, 0.2523),
        (torch.arange(1, 33) ** -1.5, 1000, 2000, 0.01369),
        (torch.arange(1, 33).double() ** -1.5, 1000, 2000, 0.01369),
    ],
)
def test_fd_floor_equals_the_values_of_section_3_2(lam, n, m, expected):
    assert f.fd_floor(lam, n, m) == pytest.approx(expected, rel=5e-3)


def test_plug_in_and_split_floor_bracket_the_true_floor(normal):
    y = normal(400, 128)
    true = np.mean([f.fd(normal(200, 128, 2 * i + 1), normal(400, 128, 2 * i + 2)) for i in range(10)])
    assert f.fd_floor(f.spectrum(y), 200, 400) < true < f.fd_floor_split(y, 200)


def test_zero_eigenvalues_add_nothing_to_the_floor(t):
    assert f.fd_floor(t(2.0, 1.0, 0.0, 0.0), 10, 20) == f.fd_floor(t(2.0, 1.0), 10, 20)


@pytest.mark.parametrize("n", [5, 50])
def test_spectrum_holds_the_eigenvalues_of_the_covariance(normal, n):
    x = normal(n, 8)
    eigenvalues = torch.linalg.eigvalsh(x.T.cov())[-min(n, 8) :]
    torch.testing.assert_close(f.spectrum(x), eigenvalues, atol=1e-12, rtol=1e-12)


def test_large_sets_give_the_same_numbers_in_blocks(normal):
    x, y = normal(5000, 3), 1.1 * normal(2100, 3, seed=1) + 1e4  # several blocks, far from the origin
    assert f.fd(x + 1e4, y) == pytest.approx(
        f.fd_from_stats(x.mean(0) + 1e4, x.T.cov(), y.mean(0), y.T.cov()), rel=1e-9
    )
    torch.testing.assert_close(f.spectrum(x), torch.linalg.eigvalsh(x.T.cov()))


# FD infinity


def test_fd_infinity_of_one_gaussian_is_near_zero_although_fd_is_not(normal):
    x, y = normal(300, 16), normal(300, 16, seed=1)
    a, b = f.fd_line(x, y, points=[75, 150, 300], repeats=5, subset_reference=True)
    assert abs(a) < 0.1 < 0.45 < f.fd(x, y) < 0.65  # the specification's draw: 0.0024 and 0.546
    assert f.fd_infinity(x, y, points=[75, 150, 300], repeats=5, subset_reference=True) == a
    assert b == pytest.approx(16 * 2 + 16 * 17 / 2, rel=0.3)  # the floor's slope for sigma = I: 2d + d(d+1)/2


def test_fd_infinity_is_the_population_distance_where_fd_is_biased(normal):
    y, population = normal(20_000, 8, seed=1), 8 * (0.1**2 + 0.1**2)
    sets = [1.1 * normal(200, 8, seed) + 0.1 for seed in range(2, 32)]
    extrapolated = [f.fd_infinity(x, y, points=[40, 100, 200], seed=i) for i, x in enumerate(sets)]
    plain = [f.fd(x, y) for x in sets]
    tolerance = 5 * np.std(extrapolated) / math.sqrt(len(sets))
    assert abs(np.mean(extrapolated) - population) < tolerance
    assert np.mean(plain) - population > tolerance


def test_fd_line_is_the_weighted_least_squares_line(normal):
    from diffgen.eval.functional.frechet import _line

    assert _line([10, 25, 80], [3 + 7 / n for n in (10, 25, 80)]) == pytest.approx((3, 7), rel=1e-12)
    root = np.sqrt([10, 20, 40])
    design = np.stack([np.ones(3), 1 / root**2], 1) * root[:, None]
    expected = np.linalg.lstsq(design, root * [1, 0, 0], rcond=None)[0]
    assert _line([10, 20, 40], [1, 0, 0]) == pytest.approx(tuple(expected), rel=1e-9)


def test_fd_line_at_two_sizes_passes_through_the_mean_of_its_repeats(normal):
    x, y = normal(60, 3), normal(50, 3, seed=1)
    a, b = f.fd_line(x, y, points=[20, 60], repeats=4)
    assert a + b / 60 == pytest.approx(f.fd(x, y), rel=1e-12)
    assert a + b / 20 > f.fd(x, y)


def test_fd_infinity_repeats_under_one_seed_only(normal):
    x, y = normal(100, 4), normal(90, 4, seed=1)
    assert f.fd_infinity(x, y, seed=3) == f.fd_infinity(x, y, seed=3) != f.fd_infinity(x, y, seed=4)
