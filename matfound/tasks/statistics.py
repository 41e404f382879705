"""Statistics of the training data, before training: element references, spreads, neighbour counts."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matfound.errors import InputError
from matfound.fields import FIELDS, MAIN_GRAPH, graph_key
from matfound.nn.base import Statistics
from matfound.structures.atomic_data import AtomicData, present_rows


def collect(samples: Iterable[AtomicData], datasets: list[str]) -> Statistics:
    """One pass over structures that carry `dataset` and, if neighbour counts are wanted, graphs.

    Raises:
        InputError: there are no structures.
    """
    compositions: list[list[np.ndarray]] = [[] for _ in datasets]
    energies: list[list[float]] = [[] for _ in datasets]
    elements: list[set[int]] = [set() for _ in datasets]
    sums: dict[str, Tensor] = {}
    edges: dict[str, int] = {}
    atoms = 0
    for sample in samples:
        d = int(sample.dataset)
        numbers = sample.numbers.numpy()
        atoms += len(numbers)
        elements[d].update(numbers.tolist())
        if "energy" in sample and len(numbers):
            compositions[d].append(np.bincount(numbers, minlength=119).astype(float))
            energies[d].append(float(sample.energy))
        for graph in sample.graph_names():
            edges[graph] = edges.get(graph, 0) + sample[graph_key("edge_index", graph)].shape[1]
        for name in sample.field_names():
            if FIELDS[name.partition("@")[0]].label and FIELDS[name].dtype == "float64" and name != "energy":
                _accumulate(sums.setdefault(name, torch.zeros(len(datasets), 3, dtype=torch.float64)), d, sample[name])
    if not atoms:
        raise InputError("the training data holds no atoms", remedy="check the split and the paths")
    references = torch.full((len(datasets), 119), torch.nan, dtype=torch.float64)
    rms: dict[str, Tensor] = {}
    mean: dict[str, Tensor] = {}
    spread = torch.full((len(datasets),), torch.nan, dtype=torch.float64)
    for d, known in enumerate(elements):
        references[d, sorted(known)] = 0.0
        if energies[d]:
            fitted, residual = fit_references(np.array(compositions[d]), np.array(energies[d]))
            references[d, sorted(known)] = torch.from_numpy(fitted)[sorted(known)]
            spread[d] = float(np.sqrt(np.mean(residual**2)))
    rms["energy"] = spread
    for name, total in sums.items():
        rms[name] = torch.sqrt(total[:, 1] / total[:, 2])
        mean[name] = total[:, 0] / total[:, 2]
    neighbors = {graph: count / max(atoms, 1) for graph, count in edges.items()}
    return Statistics(list(datasets), references, rms, mean, neighbors or {MAIN_GRAPH: 1.0})


def _accumulate(total: Float[Tensor, "datasets 3"], d: int, value: Float[Tensor, "rows *d"]) -> None:
    known = value[present_rows(value)]
    total[d] += torch.stack([known.sum(), known.square().sum(), torch.tensor(float(known.numel()), dtype=torch.float64)])


def fit_references(counts: np.ndarray, energies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies of the elements by least squares: E ≈ Σ_z n_z ε_z.

    Args:
        counts: (structures, 119) atoms of each element.
        energies: (structures,) total energies, eV.

    Returns:
        ε (119,), 0 for absent elements, of least norm where the compositions do not determine it; and the residual per atom.
    """
    present = np.nonzero(counts.any(axis=0))[0]
    natoms = counts.sum(axis=1)
    # Weighted by 1/natoms: every structure counts with its energy per atom.
    solution, *_ = np.linalg.lstsq(counts[:, present] / natoms[:, None], energies / natoms, rcond=None)
    fitted = np.zeros(counts.shape[1])
    fitted[present] = solution
    return fitted, (energies - counts @ fitted) / natoms
