"""Bootstrap intervals of means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BOOTSTRAP_RESAMPLES = 2000


def bootstrap_interval(values: Sequence[float] | np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values [M], from ``BOOTSTRAP_RESAMPLES`` seeded resamples."""
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(BOOTSTRAP_RESAMPLES, len(array)))
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(array[picks].mean(axis=1), [tail, 1.0 - tail])
    return float(low), float(high)
