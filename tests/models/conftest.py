"""A small model of the NequIP family, untrained but with every scale set."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from matfound.models.base import Potential, Statistics
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead, GraphHead, NodeHead


@pytest.fixture
def small_potential() -> Callable[..., Potential]:
    """Makes one: arguments go to the backbone; two datasets, five elements."""

    def make(datasets: tuple[str, ...] = ("a", "b"), default_dataset: dict[str, str] | None = None, **arguments: Any) -> Potential:
        torch.manual_seed(0)
        options = {"cutoff": 4.0, "num_layers": 2, "irreps": "8x0e+4x1o+4x2e", "radial_hidden": (8,)} | arguments
        heads = {"energy": EnergyHead((8,)), "gap": GraphHead("gap", (8,)), "charges": NodeHead("charges", (8,))}
        potential = Potential(NequIP(**options), heads, datasets, default_dataset, licence="MIT")
        references = torch.full((len(datasets), 119), torch.nan, dtype=torch.float64)
        references[:, [1, 6, 8, 12, 22]] = torch.tensor([-13.6, -1029.0, -2041.0, -5.0, -7.0], dtype=torch.float64)
        references[1:] += 1.0
        ones = torch.ones(len(datasets), dtype=torch.float64)
        rms = {"energy": ones, "forces": 2 * ones, "gap": 5 * ones, "charges": 0.5 * ones}
        potential.fit_scales(Statistics(list(datasets), references, rms, {"gap": 3 * ones, "charges": 0 * ones}, {"main": 20.0}))
        return potential

    return make
