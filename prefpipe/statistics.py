"""95 % confidence intervals: Wilson for proportions, percentile bootstrap for means of per-prompt values."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of successes / n (Wilson 1927), no continuity correction.

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 of n and at n of n.

    successes: may be fractional (ties that count one half). n: 0 tells nothing, hence (0, 1).
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is no proportion")
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, Z95**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    # At the ends one bound is exactly the share; rounding could put it just beside it.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == n else min(1.0, centre + half))


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) of the mean of values, which must be independent of each other:
    one per prompt, not one per completion.

    The same values in the same order and the same seed give the same interval.
    """
    import numpy as np

    if len(values) == 0:
        raise ValueError("no values to take the mean of")
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1")
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # One resample at a time: resamples x n indices at once are gigabytes for a large evaluation.
    means = [float(sample[rng.integers(len(sample), size=len(sample))].mean()) for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
