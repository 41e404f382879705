"""Forces and stress through edge vectors, against finite differences of pair potentials."""

import torch
from jaxtyping import Float
from torch import Tensor

from matfound.graphs.neighbors import add_graphs, edge_vectors
from matfound.graphs.spec import GraphSpec
from matfound.nn.gradients import forces_and_stress, sum_over
from matfound.structures.atomic_data import AtomicData, collate
from matfound.testing import random_crystal

GRAPHS = {"main": GraphSpec(4.0), "long": GraphSpec(5.5)}


def sample(seed: int, *, pbc: bool = True) -> AtomicData:
    return AtomicData.from_atoms(random_crystal(seed, natoms=6, pbc=pbc))


def pair_energy(vectors: dict[str, Tensor], batch: AtomicData) -> Float[Tensor, " systems"]:
    """A smooth pair potential on each graph; an attraction on the longer one, so that the graphs do different things."""
    total = torch.zeros(batch.num_systems, dtype=torch.float64)
    for name, sign in (("main", 1.0), ("long", -0.3)):
        distance = vectors[name].norm(dim=1)
        cutoff = GRAPHS[name].cutoff
        pair = sign * torch.exp(-distance) * (1 - distance / cutoff) ** 3
        target = batch["edge_index" if name == "main" else f"edge_index@{name}"][1]
        total = total + sum_over(pair, batch.batch[target], batch.num_systems) / 2
    return total


def energy(data: AtomicData) -> Float[Tensor, " systems"]:
    batch = collate([add_graphs(data, GRAPHS)])
    return pair_energy({name: edge_vectors(batch, name) for name in GRAPHS}, batch)


def predicted(batch: AtomicData) -> tuple[Tensor, Tensor]:
    vectors = {name: edge_vectors(batch, name).requires_grad_() for name in GRAPHS}
    return forces_and_stress(pair_energy(vectors, batch), vectors, batch, create_graph=False)


def strained(seed: int, strain: Float[Tensor, "3 3"]) -> AtomicData:
    data = sample(seed)
    deformation = torch.eye(3, dtype=torch.float64) + strain
    data.pos, data.cell = data.pos @ deformation, data.cell @ deformation
    return data


def test_forces_are_minus_the_gradient() -> None:
    data = sample(1)
    forces, _ = predicted(collate([add_graphs(data, GRAPHS)]))
    assert forces.abs().max() > 0.01
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        step = torch.zeros_like(data.pos)
        step[atom, axis] = 1e-4
        ends = [sample(1), sample(1)]
        ends[0].pos, ends[1].pos = data.pos + step, data.pos - step
        slope = (energy(ends[0]) - energy(ends[1])) / 2e-4
        torch.testing.assert_close(forces[atom, axis], -slope[0], rtol=1e-6, atol=1e-8)


def test_stress_is_the_strain_derivative_and_positive_in_tension() -> None:
    data = sample(2)
    _, stress = predicted(collate([add_graphs(data, GRAPHS)]))
    assert stress.abs().max() > 1e-3
    volume = torch.linalg.det(data.cell[0]).abs()
    for i in range(3):
        for j in range(3):
            strain = torch.zeros(3, 3, dtype=torch.float64)
            strain[i, j] += 5e-5
            strain[j, i] += 5e-5
            slope = (energy(strained(2, strain)) - energy(strained(2, -strain))) / 2e-4
            torch.testing.assert_close(stress[0, i, j], slope[0] / volume, rtol=1e-6, atol=1e-9)


def test_each_structure_of_a_batch_is_by_itself() -> None:
    samples = [sample(3), sample(4, pbc=False), sample(5)]
    forces, stress = predicted(collate([add_graphs(data, GRAPHS) for data in samples]))
    for i, data in enumerate(samples):
        alone = predicted(collate([data]))
        torch.testing.assert_close(forces[6 * i : 6 * i + 6], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stress[i : i + 1], alone[1], rtol=1e-12, atol=1e-12, equal_nan=True)
    assert stress[1].isnan().all()
    assert not stress[[0, 2]].isnan().any()


def test_without_edges() -> None:
    data = AtomicData(
        numbers=torch.tensor([2]),
        pos=torch.zeros(1, 3, dtype=torch.float64),
        cell=20 * torch.eye(3, dtype=torch.float64)[None],
        pbc=torch.ones(1, 3, dtype=torch.bool),
    )
    forces, stress = predicted(collate([add_graphs(data, GRAPHS)]))
    assert forces.abs().max() == 0
    assert stress.abs().max() == 0


def test_a_missing_lattice_does_not_poison_second_derivatives() -> None:
    """NaN of one system must not enter the gradient of a loss on the others."""
    batch = collate([add_graphs(data, GRAPHS) for data in (sample(6), sample(7, pbc=False))])
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    vectors = {name: edge_vectors(batch, name).requires_grad_() for name in GRAPHS}
    _, stress = forces_and_stress(scale * pair_energy(vectors, batch), vectors, batch, create_graph=True)
    (slope,) = torch.autograd.grad(stress[0].square().sum(), scale)
    torch.testing.assert_close(slope, 2 * stress[0].square().sum().detach())
