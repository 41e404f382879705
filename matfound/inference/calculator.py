"""The ASE calculator of one model."""

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch
from ase.calculators.calculator import Calculator as ASECalculator
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from ase.outputs import Properties, all_outputs

from matfound.errors import InputError
from matfound.graphs.skin import SkinList
from matfound.inference.predict import clean, evaluate, has_lattice, model_input, nothing, ready, split
from matfound.inference.results import as_results
from matfound.models.base import Potential
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import AtomicData, collate

#: What a model takes from `atoms.info`.
INFO_INPUTS = ("charge", "spin", "head")


class ModelCalculator(ASECalculator):
    """What the calculators of one model and of several have in common: what counts as a change, and one calculation for everything."""

    #: Level of theory for every structure; None leaves it to the structure.
    head: str | None = None

    def __init__(self) -> None:
        super().__init__()
        # Neither is an input of a model: total charge and spin are, and they are in `info`.
        self.ignored_changes = {"initial_charges", "initial_magmoms"}

    def check_state(self, atoms: ase.Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; ASE itself does not look at `info` and tags."""
        changes: list[str] = super().check_state(atoms, tol=tol)
        if self.atoms is not None:
            read = [key for key in INFO_INPUTS if key != "head" or self.head is None]
            changes += [key for key in read if not _same(self.atoms.info.get(key), atoms.info.get(key))]
            if "numbers" not in changes and not np.array_equal(self.atoms.get_tags(), atoms.get_tags()):
                changes.append("tags")
        return changes

    def calculate(
        self,
        atoms: ase.Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Set `self.results`; everything that the model predicts comes at once."""
        self.results = {}
        super().calculate(atoms, properties, system_changes)
        if self.atoms is None:
            raise InputError("there are no atoms to calculate", remedy="set atoms.calc, or hand atoms over")
        for key in INFO_INPUTS:  # ASE's copy of the atoms shares its arrays with them
            if key in self.atoms.info:
                self.atoms.info[key] = copy.copy(self.atoms.info[key])
        sample = from_atoms(self.atoms, labels=False)
        if set(properties) & {"stress", "stress_variance"} and not has_lattice(sample):
            raise PropertyNotImplementedError("stress needs a lattice: this structure is not periodic, or its cell has no volume")
        self.results = self._predict(sample)

    def export_properties(self) -> Properties:
        """The results that ASE has a place for."""
        return Properties({name: value for name, value in self.results.items() if name in all_outputs})

    @abstractmethod
    def _predict(self, sample: AtomicData) -> dict[str, Any]:
        """The results for one structure, by ASE's names."""


class Calculator(ModelCalculator):
    """A trained potential as an ASE calculator.

    `implemented_properties` are the model's outputs: energy (eV; also `free_energy`, the same, and `energies`, of each atom),
    forces (eV/Å), stress (eV/Å³, positive in tension, Voigt order xx, yy, zz, yz, xz, xy; none without a lattice), dipole (e·Å),
    charges (e), magmoms (μB), and what else the model predicts under the name of its field (`gap`, `dipole_magnitude`, …).

    `atoms.info["charge"]`, `["spin"]` and `["head"]` (a level of theory in `model.datasets`) are read where the model uses them; a
    change of one of them, or of the tags, asks for a new calculation.

    Args:
        model: name or folder of a checkpoint, or a `Potential` (which is copied).
        device: "cpu", "cuda", "cuda:1", …
        dtype: "float32" or "float64"; None takes the type of the weights. For tight relaxations and vibrations: "float64".
        head: level of theory, a name in `model.datasets`; None takes `atoms.info["head"]`, else the model's default for the kind of
            structure.
        skin: Å; the neighbour search is repeated only when an atom has moved by more than half of it.
        compile: compile the model with forces and stress inside (`Potential.compile`). The second calculation then takes up to minutes
            longer, and later ones are faster: for long runs of small structures on a GPU.

    Raises:
        InputError: unknown model, device, dtype or head; on calculation: an element that the model has not seen, positions that
            are not finite, a lattice without volume, or an output that is not finite.
    """

    def __init__(
        self,
        model: str | Path | Potential,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        head: str | None = None,
        skin: float = 0.5,
        compile: bool = False,  # noqa: A002 - torch's word for it
    ) -> None:
        super().__init__()
        self.potential = ready(model, device, dtype)
        if compile:
            self.potential.compile()
        if head is not None:
            self.potential.dataset_index(head)
        self.head = head
        self.neighbors = SkinList(self.potential.graphs, skin=skin)
        self.implemented_properties = property_names(self.potential.outputs)

    def _predict(self, sample: AtomicData) -> dict[str, Any]:
        data = model_input(self.potential, sample, self.head)
        if not data.num_nodes:
            return as_results(nothing(self.potential, data))
        batch = collate([data]).to(next(self.potential.parameters()).device)
        self.neighbors.update(batch)
        return as_results(clean(split(evaluate(self.potential, batch), batch)[0], data))


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two values are equal: numbers, arrays, text or nothing at all, of numpy or not."""
    return bool(np.array_equal(mine, theirs))


def property_names(outputs: Iterable[str]) -> list[str]:
    """Names of the results of a model with these outputs: with an energy, there are `free_energy` and `energies` too."""
    names = list(outputs)
    return names + (["free_energy", "energies"] if "energy" in names else [])
