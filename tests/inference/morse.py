"""A Morse pair potential as a matfound model, and the same potential in numpy with its analytic derivatives: the oracle of the tests.

V(r) = depth · ((1 - exp(-a (r - r0)))² - 1) · (1 - (r / cutoff)²)³ for every pair within the cutoff, twice continuously differentiable.
"""

from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from matfound.graphs.neighbors import edge_vectors
from matfound.graphs.spec import GraphSpec
from matfound.models.base import Backbone, Head, NodeFeatures, Potential
from matfound.nn.gradients import forces_and_stress, sum_over
from matfound.structures.atomic_data import AtomicData

CUTOFF, A, R0, DEPTH = 4.5, 1.2, 2.4, 0.25  # exact in float32
ELEMENTS = (1, 6, 8, 11, 14, 17, 29)


class MorseBackbone(Backbone):
    """Hands on the distances' energies as the one feature."""

    def __init__(self, cutoff: float = CUTOFF) -> None:
        super().__init__()
        self.graphs = {"main": GraphSpec(cutoff)}
        self.symmetry, self.continuity, self.channels = "E3", 2, 1
        self.elements = frozenset(ELEMENTS)
        self.cutoff = cutoff
        self.depth = nn.Parameter(torch.tensor(DEPTH))

    def forward(self, batch: AtomicData) -> NodeFeatures:
        vectors = edge_vectors(batch).requires_grad_(True)
        r = torch.linalg.vector_norm(vectors, dim=1).to(self.depth.dtype)
        pair = self.depth * ((1 - torch.exp(-A * (r - R0))) ** 2 - 1) * (1 - (r / self.cutoff) ** 2) ** 3
        energies = sum_over(pair, batch.edge_index[1], batch.num_nodes) / 2
        return NodeFeatures(energies[:, None], {"main": vectors})


class MorseHead(Head):
    """Energy, forces, stress; the second dataset is twice as deep."""

    def __init__(self, stress: bool = True, poison: int = 0) -> None:
        super().__init__()
        self.outputs = ("energy", "forces", "stress") if stress else ("energy", "forces")
        self.conservative, self.stress, self.poison = True, stress, poison

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Tensor]:
        energies = features.scalars[:, 0].double() * (1 + batch.dataset)[batch.batch]
        energy = sum_over(energies, batch.batch, batch.num_systems)
        forces, stress = forces_and_stress(energy, features.vectors, batch, create_graph=self.training)
        if self.poison:  # NaN forces for an element: a model that is broken for some structures
            forces = torch.where((batch.numbers == self.poison)[:, None], torch.nan, forces)
        return {"energy": energy, "energies": energies, "forces": forces} | ({"stress": stress} if self.stress else {})


class ExtrasHead(Head):
    """Things that are not energies: a gap, charges, a dipole."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = ("gap", "charges", "dipole")

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Tensor]:
        number = batch.numbers.double()
        gap = sum_over(number, batch.batch, batch.num_systems) / batch.natoms
        charges = 0.01 * (number - gap[batch.batch])
        return {"gap": gap, "charges": charges, "dipole": sum_over(charges[:, None] * batch.pos, batch.batch, batch.num_systems)}


def potential(extras: bool = False, stress: bool = True, datasets: tuple[str, ...] = ("default",), poison: int = 0, **options) -> Potential:
    """The model, in float64 and eval mode."""
    heads = {"energy": MorseHead(stress, poison)} | ({"extras": ExtrasHead()} if extras else {})
    return Potential(MorseBackbone(), heads, datasets=datasets, **options).double().eval()


def oracle(atoms, scale: float = 1.0, depth: float = DEPTH) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces (atoms, 3) and stress (3, 3; NaN without a lattice), from derivatives on paper and a sum over images."""
    energy, forces, virial = 0.0, np.zeros((len(atoms), 3)), np.zeros((3, 3))
    cell = atoms.cell.complete().array
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    scaled = np.linalg.solve(cell.T, atoms.positions.T).T
    spread = np.ceil(np.ptp(scaled, axis=0)) if len(atoms) else np.zeros(3)
    reach = [int(np.ceil(CUTOFF / h) + s) if p else 0 for h, s, p in zip(heights, spread, atoms.pbc, strict=True)]
    for shift in product(*[range(-n, n + 1) for n in reach]):
        d = atoms.positions[None] + np.array(shift) @ cell - atoms.positions[:, None]
        r = np.linalg.norm(d, axis=2)
        close = (r < CUTOFF) & (r > 1e-9)
        x, cut = np.exp(-A * (r - R0)), 1 - (r / CUTOFF) ** 2
        well = (1 - x) ** 2 - 1
        pair = np.where(close, well * cut**3, 0.0)
        slope = np.where(close, 2 * A * x * (1 - x) * cut**3 + well * 3 * cut**2 * (-2 * r / CUTOFF**2), 0.0)
        unit = d / np.where(r > 0, r, 1)[:, :, None]
        energy += pair.sum() / 2
        forces += (slope[:, :, None] * unit).sum(1)
        virial += np.einsum("ij,ijk,ijl->kl", slope, unit, d) / 2
    stress = virial / abs(np.linalg.det(cell)) if atoms.pbc.any() else np.full((3, 3), np.nan)
    return energy * depth * scale, forces * depth * scale, stress * depth * scale
