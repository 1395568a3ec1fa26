"""Diversity of one set: fixture F, Hill numbers, identities with the pairwise sums."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffgen.eval import functional as f

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

INF = math.inf


def pairs_mean(distance, x):
    n = len(x)
    return sum(float(distance(x[i], x[j])) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


def test_mean_pairwise_of_fixture_f_is_1_0816346(X):
    assert f.mean_pairwise(X) == pytest.approx(1.0816345698385446, rel=1e-12)


def test_mean_pairwise_equals_the_mean_over_all_pairs(X):
    assert f.mean_pairwise(X) == pytest.approx(pairs_mean(lambda a, b: 1 - a @ b / a.norm() / b.norm(), X), rel=1e-12)
    assert f.mean_pairwise(X, "l2sq") == pytest.approx(pairs_mean(lambda a, b: (a - b).square().sum(), X), rel=1e-12)
    assert f.mean_pairwise(X, "sqeuclidean") == f.mean_pairwise(X, "l2sq")
    assert f.mean_pairwise(X, "l2") == pytest.approx(2.010821436418719, rel=1e-12)


def test_mean_pairwise_l2_equals_scipy_over_several_blocks_far_from_the_origin(normal):
    from scipy.spatial.distance import pdist

    x = normal(2100, 3)
    assert f.mean_pairwise(x + 1e6, "l2") == pytest.approx(pdist(x.numpy()).mean(), rel=1e-8)
    assert f.mean_pairwise(torch.full((5, 3), 0.1), "l2") == pytest.approx(0, abs=1e-9)


def test_vendi_equals_its_oracles(X, Y):
    oracles = [
        (X, [3.9901183937, 3.9507218347, 3.9020696406, 3.8085096005, 3.0242378740]),
        (Y, [3.7107655236, 3.1168711397, 2.8676887450, 2.6733770059, 2.1239115937]),
        (torch.eye(2)[[0] * 7 + [1] * 3], [1.9826962989, 1.9165151390, 1.8420227750, 1.7241379310, 1.4285714286]),
    ]
    for x, expected in oracles:
        assert [f.vendi(x, q) for q in (0.1, 0.5, 1, 2, INF)] == pytest.approx(expected, abs=1e-9)


def test_vendi_by_the_dual_equals_vendi_by_the_kernel(X, normal):
    for x in (X, normal(40, 7)):
        wide = torch.cat([x, torch.zeros(len(x), len(x))], dim=1)  # the same cosines, but D > N
        for q in (0.1, 1, 2, INF):
            assert f.vendi(x, q) == pytest.approx(f.vendi(wide, q), rel=1e-12)


def test_vendi_of_order_zero_is_the_rank_and_is_continuous_at_one(X):
    assert f.vendi(X, 0) == pytest.approx(4)
    assert f.vendi(X, 1 + 1e-6) == pytest.approx(f.vendi(X, 1), rel=1e-5)
    assert f.vendi(X, 1000) == pytest.approx(f.vendi(X, INF), rel=1e-2)  # no underflow of l^q
    unit = X / X.norm(dim=1, keepdim=True)
    assert f.vendi(X, 2) == pytest.approx(1 / float((unit @ unit.T).square().mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("cosine", "expected"),
    [(0.5, [1.754765351, 1.6, 1.333333333]), (0.9, [1.219590618, 1.104972376, 1.052631579])],
)
def test_vendi_of_two_unit_vectors_depends_on_their_cosine(t, cosine, expected):
    two = t([1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)])
    assert [f.vendi(two, q) for q in (1, 2, INF)] == pytest.approx(expected, abs=1e-9)


def test_vendi_of_k_equal_orthonormal_groups_is_k():
    groups = torch.eye(5).repeat(4, 1)
    assert [f.vendi(groups, q) for q in (0, 0.5, 1, 2, INF)] == pytest.approx([5] * 5, rel=1e-12)


@QUICK
@given(n=st.integers(2, 20), d=st.integers(1, 20), seed=st.integers(0, 999))
def test_vendi_falls_with_q_stays_in_range_and_ignores_duplication(normal, n, d, seed):
    x = normal(n, d, seed)
    scores = [f.vendi(x, q) for q in (0.5, 1, 2, INF)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(scores))
    assert scores[-1] >= 1 - 1e-9
    assert scores[0] <= min(n, d) + 1e-9
    assert f.vendi(x.repeat(3, 1), 1) == pytest.approx(scores[1], rel=1e-9)


def test_a_set_of_zero_rows_is_collapsed_and_not_diverse():
    black = torch.zeros(6, 4)
    assert f.mean_pairwise(black) == 0
    assert f.vendi(black) == pytest.approx(1)
    assert f.vendi(torch.cat([black, torch.eye(4)[:1].repeat(6, 1)])) == pytest.approx(2)


def test_zero_rows_are_counted_orthogonal_to_the_rest_and_never_nan(X):
    x = torch.cat([X, torch.zeros(3, 4)])
    assert f.zero_rows(x) == 3
    assert f.zero_rows(X) == 0
    extended = torch.cat([torch.nn.functional.pad(X, (0, 1)), torch.eye(5)[[4, 4, 4]]])
    assert f.vendi(x) == pytest.approx(f.vendi(extended), rel=1e-12)
    assert f.mean_pairwise(x) == pytest.approx(f.mean_pairwise(extended), rel=1e-12)
    wide = torch.nn.functional.pad(x, (0, 30))  # N < D
    assert f.vendi(wide) == pytest.approx(f.vendi(extended), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_cosine_metrics_ignore_the_length_of_rows_however_extreme(X, scale):
    assert f.mean_pairwise(scale * X) == pytest.approx(f.mean_pairwise(X), rel=1e-9)
    assert f.vendi(scale * X) == pytest.approx(f.vendi(X), rel=1e-9)


# Intra-prompt diversity


@pytest.mark.parametrize("metric", ["cosine", "l2sq", "l2"])
def test_intra_prompt_is_the_mean_over_prompts_without_single_images(X, metric):
    prompts = ["a", "b", "a", "b", "c", "a", "b", "a", "d", "d", "e", "e"]
    members = {p: [i for i, other in enumerate(prompts) if other == p] for p in "abde"}
    result = f.intra_prompt(X, prompts, metric)
    expected = {p: f.mean_pairwise(X[rows], metric) for p, rows in members.items()}
    assert result.value == pytest.approx(sum(expected.values()) / 4)
    assert (result.groups, result.excluded) == (4, 1)
    assert result.by_size[4] == pytest.approx(expected["a"])
    assert result.by_size[2] == pytest.approx((expected["d"] + expected["e"]) / 2)
    numbers = torch.tensor(["abcde".index(p) for p in prompts])
    assert f.intra_prompt(X, numbers, metric) == result


def test_intra_prompt_vendi_is_the_share_of_different_images():
    images = torch.eye(4)[[0, 0, 0, 0, 0, 1, 2, 3]]  # a collapsed prompt and a diverse one
    prompts = ["collapsed"] * 4 + ["diverse"] * 4
    assert f.intra_prompt(images, prompts, "vendi").value == pytest.approx((1 / 4 + 1) / 2)
    assert f.intra_prompt(images, prompts, "vendi", q=2).by_size == pytest.approx({4: 0.625})
