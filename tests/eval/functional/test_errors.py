"""What the functions refuse, and what they say then."""

import math

import pytest
import torch

from diffgen.eval import functional as f

X, Y = torch.randn(12, 4), torch.randn(15, 4)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


SINGLE = [f.mean_pairwise, f.vendi, f.spectrum, f.zero_rows, lambda x: f.intra_prompt(x, [0] * len(x))]
TWO_SETS = [f.fd, f.kid, f.fd_infinity, f.mind, f.mifid, lambda x, y: f.cmmd(x, y, estimator="u")]
PAIRS = [lambda x, fn=fn: fn(x, Y) for fn in TWO_SETS] + [lambda x, fn=fn: fn(Y, x) for fn in TWO_SETS]
PAIRS += [lambda x: f.prdc(x, Y, k=1), lambda x: f.prdc(Y, x, k=1), lambda x: f.authpct(Y, x)]


@pytest.mark.parametrize("fn", [*SINGLE, *PAIRS])
def test_feature_functions_refuse_bad_features_and_say_why(fn):
    with pytest.raises(TypeError, match=r"must be a tensor of features \[N,D\]; got ndarray"):
        fn(X.numpy())
    with pytest.raises(ValueError, match=r"must be \[N,D\]; got shape \[12\]"):
        fn(X[:, 0])
    with pytest.raises(ValueError, match=r"needs at least 2 rows( for k=1)?; got 1"):
        fn(X[:1])
    broken = X.clone()
    broken[3, 1], broken[7, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"NaN or infinity in rows \[3, 7\] of 12"):
        fn(broken)


