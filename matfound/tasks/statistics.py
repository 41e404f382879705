"""Statistics of the training data, before training: element references, spreads, neighbour counts."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from matfound.errors import InputError
from matfound.fields import FIELDS, MAIN_GRAPH, Field, graph_key
from matfound.nn.base import Statistics
from matfound.structures.atomic_data import AtomicData, present_rows

#: So many compositions of a dataset are kept before they are joined to a triangle.
MAX_ROWS = 100_000
#: Energies (eV/atom) that are smaller than this after the references have been fitted are no more than rounding: of fewer structures than
#: elements, say.
ROUNDING = 1e-7


def collect(samples: Iterable[AtomicData], datasets: list[str]) -> Statistics:
    """One pass over structures or batches that carry `dataset` and, if neighbour counts are wanted, graphs.

    Memory does not grow with the number of structures beyond `MAX_ROWS` of each dataset.

    Raises:
        InputError: there are no structures.
    """
    energies = [References() for _ in datasets]
    elements = torch.zeros(len(datasets), 119, dtype=torch.bool)
    sums: dict[str, Tensor] = {}
    edges: dict[str, int] = {}
    atoms = 0
    for sample in samples:
        if not sample.num_systems:
            continue
        system = sample.batch if sample.is_batch else torch.zeros_like(sample.numbers)
        atoms += sample.num_nodes
        elements[sample.dataset[system], sample.numbers] = True
        if "energy" in sample:
            _add_energies(energies, sample, system)
        for graph in sample.graph_names():
            edges[graph] = edges.get(graph, 0) + sample[graph_key("edge_index", graph)].shape[1]
        for name in sample.field_names():
            known = FIELDS[name.partition("@")[0]]
            if known.label and known.level in ("system", "atom") and known.dtype in ("float64", "int64") and name != "energy":
                if name not in sums:
                    sums[name] = torch.zeros(len(datasets), 3, *(known.shape if known.group else ()), dtype=torch.float64)
                _accumulate(sums[name], known, sample[name], sample.dataset[system] if known.level == "atom" else sample.dataset)
    if not atoms:
        raise InputError("the training data holds no atoms", remedy="check the split and the paths")
    references = torch.full((len(datasets), 119), torch.nan, dtype=torch.float64)
    spread = torch.full((len(datasets),), torch.nan, dtype=torch.float64)
    for d, mine in enumerate(energies):
        references[d, elements[d]] = 0.0
        if mine.structures:
            fitted, residual = mine.fit()
            spread[d] = residual if residual > ROUNDING else 0.0
            references[d, elements[d]] = torch.from_numpy(fitted)[elements[d]]
    rms = {"energy": spread} | {name: torch.sqrt(total[:, 1] / total[:, 2]) for name, total in sums.items() if _is_number(name)}
    mean = {name: total[:, 0] / total[:, 2] for name, total in sums.items()}
    neighbors = {graph: count / max(atoms, 1) for graph, count in edges.items()}
    return Statistics(list(datasets), references, rms, mean, neighbors or {MAIN_GRAPH: 1.0})


def _is_number(name: str) -> bool:
    return FIELDS[name.partition("@")[0]].dtype == "float64"


def _add_energies(energies: "list[References]", sample: AtomicData, system: Int[Tensor, " atoms"]) -> None:
    """Compositions and energies of the structures that have both."""
    counts = np.bincount((system * 119 + sample.numbers).numpy(), minlength=119 * sample.num_systems).reshape(-1, 119)
    label = sample.energy.numpy()
    there = ~np.isnan(label) & counts.any(1)
    for d in np.unique(sample.dataset.numpy()[there]):
        mine = there & (sample.dataset.numpy() == d)
        energies[d].add(counts[mine], label[mine])


def _accumulate(total: Float[Tensor, "datasets 3 *columns"], known: Field, value: Tensor, dataset: Int[Tensor, " rows"]) -> None:
    """Add sum, sum of squares and number of the values that are there; in a group of each column, else of all components."""
    several = len(dataset) > 0 and bool((dataset != dataset[0]).any())
    for d in torch.unique(dataset).tolist():
        mine = value[dataset == d] if several else value
        if known.group:
            there = ~torch.isnan(mine) if mine.is_floating_point() else mine != -1
            mine = torch.where(there, mine, 0).double()
            total[d] += torch.stack([mine.sum(0), mine.square().sum(0), there.sum(0).double()])
        else:
            mine = mine[present_rows(mine)].double()
            total[d] += torch.stack([mine.sum(), mine.square().sum(), torch.tensor(float(mine.numel()), dtype=torch.float64)])


class References:
    """Energies of the elements by least squares over any number of structures, each weighted by 1/atoms.

    Beyond `MAX_ROWS` structures the equations are replaced by the triangle R of their QR decomposition, which has the same solution and the
    same residual (a QR decomposition in pieces, as of tall and skinny matrices: Demmel et al., SIAM J. Sci. Comput. 34, A206 (2012)).
    """

    def __init__(self) -> None:
        self.structures = 0
        self._counts: list[np.ndarray] = []
        self._energies: list[np.ndarray] = []
        self._held = 0
        self._triangle: np.ndarray | None = None

    def add(self, counts: Int[np.ndarray, "structures 119"], energies: Float[np.ndarray, " structures"]) -> None:
        """Add structures: their atoms of each element, and their energies in eV."""
        self._counts.append(counts.astype(np.int32))
        self._energies.append(energies)
        self.structures += len(counts)
        self._held += len(counts)
        if self._held > MAX_ROWS:
            self._fold()

    def _fold(self) -> None:
        counts, energies = np.concatenate(self._counts).astype(float), np.concatenate(self._energies)
        natoms = counts.sum(axis=1, keepdims=True)
        rows = np.column_stack([counts / natoms, energies[:, None] / natoms])
        stacked = rows if self._triangle is None else np.concatenate([self._triangle, rows])
        self._triangle = np.asarray(np.linalg.qr(stacked, mode="r"))
        self._counts, self._energies, self._held = [], [], 0

    def fit(self) -> tuple[np.ndarray, float]:
        """Energies (119,) as `fit_references` gives them, and the root mean square of what they leave over, eV/atom."""
        if self._triangle is None:
            fitted, residual = fit_references(np.concatenate(self._counts).astype(float), np.concatenate(self._energies))
            return fitted, float(np.sqrt(np.mean(residual**2)))
        if self._held:
            self._fold()
        matrix, right = self._triangle[:, :-1], self._triangle[:, -1]
        present = np.nonzero(matrix.any(axis=0))[0]
        fitted = np.zeros(matrix.shape[1])
        fitted[present], *_ = np.linalg.lstsq(matrix[:, present], right, rcond=None)
        return fitted, float(np.linalg.norm(matrix @ fitted - right) / np.sqrt(self.structures))


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
