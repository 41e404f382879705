"""Backbones whose weight networks can give way to tables."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.nn.base import Backbone
from matfound.nn.radial import BesselBasis, RadialMLP, radial_tables


class Tabulated(Backbone):
    """A backbone with `cutoff`, `basis` and `layers`, each of which has a `weight_network` of the radial functions, and a `table` or None.

    Tables are for float32 and for inference. They go when the model is set to train, or when weights are loaded.
    """

    cutoff: float
    basis: BesselBasis
    layers: nn.ModuleList

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_pre_hook(_forget)

    def tabulate(self) -> bool:
        """As `Backbone.tabulate`."""
        self.forget_tables()
        parameters = list(self.parameters())
        if self.training or any(p.requires_grad for p in parameters) or parameters[0].dtype != torch.float32:
            return False
        if not len(self.layers):
            return False
        functions = []
        for layer in self.layers:
            basis, network = (copy.deepcopy(module).double() for module in (self.basis, layer.weight_network))
            assert isinstance(network, RadialMLP)
            functions.append(lambda r, basis=basis, network=network: network(basis(r)))
        found = radial_tables(functions, self.cutoff, parameters[0].device)
        if found is None:
            return False
        for layer, table in zip(self.layers, found, strict=True):
            layer.table = table.to(parameters[0])
        return True

    def forget_tables(self) -> None:
        """Back to the networks."""
        for layer in self.layers:
            layer.table = None  # type: ignore[assignment]

    def radial(self, r: Float[Tensor, " edges"]) -> Float[Tensor, "edges num"]:
        """What layers take of the lengths: radial functions or, with tables, the one place in them."""
        table: Tensor | None = self.layers[0].table if len(self.layers) else None  # type: ignore[assignment]
        return self.basis(r) if table is None else (r * ((table.shape[0] - 1) / self.cutoff)).unsqueeze(1)

    def train(self, mode: bool = True) -> "Tabulated":
        """As `Module.train`."""
        if mode:
            self.forget_tables()
        super().train(mode)
        return self


def _forget(module: Tabulated, *_: Any) -> None:
    module.forget_tables()
