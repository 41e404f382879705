"""How much of each dataset an epoch has, and which of its samples."""

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from matfound.errors import InputError, nearest


class Mixture:
    """An epoch of several datasets in chosen proportions.

    Dataset d gives round(p_d N) samples to every epoch of N: the next ones of its permutations, one after another, so that within a
    permutation no sample comes twice, and none is left out when an epoch ends in the middle of one. Everything follows from (seed,
    epoch) alone.

    Args:
        sizes: training samples of each dataset.
        weights: share of each dataset, up to a common factor. Default: see `temperature`.
        temperature: T of p ∝ n^(1/T): 1 mixes by size, larger ones raise small sets, infinity takes as much of each.
        samples_per_epoch: N; default: as many samples as there are.
        seed: of the permutations.

    Raises:
        InputError: a weight without samples, or one so small that an epoch has none of them; and as `check_mixture`.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float] | None = None,
        temperature: float | None = None,
        samples_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        check_mixture(list(sizes), weights, temperature, samples_per_epoch)
        self.sizes, self.seed = dict(sizes), seed
        if weights is None:
            exponent = 1.0 / (1.0 if temperature is None else temperature)
            weights = {name: float(size) ** exponent if size else 0.0 for name, size in sizes.items()}
        for name, size in sizes.items():
            if weights[name] and not size:
                raise InputError(f"'{name}' has a weight but no training frames", remedy="check its split, or set its weight to 0")
        total = sum(weights.values())
        whole = sum(sizes.values()) if samples_per_epoch is None else samples_per_epoch
        #: Samples of each dataset in an epoch.
        self.counts = {name: round(weights[name] / total * whole) if total else 0 for name in sizes}
        for name, count in self.counts.items():
            if weights[name] and not count:
                share = weights[name] / total
                raise InputError(
                    f"an epoch of {whole:,} samples has none of '{name}', whose share is {share:.2g}",
                    remedy=f"raise data.samples_per_epoch to at least {math.ceil(1 / share):,}, or the dataset's weight",
                )

    def epoch(self, epoch: int) -> Int[np.ndarray, " drawn"]:
        """The samples of an epoch in their order, counted through all datasets in the order of `sizes`."""
        kind = np.int32 if sum(self.sizes.values()) < 2**31 else np.int64
        drawn, offset = [np.zeros(0, dtype=kind)], 0
        for d, (name, size) in enumerate(self.sizes.items()):
            start, stop = epoch * self.counts[name], (epoch + 1) * self.counts[name]
            while start < stop:
                cycle, place = divmod(start, size)
                # A last entry that is not 0 makes a stream of its own: numpy takes [a, b] and [a, b, 0] for the same seed.
                walk = np.random.default_rng([self.seed, d, cycle, 1]).permutation(np.arange(offset, offset + size, dtype=kind))
                drawn.append(walk[place : place + stop - start])
                start += len(drawn[-1])
            offset += size
        order = np.concatenate(drawn)
        np.random.default_rng([self.seed, epoch]).shuffle(order)
        return order


def check_mixture(names: list[str], weights: Mapping[str, float] | None, temperature: float | None, samples_per_epoch: int | None) -> None:
    """Refuse proportions that make no sense.

    Raises:
        InputError: weights of other datasets or of not all of them, that are negative or all 0; a temperature that is not positive;
            both; an epoch without samples.
    """
    if weights is not None and temperature is not None:
        raise InputError("data.weights and data.temperature are two ways to say the same", remedy="set one of them")
    if weights is not None:
        for name in weights:
            if name not in names:
                raise InputError(f"data.weights has '{name}', which is no dataset", remedy=nearest(name, names))
        for name in names:
            if name not in weights:
                raise InputError(f"data.weights lacks '{name}'", remedy="give every dataset a weight; 0 does not train on it")
            if not 0 <= weights[name] < math.inf:
                raise InputError(f"data.weights: '{name}' must be a number that is not negative, received {weights[name]}")
        if not any(weights.values()):
            raise InputError("data.weights are all 0", remedy="give at least one dataset a weight")
    if temperature is not None and not temperature > 0:
        raise InputError(f"data.temperature must be positive, received {temperature}")
    if samples_per_epoch is not None and samples_per_epoch < 1:
        raise InputError(f"data.samples_per_epoch must be at least 1, received {samples_per_epoch}")
