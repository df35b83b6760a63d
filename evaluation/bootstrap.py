"""Bootstrap of metrics over images: draws, the protocol of a resampled metric, intervals, paired differences.

A resample draws N of N units (usually radiographs) with replacement. It is described by how often each unit was drawn,
so that a metric does once what does not depend on the draw (matching boxes, sorting scores, counting n-grams) and
turns the counts of many resamples into values at once. Data sets with the same number of units get the same draw for
one seed; this is what makes intervals of differences between two models paired.

The official ChEX evaluation reports the mean and the population standard deviation over resamples. Here the value of
the data themselves comes first, with the percentile interval; mean and standard deviation are given beside it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np


DEFAULT_SEED = 2147483647  # that of the official code; its generator is another, so its draws are too
PERCENTILES = (2.5, 97.5)
_CHUNK_COUNTS = 2_000_000  # counts that are held at once, 16 MB

Undefined = Literal["skip", "zero"]


@runtime_checkable
class Statistic(Protocol):
    """A metric as a function of how often each unit of the bootstrap was drawn.

    Attributes:
        names: names of the values, in order.
        num_units: number N of units, usually images, those without any target included.
    """

    names: tuple[str, ...]
    num_units: int

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N), how often each unit is in each of B resamples -> values (B, len(names)) float64.

        NaN where a value is undefined. With all counts 1 it is the metric of the data.
        """
        ...


def check_counts(counts: np.ndarray, num_units: int) -> np.ndarray:
    """`counts` as a (B, num_units) array.

    Raises:
        ValueError: if the shape is another, or a count is negative or NaN.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[1] != num_units:
        raise ValueError(
            f"Counts have the shape {counts.shape}; expected (resamples, {num_units}), one column per unit."
        )
    if counts.size and not counts.min() >= 0:  # also false for NaN
        raise ValueError("A count is negative or NaN; counts say how often a unit is in a resample.")
    return counts


def iterate_counts(num_units: int, resamples: int, seed: int = DEFAULT_SEED) -> Iterator[np.ndarray]:
    """The draw of `draw_counts`, some resamples at a time, so that memory stays bounded."""
    if num_units < 1:
        raise ValueError(f"There are {num_units} units to draw from; the bootstrap needs at least one.")
    if resamples < 1:
        raise ValueError(f"`resamples` is {resamples}; the bootstrap needs at least one.")
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK_COUNTS // num_units)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = generator.integers(0, num_units, (rows, num_units))
        drawn += np.arange(rows)[:, None] * num_units
        yield np.bincount(drawn.ravel(), minlength=rows * num_units).reshape(rows, num_units).astype(np.int32)


def draw_counts(num_units: int, resamples: int, seed: int = DEFAULT_SEED) -> np.ndarray:
    """How often each unit is in each resample: (resamples, num_units) int32, every row sums to `num_units`.

    The draw depends on the three arguments alone; fewer resamples are the first ones of more.

    Raises:
        ValueError: without units or resamples.
    """
    return np.concatenate(list(iterate_counts(num_units, resamples, seed)))


def point_estimate(statistic: Statistic) -> np.ndarray:
    """Values (len(names),) of the data themselves; all NaN if there are no units."""
    if not statistic.num_units:
        return np.full(len(statistic.names), np.nan)
    return np.asarray(statistic(np.ones((1, statistic.num_units))), dtype=np.float64)[0]


def resample(statistic: Statistic, resamples: int = 1000, seed: int = DEFAULT_SEED) -> np.ndarray:
    """Values (resamples, len(names)) float64 of all resamples, NaN where undefined."""
    if not statistic.num_units:
        return np.full((resamples, len(statistic.names)), np.nan)
    chunks = iterate_counts(statistic.num_units, resamples, seed)
    return np.concatenate([np.asarray(statistic(counts), dtype=np.float64) for counts in chunks])


def summarise(value: float, values: np.ndarray, undefined: Undefined = "skip") -> dict[str, float | int | None]:
    """Point estimate and resamples of one metric -> {"value", "mean", "std", "low", "high", "undefined"}.

    Args:
        value: of the data, NaN if undefined.
        values: (B,) of the resamples.
        undefined: "skip" leaves undefined resamples out; "zero" counts them as 0, and the value too, as the official
            code does (they are still counted in "undefined").

    Returns:
        mean and population standard deviation (ddof 0) over resamples, the 2.5 and 97.5 percentiles as low and high,
        the number of undefined resamples. None for what is undefined.
    """
    if undefined not in ("skip", "zero"):
        raise ValueError(f'`undefined` is {undefined!r}; it must be "skip" or "zero".')
    values = np.asarray(values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    missing = len(values) - len(defined)
    if undefined == "zero":
        defined = np.nan_to_num(values, nan=0.0)
        value = 0.0 if np.isnan(value) else value
    result: dict[str, float | int | None] = {"value": None if np.isnan(value) else float(value)}
    if len(defined):
        low, high = np.percentile(defined, PERCENTILES)
        result |= {"mean": float(defined.mean()), "std": float(defined.std()), "low": float(low), "high": float(high)}
    else:
        result |= dict.fromkeys(("mean", "std", "low", "high"))
    return result | {"undefined": missing}


def bootstrap(
    statistic: Statistic, resamples: int = 1000, seed: int = DEFAULT_SEED, undefined: Undefined = "skip"
) -> dict[str, dict[str, Any]]:
    """Point estimate and bootstrap of every value of a statistic; see `summarise` for the entries.

    Raises:
        ValueError: for fewer than one resample, or an unknown way to treat undefined resamples.
    """
    points, values = point_estimate(statistic), resample(statistic, resamples, seed)
    return {
        name: summarise(points[column], values[:, column], undefined) for column, name in enumerate(statistic.names)
    }


def paired_difference(
    first: Statistic,
    second: Statistic,
    resamples: int = 1000,
    seed: int = DEFAULT_SEED,
    names: Sequence[str] | None = None,
    undefined: Undefined = "skip",
) -> dict[str, dict[str, Any]]:
    """Bootstrap of `first - second`, both of the same units in the same order, each resample with one draw for both.

    Args:
        first, second: statistics, for example of two models.
        resamples, seed: of the draw.
        names: which values; left out: all that both have.
        undefined: as in `summarise`; a difference is undefined if either value is.

    Returns:
        name -> as `summarise`, and "above_zero", the share of the (defined) resamples with a positive difference.

    Raises:
        ValueError: if the numbers of units differ or a name is missing in one of them.
    """
    if first.num_units != second.num_units:
        raise ValueError(
            f"The statistics have {first.num_units} and {second.num_units} units; a paired difference needs the same "
            "units in the same order in both."
        )
    if names is None:
        names = tuple(name for name in first.names if name in second.names)
    for name in names:
        if name not in first.names or name not in second.names:
            raise ValueError(f"{name!r} is not in both statistics: {first.names} and {second.names}.")
    columns = [first.names.index(name) for name in names], [second.names.index(name) for name in names]

    def filled(values: np.ndarray) -> np.ndarray:
        return np.nan_to_num(values, nan=0.0) if undefined == "zero" else values

    points, values = (
        filled(function(first)[..., columns[0]]) - filled(function(second)[..., columns[1]])
        for function in (point_estimate, lambda statistic: resample(statistic, resamples, seed))
    )
    result: dict[str, dict[str, Any]] = {}
    for column, name in enumerate(names):
        defined = values[:, column][~np.isnan(values[:, column])]
        share = float((defined > 0).mean()) if len(defined) else None
        result[name] = summarise(points[column], values[:, column], undefined) | {"above_zero": share}
    return result
