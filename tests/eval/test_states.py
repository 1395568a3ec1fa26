"""Mergeable states: streaming equals batch for any split, order and tree of merges."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffgen.eval import functional as f
from diffgen.eval import states

ROW, COLUMN = torch.arange(1, 16, dtype=torch.float64)[:, None], torch.arange(1, 5, dtype=torch.float64)[None, :]
X = torch.sin(1.3 * ROW[:12] * COLUMN)
Y = torch.cos(0.7 * ROW * (COLUMN + 1)) + 0.2
ZEROS = torch.cat([X[:5], torch.zeros(3, 4, dtype=torch.float64), X[5:]])


def parts(rows, cuts):
    edges = [0, *sorted(cuts), len(rows)]
    return [rows[a:b] for a, b in itertools.pairwise(edges)]


def folded(kind, merge, pieces):
    return merge(torch.stack([kind(piece) for piece in pieces]))


def test_moments_hold_n_mean_and_m2():
    state = states.moments(X)
    assert state.shape == (5, 5)
    assert state.dtype == torch.float64
    assert states.count(state) == 12
    mean, cov = states.mean_cov(state)
    torch.testing.assert_close(mean, X.mean(0), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(cov, X.T.cov(), rtol=1e-13, atol=1e-15)


@given(cuts=st.lists(st.integers(0, 12), max_size=6), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_streaming_equals_batch_for_any_split_and_order(cuts, order):
    pieces = parts(X, cuts)  # empty ones too
    order.shuffle(pieces)
    torch.testing.assert_close(
        folded(states.moments, states.merge_stack, pieces), states.moments(X), rtol=1e-12, atol=1e-13
    )
    torch.testing.assert_close(folded(states.gram, states.merge_gram, pieces), states.gram(X), rtol=1e-12, atol=1e-13)


def test_merge_is_commutative_bit_for_bit():
    a, b = states.moments(X), states.moments(Y)
    assert torch.equal(states.merge(a, b), states.merge(b, a))


def test_any_tree_of_merges_gives_the_same():
    a, b, c, d = (states.moments(piece) for piece in parts(Y, [1, 6, 11]))
    tree = states.merge(states.merge(a, b), states.merge(c, d))
    chain = states.merge(a, states.merge(b, states.merge(c, d)))
    torch.testing.assert_close(tree, chain, rtol=1e-12, atol=1e-14)


def test_adding_rows_in_place_equals_merging():
    for new, add in ((states.moments, states.add_moments), (states.gram, states.add_gram)):
        state = new(X[:5])
        assert add(state, X[5:]) is state
        torch.testing.assert_close(state, new(X), rtol=1e-12, atol=1e-14)
        before = state.clone()
        assert torch.equal(add(state, X[:0]), before)


def test_an_empty_state_changes_nothing_whatever_its_width():
    state = states.moments(X)
    for nothing in (states.empty(), states.empty(4), states.moments(X[:0])):
        assert torch.equal(states.merge(state, nothing), state)
        assert torch.equal(states.merge(nothing, state), state)


def test_merging_different_widths_is_an_error():
    with pytest.raises(ValueError, match="d=4 and d=3"):
        states.merge(states.moments(X), states.moments(X[:, :3]))


def test_blocks_equal_the_whole_beyond_the_block_size():
    rows = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, cov = states.mean_cov(states.moments(rows))
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(cov, rows.T.cov(), rtol=1e-11, atol=1e-14)


def test_centred_moments_keep_the_spread_where_plain_sums_lose_it():
    rows = X + 1e8
    streamed = states.merge_stack(torch.stack([states.moments(piece) for piece in parts(rows, [4, 7])]))
    truth = float((rows - rows[0]).var(0).sum())  # differences are exact
    assert float(states.mean_cov(streamed)[1].trace()) == pytest.approx(truth, rel=1e-7)
    plain = (rows.square().sum(0) - len(rows) * rows.mean(0).square()) / (len(rows) - 1)
    assert abs(float(plain.sum()) / truth - 1) > 0.1


def test_fd_of_moments_is_fd_of_features():
    value = f.fd_from_stats(*states.mean_cov(states.moments(X)), *states.mean_cov(states.moments(Y)))
    assert value == pytest.approx(0.6088299022750916, rel=1e-11)


@pytest.mark.parametrize("rows", [X, Y, ZEROS, X[:3]], ids=["X", "Y", "zero rows", "n < d"])
@pytest.mark.parametrize("q", [0.5, 1, 2, math.inf])
def test_vendi_of_the_gram_state_is_vendi_of_the_rows(rows, q):
    state = folded(states.gram, states.merge_gram, parts(rows, [1, 2]))
    assert states.gram_vendi(state, q) == pytest.approx(f.vendi(rows, q), rel=1e-9)


@pytest.mark.parametrize("rows", [X, Y, ZEROS], ids=["X", "Y", "zero rows"])
def test_mean_pairwise_of_the_gram_state_is_that_of_the_rows(rows):
    assert states.gram_mean_pairwise(states.gram(rows)) == pytest.approx(f.mean_pairwise(rows), rel=1e-12)


def test_half_precision_rows_are_accumulated_in_float64():
    assert states.moments(X.half()).dtype == states.gram(X.half()).dtype == torch.float64


@pytest.mark.parametrize("read", [states.mean_cov, states.gram_vendi, states.gram_mean_pairwise])
def test_one_row_is_too_few_to_read(read):
    state = states.moments(X[:1]) if read is states.mean_cov else states.gram(X[:1])
    with pytest.raises(ValueError, match="at least 2 rows; the state has 1"):
        read(state)


def test_bad_rows_are_named():
    bad = X.clone()
    bad[3, 1] = math.nan
    for kind in (states.moments, states.gram):
        with pytest.raises(ValueError, match=r"rows \[3\]"):
            kind(bad)
        with pytest.raises(TypeError, match="list"):
            kind([[1.0]])
        with pytest.raises(ValueError, match=r"\[N,D\]"):
            kind(X[0])
