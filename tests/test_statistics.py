"""Intervals against closed forms, published values and simulation."""

import math
import random
import statistics

import pytest

from prefpipe.statistics import Z95, bootstrap_mean, wilson


def test_wilson_of_8_out_of_10():
    """The textbook value: (0.4902, 0.9433)."""
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_wilson_at_the_ends_is_z2_over_n_plus_z2(n):
    assert wilson(0, n) == (0.0, pytest.approx(Z95**2 / (n + Z95**2)))
    assert wilson(n, n) == (pytest.approx(n / (n + Z95**2)), 1.0)


@pytest.mark.parametrize(("successes", "n"), [(1, 3), (8, 10), (37, 200), (0.5, 4)])
def test_wilson_bounds_solve_the_score_equation(successes, n):
    """Both bounds p satisfy (share - p)^2 = z^2 p (1 - p) / n, and lie on both sides of the share."""
    low, high = wilson(successes, n)
    share = successes / n
    assert low < share < high
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(Z95**2 * p * (1 - p) / n)


def test_wilson_is_symmetric_in_success_and_failure():
    low, high = wilson(3, 17)
    assert wilson(14, 17) == (pytest.approx(1 - high), pytest.approx(1 - low))


def test_wilson_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (math.nan, 3)])
def test_wilson_refuses_what_is_no_proportion(successes, n):
    with pytest.raises(ValueError, match="no proportion"):
        wilson(successes, n)


def test_bootstrap_of_many_values_agrees_with_the_normal_approximation():
    """mean +- 1.96 s / sqrt(n); 2000 resamples put each bound within a tenth of the half-width."""
    rng = random.Random(1)
    values = [rng.gauss(3.0, 2.0) for _ in range(2000)]
    half = Z95 * statistics.pstdev(values) / math.sqrt(len(values))
    low, high = bootstrap_mean(values)
    assert low == pytest.approx(statistics.fmean(values) - half, abs=half / 10)
    assert high == pytest.approx(statistics.fmean(values) + half, abs=half / 10)


def test_bootstrap_of_zeros_and_ones_agrees_with_wilson():
    low, high = bootstrap_mean([1.0] * 300 + [0.0] * 200)
    assert (low, high) == (pytest.approx(wilson(300, 500)[0], abs=0.01), pytest.approx(wilson(300, 500)[1], abs=0.01))


def test_bootstrap_interval_covers_the_mean_about_19_times_in_20():
    """100 draws of 60 values; coverage of a percentile interval at n = 60 is about 0.94, so below 86 is 3 sigma off."""
    rng = random.Random(2)
    covered = 0
    for trial in range(100):
        low, high = bootstrap_mean([rng.random() for _ in range(60)], seed=trial, resamples=400)
        covered += low <= 0.5 <= high
    assert covered >= 86


def test_bootstrap_repeats_itself_and_follows_its_seed():
    values = [0.1, 0.5, 0.2, 0.9, 0.4]
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3, resamples=50) != bootstrap_mean(values, seed=4, resamples=50)


def test_bootstrap_of_equal_values_has_no_width():
    assert bootstrap_mean([2.0, 2.0, 2.0]) == (2.0, 2.0)


@pytest.mark.parametrize(("values", "resamples"), [([], 10), ([1.0], 0)])
def test_bootstrap_refuses_nothing(values, resamples):
    with pytest.raises(ValueError, match=r"no values|resamples"):
        bootstrap_mean(values, resamples=resamples)