def test_fd_refuses_features_of_different_width():
    with pytest.raises(ValueError, match="equally many features; got D=4 and D=3"):
        f.fd(X, Y[:, :3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma2": torch.eye(3)}, r"mu2 and sigma2 must be \[D\] and \[D,D\]; got \[2\] and \[3, 3\]"),
        ({"mu2": torch.zeros(3), "sigma2": torch.eye(3)}, "same length; got 2 and 3"),
        ({"sigma1": t([1.0, 0.5], [0.0, 1.0])}, "sigma1 must be symmetric"),
        ({"sigma1": t([1.0, 2.0], [2.0, 1.0])}, "sigma1 must be positive semi-definite; its smallest eigenvalue is -1"),
        ({"mu1": t(math.nan, 0.0)}, "mu1 must be finite"),
    ],
)
def test_fd_from_stats_refuses_what_is_not_a_gaussian(change, message):
    good = {"mu1": torch.zeros(2), "sigma1": torch.eye(2), "mu2": torch.zeros(2), "sigma2": torch.eye(2)}
    with pytest.raises(ValueError, match=message):
        f.fd_from_stats(**(good | change))
    with pytest.raises(TypeError, match="mu1 must be a tensor; got list"):
        f.fd_from_stats(**(good | {"mu1": [0, 0]}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: f.fd_floor(t(1.0, -1.0), 5, 5), "not negative"),
        (lambda: f.fd_floor(t(1.0), 1, 5), "at least 2; got n=1, m=5"),
        (lambda: f.fd_floor_split(Y[:3], 5), "at least 4 rows"),
        (lambda: f.mean_pairwise(X, "l1"), "'cosine', 'l2sq' or 'l2'; got 'l1'"),
        (lambda: f.fd_infinity(X, Y, points=1), "points must be an integer of at least 2; got 1"),
        (lambda: f.fd_infinity(X, Y, points=[5, 13]), r"within 2..12; got sizes \[5, 13\]"),
        (lambda: f.fd_infinity(X, Y, points=[5, 5]), r"two different sizes .* got sizes \[5\]"),
        (lambda: f.fd_infinity(X, Y, repeats=0), "repeats must be an integer of at least 1"),
        (lambda: f.kid(X, Y, subset_size=1), "subset_size must be an integer of at least 2; got 1"),
        (lambda: f.kid(X, Y, subset_size=5, subsets=0), "subsets must be an integer of at least 1; got 0"),
        (lambda: f.kid(X, Y, compat="clean-fid"), "None or 'torch-fidelity'; got 'clean-fid'"),
        (lambda: f.cmmd(X, Y, estimator="b"), "'v' or 'u'; got 'b'"),
        (lambda: f.cmmd(X, Y, sigma=0), "sigma must be positive and finite; got 0"),
        (lambda: f.inception_score(X, splits=13), "logits needs at least 13 rows for splits=13; got 12"),
        (lambda: f.inception_score(X, splits=0), "splits must be an integer of at least 1"),
        (lambda: f.prdc(X[:5], Y, k=5), "X needs at least 6 rows for k=5; got 5"),
        (lambda: f.prdc(X, Y[:5], k=5), "Y needs at least 6 rows for k=5; got 5"),
        (lambda: f.prdc(X, Y, k=0), "k must be an integer of at least 1; got 0"),
        (lambda: f.prdc(X, Y, k=5, max_points=5), "max_points must be an integer of at least 6; got 5"),
        (lambda: f.nearest(X, k=12), "X needs at least 13 rows for k=12; got 12"),
        (lambda: f.nearest(X, Y, k=16), "Y needs at least 16 rows for k=16; got 15"),
        (lambda: f.authpct(X, Y[:, :3]), "D=4 and D=3"),
        (lambda: f.mifid(X, Y, direction="real"), "'fake' or 'torchmetrics'; got 'real'"),
        (lambda: f.nn_audit(X, Y, k=50), "train needs at least 50 rows for k=50; got 15"),
        (lambda: f.nn_audit(X, Y, k=5, threshold=95), r"within \[-1, 1\]; got 95"),
        (lambda: f.ct_score(X, Y, Y, cells=16), "15 rows and 16 cells"),
        (lambda: f.ct_score(X, Y, Y, cells=1), "no cell has 20 generated rows"),
        (lambda: f.mann_whitney_z(t(), t(1.0)), "got 0 and 1"),
        (lambda: f.intra_prompt(X, ["a"] * 11), "11 prompts and 12 rows"),
        (lambda: f.intra_prompt(X, range(12)), "at least 2 images; got 12 prompts of 1"),
        (lambda: f.bootstrap_sd(f.vendi, X, clusters=[0] * 12), "at least 2 different labels; got 1"),
        (lambda: f.bootstrap_sd(f.vendi, X, clusters=[0, 1]), "2 labels and 12 rows"),
        (lambda: f.paired_bootstrap_difference(f.fd, X, Y, Y), "got 12 and 15 rows"),
        (lambda: f.vendi(X, -1), "q must be 0 or more"),
        (lambda: f.vendi(X, math.nan), "q must be 0 or more"),
        (lambda: f.bootstrap_sd(f.fd, X, Y, samples=1), "samples must be an integer of at least 2; got 1"),
        (lambda: f.wilson(4, 3), "successes=4, n=3"),
        (lambda: f.wilson(0, 0), "successes=0, n=0"),
        (lambda: f.saturation(torch.zeros(2, 1, 4, 4, dtype=torch.uint8)), r"\[N,3,H,W\].*got \[2, 1, 4, 4\]"),
        (lambda: f.clipping(torch.zeros(0, 3, 4, 4, dtype=torch.uint8)), "not empty"),
    ],
)
def test_arguments_out_of_range_are_value_errors_that_name_them(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_image_statistics_refuse_floats():
    with pytest.raises(TypeError, match=r"uint8 tensor \[N,3,H,W\]; got torch.float32"):
        f.contrast(torch.zeros(1, 3, 2, 2))


def test_a_cell_without_test_rows_is_an_error_that_names_it():
    two_cells = torch.cat([torch.randn(30, 2), torch.randn(30, 2) + 100])
    with pytest.raises(ValueError, match=r"C_T: cell [01] of 2 has 30 training and 0 test rows; use fewer cells"):
        f.ct_score(two_cells, two_cells, two_cells[:30], cells=2)


def test_at_most_ten_rows_that_are_not_finite_are_listed():
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] and 5 more of 15"):
        f.vendi(torch.full_like(Y, math.nan))


def test_complex_features_are_refused():
    with pytest.raises(TypeError, match=r"X must be real; got torch\.complex64"):
        f.vendi(X.to(torch.complex64))


def test_every_public_name_can_be_imported_and_documented():
    assert all(getattr(f, name).__doc__ for name in f.__all__)
    assert "vendi" in f.__all__
