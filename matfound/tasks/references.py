"""Element references of a finished model, moved to the level of theory of new data."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from matfound.errors import InputError, nearest
from matfound.graphs.neighbors import add_graphs
from matfound.models.base import Potential
from matfound.structures.atomic_data import AtomicData, collate
from matfound.tasks.statistics import fit_references

log = logging.getLogger(__name__)

#: Atoms in a batch of predictions.
MAX_ATOMS = 256
#: With references fitted, energies that are further off than this (eV/atom, root mean square) are hardly those of a better level of theory.
SUSPICIOUS = 0.5
#: Singular values below this fraction of the largest are directions that the compositions do not determine.
RANK = 1e-6


@dataclass
class Refit:
    """What was done to the references of one dataset.

    Args:
        dataset: its name.
        shifts: by element, eV: new reference minus the old one.
        frames: how many had an energy.
        residual: root mean square of label - prediction after the shift, eV/atom; NaN without energies.
        spread: the same with what the fit has used up counted in, for the scale of losses: divided by frames - fitted parameters.
        free: combinations of the elements that the compositions leave open; they follow the isolated atoms, else they are as small as
            possible.
        isolated: elements whose isolated atoms were given.
        isolated_error: mean of label - prediction if isolated atoms alone fixed the shifts, eV/atom; NaN unless all elements have one.
    """

    dataset: str
    shifts: dict[str, float] = field(default_factory=dict)
    frames: int = 0
    residual: float = float("nan")
    spread: float = float("nan")
    free: int = 0
    isolated: list[str] = field(default_factory=list)
    isolated_error: float = float("nan")


def refit(
    potential: Potential,
    samples: Iterable[AtomicData],
    datasets: Sequence[str] | None = None,
    isolated_atoms: Mapping[str, float] | None = None,
) -> list[Refit]:
    """Shift the references of the energy head, in place, to the level of theory of labelled structures.

    For each dataset and element z of the structures: reference[z] += δ[z], with Σ_z n_z δ_z ≈ label - prediction by least squares over
    the energies per atom. Where the compositions do not determine δ (one compound, say), it is as close as possible to
    E(isolated atom) - prediction for it, of the elements that are in `isolated_atoms`, and else to 0. Labels always come first: the
    prediction for an isolated atom is far from the training data of most models, and its error must not become an error of every atom.
    Without energies, isolated atoms alone shift the references.

    Elements that the structures do not have are forgotten (NaN, so that the model refuses them): their references would belong to
    another level of theory. Elements that the head did not know, and the backbone does, start from 0.

    Args:
        potential: with an energy head that has `table.reference`; is where it computes.
        samples: structures or batches that carry `dataset` and graphs.
        datasets: names of those to refit; None: all that the samples have.
        isolated_atoms: symbol to energy, eV, at the level of theory of the labels.

    Returns:
        What was done, one entry a dataset, in the order of the vocabulary.

    Raises:
        InputError: no such head, dataset or element; an element that the backbone does not know; isolated atoms for several datasets; or
            a prediction that is not finite.
    """
    reference = references(potential)
    isolated = _numbers(isolated_atoms or {})
    wanted = None if datasets is None else {potential.dataset_index(name) for name in datasets}
    by_dataset: dict[int, list[AtomicData]] = {}
    for sample in (one for part in samples for one in part.to_list()):
        if (wanted is None or int(sample.dataset) in wanted) and sample.num_nodes:
            by_dataset.setdefault(int(sample.dataset), []).append(sample)
    if isolated and len(by_dataset) > 1:
        names = ", ".join(potential.datasets[d] for d in sorted(by_dataset))
        raise InputError(
            f"isolated_atoms belong to one level of theory, the training data have {names}", remedy="name it: model.refit: [NAME]"
        )
    found = []
    for d, mine in sorted(by_dataset.items()):
        elements = sorted({z for sample in mine for z in sample.numbers.tolist()})
        _start(potential, reference[d], elements, d)
        result = _refit_one(potential, reference[d], d, mine, elements, isolated)
        _complain(result, len(elements))
        found.append(result)
    return found


def references(potential: Potential) -> Float[Tensor, "datasets 119"]:
    """The references of the energy head, to be changed in place.

    Raises:
        InputError: there are none.
    """
    for head in potential.heads.values():
        found = getattr(getattr(head, "table", None), "reference", None)
        if "energy" in head.outputs and found is not None:  # type: ignore[operator]
            return found
    raise InputError("no head of the model has element references", remedy="set model.fit_scales to false")


def _numbers(energies: Mapping[str, float]) -> dict[int, float]:
    """Atomic numbers for symbols."""
    from ase.data import atomic_numbers

    for symbol, energy in energies.items():
        if symbol not in atomic_numbers or symbol == "X":
            raise InputError(f"isolated_atoms: there is no element '{symbol}'", remedy=nearest(symbol, atomic_numbers))
        if not np.isfinite(energy):
            raise InputError(f"isolated_atoms: the energy of {symbol} is {energy}", remedy="give a number, in eV")
    return {atomic_numbers[symbol]: float(energy) for symbol, energy in energies.items()}


def _start(potential: Potential, row: Float[Tensor, "119"], elements: list[int], dataset: int) -> None:
    """Forget the elements that are not there, and begin with those that were not known."""
    from ase.data import chemical_symbols

    if lacking := sorted(set(elements) - set(potential.backbone.elements)):
        what = ", ".join(chemical_symbols[z] for z in lacking)
        raise InputError(f"the model has no place for {what}", remedy="leave such structures out, or use another model")
    if new := [z for z in elements if torch.isnan(row[z])]:
        what = ", ".join(chemical_symbols[z] for z in new)
        log.warning(
            "matfound: the model has not seen %s; '%s' learns it from these data alone, which takes many structures",
            what, potential.datasets[dataset],
        )  # fmt: skip
    kept = torch.full_like(row, torch.nan)
    kept[elements] = torch.nan_to_num(row[elements], nan=0.0)
    row.copy_(kept)


def _refit_one(
    potential: Potential,
    row: Float[Tensor, "119"],
    dataset: int,
    samples: list[AtomicData],
    elements: list[int],
    isolated: dict[int, float],
) -> Refit:
    from ase.data import chemical_symbols

    result = Refit(potential.datasets[dataset], isolated=[chemical_symbols[z] for z in elements if z in isolated])
    prior = np.zeros(119)
    alone = [z for z in elements if z in isolated]
    if alone:
        predicted = energies(potential, [_atom(potential, z, dataset) for z in alone])
        prior[alone] = np.array([isolated[z] for z in alone]) - predicted
    labelled = [sample for sample in samples if "energy" in sample and not torch.isnan(sample.energy).any()]
    shift = prior
    if labelled:
        labels = np.array([float(sample.energy) for sample in labelled])
        counts = np.array([np.bincount(sample.numbers.numpy(), minlength=119) for sample in labelled], dtype=float)
        rest = labels - energies(potential, labelled) - counts @ prior
        fitted, residual = fit_references(counts, rest)
        shift = prior + fitted
        rank = int(np.linalg.matrix_rank(counts[:, elements] / counts.sum(1, keepdims=True), tol=RANK * len(labelled) ** 0.5))
        result.free, result.frames = len(elements) - rank, len(labelled)
        if alone == elements:
            result.isolated_error = float(np.mean(rest / counts.sum(1)))
        result.residual = float(np.sqrt(np.mean(residual**2)))
        result.spread = float(np.sqrt(np.sum(residual**2) / max(len(labelled) - rank, 1)))
    else:
        result.free = len(elements) - len(alone)
    row[elements] += torch.tensor(shift[elements], dtype=row.dtype, device=row.device)
    result.shifts = {chemical_symbols[z]: float(shift[z]) for z in elements}
    return result


def _atom(potential: Potential, number: int, dataset: int) -> AtomicData:
    """An atom by itself."""
    import ase

    data = AtomicData.from_atoms(ase.Atoms(numbers=[number], positions=[[0.0, 0.0, 0.0]]))
    data.dataset = torch.tensor([dataset])
    return add_graphs(data, potential.graphs)


def energies(potential: Potential, samples: Sequence[AtomicData]) -> np.ndarray:
    """Predicted energies (samples,), eV, of structures with graphs, in eval mode and batches.

    Raises:
        InputError: one is not finite; names the structure.
    """
    device, training = next(potential.parameters()).device, potential.training
    potential.eval()
    found: list[float] = []
    try:
        for group in _groups(samples):
            with torch.no_grad():
                found += potential(collate(group).to(device))["energy"].cpu().tolist()
    finally:
        potential.train(training)
    for sample, energy in zip(samples, found, strict=True):
        if not np.isfinite(energy):
            name = sample.id if "id" in sample else f"of {sample.num_nodes} atoms"
            raise InputError(f"structure '{name}': the model's energy is not finite", remedy="look for overlapping atoms")
    return np.array(found)


def _groups(samples: Sequence[AtomicData]) -> Iterator[list[AtomicData]]:
    """Neighbouring samples, at most MAX_ATOMS atoms together."""
    group: list[AtomicData] = []
    size = 0
    for sample in samples:
        if group and size + sample.num_nodes > MAX_ATOMS:
            yield group
            group, size = [], 0
        group.append(sample)
        size += sample.num_nodes
    if group:
        yield group


def _complain(result: Refit, elements: int) -> None:
    """Say what a user should know before training."""
    if not result.frames and not result.isolated:
        log.warning("matfound: no structure of '%s' has an energy; its energies keep the zero of the model", result.dataset)
    if result.residual > SUSPICIOUS:
        log.warning(
            "matfound: with element references fitted, energies of '%s' are still %.2f eV/atom away from the model's "
            "(are they total energies in eV, all at one level of theory?)", result.dataset, result.residual,
        )  # fmt: skip
    if result.free and result.frames and len(result.isolated) < elements:
        log.warning(
            "matfound: the compositions of '%s' do not tell the energies of its elements (%s) apart; energies of other compositions mean "
            "nothing unless isolated-atom energies are given", result.dataset, ", ".join(result.shifts),
        )  # fmt: skip
