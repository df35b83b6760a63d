"""Bootstrap: draws, summaries, paired differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluation.bootstrap as module
from evaluation.bootstrap import (
    Statistic,
    bootstrap,
    check_counts,
    draw_counts,
    paired_difference,
    resample,
    summarise,
)


class Means:
    """Weighted mean and, undefined where image 0 is missing, the value of image 0."""

    names = ("mean", "first")

    def __init__(self, values):
        self.values = np.asarray(values, dtype=float)
        self.num_units = len(self.values)

    def __call__(self, counts):
        first = np.where(counts[:, 0] > 0, self.values[0] if len(self.values) else np.nan, np.nan)
        return np.stack([counts @ self.values / counts.sum(1), first], axis=1)


def test_draws_are_reproducible():
    assert draw_counts(4, 3).tolist() == [[1, 1, 0, 2], [0, 1, 2, 1], [0, 3, 0, 1]]
    assert draw_counts(5, 2, seed=7).tolist() == [[0, 0, 1, 2, 2], [1, 2, 0, 1, 1]]
    assert (draw_counts(50, 20) == draw_counts(50, 20, seed=2147483647)).all()
    assert (draw_counts(50, 20) != draw_counts(50, 20, seed=1)).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 10**6), st.integers(1, 300))
def test_draws_do_not_depend_on_chunks(num_units, resamples, seed, chunk):
    whole = draw_counts(num_units, resamples, seed)
    assert whole.shape == (resamples, num_units)
    assert (whole.sum(1) == num_units).all()
    assert (draw_counts(num_units, resamples + 5, seed)[:resamples] == whole).all()
    original = module._CHUNK_COUNTS
    try:
        module._CHUNK_COUNTS = chunk
        assert (draw_counts(num_units, resamples, seed) == whole).all()
    finally:
        module._CHUNK_COUNTS = original


def test_every_unit_is_drawn_equally_often():
    counts = draw_counts(20, 4000)
    assert counts.mean(0) == pytest.approx(np.ones(20), abs=0.08)
    assert counts.var() == pytest.approx(1 - 1 / 20, rel=0.03)


def test_bootstrap_is_that_of_repeated_data():
    values = np.array([3.0, 1.0, 4.0, 1.5, 9.0])
    result = bootstrap(Means(values), 400, seed=3)
    means = np.array([np.repeat(values, row).mean() for row in draw_counts(5, 400, seed=3)])
    low, high = np.percentile(means, [2.5, 97.5])
    expected = {"value": values.mean(), "mean": means.mean(), "std": means.std(ddof=0), "low": low, "high": high}
    assert result["mean"] == pytest.approx(expected | {"undefined": 0})
    assert result == bootstrap(Means(values), 400, seed=3)


def test_undefined_resamples_are_left_out_or_count_zero():
    statistic = Means([2.0, 5.0, 5.0])
    missing = int((draw_counts(3, 200)[:, 0] == 0).sum())
    assert 0 < missing < 200
    assert bootstrap(statistic, 200)["first"] == {
        "value": 2.0, "mean": 2.0, "std": 0.0, "low": 2.0, "high": 2.0, "undefined": missing
    }  # fmt: skip
    counted = bootstrap(statistic, 200, undefined="zero")["first"]
    assert counted["mean"] == pytest.approx(2 * (200 - missing) / 200)
    assert (counted["low"], counted["high"], counted["undefined"]) == (0, 2, missing)


def test_nothing_defined():
    assert summarise(np.nan, np.full(3, np.nan)) == {
        "value": None, "mean": None, "std": None, "low": None, "high": None, "undefined": 3
    }  # fmt: skip
    assert summarise(np.nan, np.full(3, np.nan), "zero")["value"] == 0.0
    assert bootstrap(Means([]), 5)["mean"] == summarise(np.nan, np.full(5, np.nan))


def test_paired_differences_are_those_of_one_draw():
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 40)
    first, second = Means(base + 1 + rng.normal(0, 0.1, 40)), Means(base)
    result = paired_difference(first, second, 300)
    both = resample(first, 300)[:, 0] - resample(second, 300)[:, 0]
    assert result["mean"]["std"] == pytest.approx(both.std())
    assert result["mean"]["value"] == pytest.approx(1, abs=0.1)
    assert result["mean"]["above_zero"] == 1.0
    # Images differ far more than models: an unpaired interval would hide the difference.
    assert result["mean"]["std"] < bootstrap(first, 300)["mean"]["std"] / 20
    same = paired_difference(first, first, 50, names=["mean"])
    assert list(same) == ["mean"]
    assert same["mean"] | {"undefined": 0} == {
        "value": 0, "mean": 0, "std": 0, "low": 0, "high": 0, "undefined": 0, "above_zero": 0
    }  # fmt: skip


def test_a_difference_is_undefined_where_either_is():
    first, second = Means([2.0, 5.0, 5.0]), Means([1.0, 5.0, 5.0])
    missing = int((draw_counts(3, 100)[:, 0] == 0).sum())
    result = paired_difference(first, second, 100)["first"]
    assert (result["value"], result["mean"], result["undefined"], result["above_zero"]) == (1, 1, missing, 1)
    zero = paired_difference(first, second, 100, undefined="zero")["first"]
    assert zero["mean"] == pytest.approx((100 - missing) / 100)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="0 units to draw from"):
        draw_counts(0, 5)
    with pytest.raises(ValueError, match="`resamples` is 0"):
        draw_counts(5, 0)
    with pytest.raises(ValueError, match='must be "skip" or "zero"'):
        bootstrap(Means([1.0]), 2, undefined="drop")
    with pytest.raises(ValueError, match="3 and 2 units"):
        paired_difference(Means([1, 2, 3]), Means([1, 2]))
    with pytest.raises(ValueError, match="'median' is not in both"):
        paired_difference(Means([1, 2]), Means([1, 2]), names=["median"])
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(resamples, 3\)"):
        check_counts(np.ones(3), 3)
    for wrong in (-1.0, np.nan):
        with pytest.raises(ValueError, match="negative or NaN"):
            check_counts(np.array([[1.0, wrong]]), 2)


def test_protocol():
    assert isinstance(Means([1.0]), Statistic)
    assert not isinstance(object(), Statistic)
