"""Which image each of several texts belongs to."""

from collections.abc import Sequence

import numpy as np


def check_units(units: Sequence[int] | None, num_units: int | None, num_pairs: int) -> tuple[np.ndarray, int]:
    """The image of each pair, (P,) int64, and the number of images; without `units` each pair is an image of its own.

    Raises:
        ValueError: for another number of units than of pairs, or numbers that are no integers from 0 to num_units - 1.
    """
    images = np.arange(num_pairs, dtype=np.int64) if units is None else np.asarray(units)
    if images.shape != (num_pairs,):
        raise ValueError(
            f"`units` has the shape {images.shape} for {num_pairs} pairs: give one image number per pair."
        )
    if num_pairs and not np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"`units` holds {images.dtype} values: image numbers are integers from 0.")
    images = images.astype(np.int64)
    highest = int(images.max(initial=-1))
    num_units = highest + 1 if num_units is None else num_units
    if num_pairs and (images.min() < 0 or highest >= num_units):
        wrong = int(images.argmin() if images.min() < 0 else images.argmax())
        raise ValueError(f"`units[{wrong}]` is {int(images[wrong])}: images are numbered from 0 to {num_units - 1}.")
    return images, num_units
