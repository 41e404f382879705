"""One potential in several codes, behind one interface."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ase
import torch
from torch import Tensor

from matfound.graphs.neighbors import add_graphs
from matfound.inference.predict import model_input, ready
from matfound.models.base import Potential
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import collate

#: Rows and columns of xx, yy, zz, yz, xz, xy.
VOIGT = ((0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1))
#: Energies (systems,) in eV, forces (atoms, 3) in eV/Å, stress (systems, 6) in eV/Å³ or None where it was not asked for.
Outputs = tuple[Tensor, Tensor, Tensor | None]
Labels = tuple[Tensor, Tensor, Tensor]


class Code(ABC):
    """A model in somebody's code, ready to be timed.

    Attributes:
        module: has the parameters.
        trainable: those of them that are trained; calculators may freeze them.
        calculator_only: it has a calculator, and nothing else.
    """

    module: torch.nn.Module
    trainable: list[torch.nn.Parameter]
    calculator_only = False

    @abstractmethod
    def calculator(self) -> Any:
        """An ASE calculator."""

    @abstractmethod
    def batch(self, structures: Sequence[ase.Atoms]) -> Any:
        """The structures with their graphs, on the device, as the model takes them."""

    @abstractmethod
    def edges(self, batch: Any) -> int:
        """Number of edges of a batch."""

    @abstractmethod
    def outputs(self, batch: Any, *, training: bool) -> Outputs:
        """The forward pass; `training` keeps the graph for a loss on forces."""

    def infer(self, batch: Any) -> Callable[[], Outputs]:
        """Energies, forces and, where the benchmark has it, stress."""
        for parameter in self.trainable:
            parameter.requires_grad_(False)
        self.module.eval()
        return lambda: self.outputs(batch, training=False)

    def train(self, batch: Any, labels: Labels) -> Callable[[], Tensor]:
        """The gradient of a loss of all outputs with respect to every parameter; the loss is returned."""
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        self.module.train()
        atoms = labels[1].shape[0] / labels[0].shape[0]

        def step() -> Tensor:
            self.module.zero_grad(set_to_none=True)
            energy, forces, stress = self.outputs(batch, training=True)
            loss = ((energy - labels[0]) / atoms).square().mean() + 10 * (forces - labels[1]).square().mean()
            if stress is not None:
                loss = loss + (stress - labels[2]).square().mean()
            loss.backward()
            return loss.detach()

        return step


class Ours(Code):
    """This package.

    Args:
        potential: is copied.
        device: where to compute.
        stress: hand out stress; forces and stress are computed anyway.
        options: of `Calculator`.
    """

    def __init__(self, potential: Potential, device: torch.device, *, stress: bool, **options: Any) -> None:
        self.device, self.stress, self.options = device, stress, options
        self.module = self.potential = ready(potential, device)
        self.trainable = list(self.potential.parameters())
        if options.get("compile"):
            self.potential.compile()

    def calculator(self) -> Any:
        from matfound import Calculator

        return Calculator(self.potential, device=self.device, **self.options)

    def batch(self, structures: Sequence[ase.Atoms]) -> Any:
        samples = [model_input(self.potential, from_atoms(atoms, labels=False)) for atoms in structures]
        return collate([add_graphs(sample, self.potential.graphs) for sample in samples]).to(self.device)

    def edges(self, batch: Any) -> int:
        return int(batch.edge_index.shape[1])

    def outputs(self, batch: Any, *, training: bool) -> Outputs:
        with torch.set_grad_enabled(training):
            found = self.potential(batch)
        return found["energy"], found["forces"], found["stress"][:, VOIGT[0], VOIGT[1]] if self.stress else None


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In which the rivals make tensors of what they read, and of elements."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
