"""How well scores tell two classes apart, from histograms: memory does not grow with the number of scores."""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

#: Scores between which so few units lie that they are likely to share a bin differ by less than this share of |score| + `KNEE`.
KNEE = 4.0
#: Bins of each column, and of all columns together where there are many.
MAX_BINS, MIN_BINS, ALL_BINS = 4096, 512, 2**19


def bins(columns: int) -> int:
    """Bins of each of so many columns: 4,096 for up to 128 of them, 512 for more than 1,000."""
    return min(MAX_BINS, max(MIN_BINS, ALL_BINS // max(columns, 1)))


def place(score: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The bin of each logit: evenly spaced in x / (|x| + 4), so that they are finest near 0 and no logit is too large for them."""
    share = (score / (np.abs(score) + KNEE) + 1) / 2
    return np.clip((share * count).astype(np.int64), 0, count - 1)


def auroc(positive: Int[np.ndarray, "columns bins"], negative: Int[np.ndarray, "columns bins"]) -> Float[np.ndarray, " columns"]:
    """Area under the receiver operating characteristic: the chance that a positive has the higher score; half for two of one bin.

    NaN for columns that lack one of the classes. Two scores in one bin count as equal, which moves the area by less than half of the share
    of such pairs.

    Args:
        positive: how many labels 1 have a score in each bin, lowest scores first.
        negative: the same of labels 0.
    """
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1).astype(np.float64)
    return np.divide((positive * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def average_precision(
    positive: Int[np.ndarray, "columns bins"], negative: Int[np.ndarray, "columns bins"]
) -> Float[np.ndarray, " columns"]:
    """Average precision: the sum of the precisions at each threshold, weighted by how much recall grows there; see `auroc`."""
    hits, misses = (np.cumsum(counts[:, ::-1], axis=1)[:, ::-1] for counts in (positive, negative))
    precision = np.divide(hits, hits + misses, out=np.zeros(hits.shape), where=hits > 0)
    total, other = positive.sum(1), negative.sum(1)
    return np.divide((positive * precision).sum(1), total, out=np.full(len(total), np.nan), where=(total > 0) & (other > 0))
