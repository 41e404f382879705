"""The ASE calculator of one model."""

import copy
import sys
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
from torch import Tensor

from matfound.errors import InputError
from matfound.graphs.skin import SkinList
from matfound.inference.predict import clean, evaluate, has_lattice, model_input, nothing, ready, split
from matfound.inference.replay import Replay, is_possible
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
        """What changed since the last calculation; ASE itself does not look at `info` and tags, and takes ten times as long."""
        if self.atoms is None:
            return list(super().check_state(atoms, tol=tol))
        before, now = self.atoms, atoms
        pairs = {
            "positions": (before.positions, now.positions), "numbers": (before.numbers, now.numbers),
            "cell": (before.cell.array, now.cell.array), "pbc": (before.pbc, now.pbc),
        }  # fmt: skip
        changes = [name for name, (a, b) in pairs.items() if a.tobytes() != b.tobytes() and not _is_close(a, b, tol)]
        read = [key for key in INFO_INPUTS if key != "head" or self.head is None]
        changes += [key for key in read if not _same(before.info.get(key), now.info.get(key))]
        if "numbers" not in changes and ("tags" in before.arrays or "tags" in now.arrays):
            changes += [] if np.array_equal(before.get_tags(), now.get_tags()) else ["tags"]
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
        if list(system_changes) == ["positions"] and (moved := self._moved(properties)) is not None:
            self.results = moved
            return
        sample = from_atoms(self.atoms, labels=False)
        _require_lattice(properties, sample)
        self.results = self._predict(sample)

    def _moved(self, properties: Sequence[str]) -> dict[str, Any] | None:
        """The results where only the positions have changed since the last calculation, if there is a shorter way to them."""
        return None

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
            longer, and later ones are faster: for long runs on a GPU.
        replay: record the third calculation of the same atoms on a GPU as a CUDA graph and replay it from then on
            (`matfound.inference.replay`), which is several times faster for small structures; with `compile`, what is recorded is
            compiled. None: where the model allows it and the structure is small. True: at once, and for structures of all sizes (on a
            CPU the same is computed without a graph, for tests). False: never.

    Raises:
        InputError: unknown model, device, dtype or head, or `replay=True` for a model that cannot; on calculation: an element that the
            model has not seen, positions that are not finite, a lattice without volume, or an output that is not finite.
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
        replay: bool | None = None,
    ) -> None:
        super().__init__()
        self.potential = ready(model, device, dtype)
        if compile:
            self.potential.compile()
        if head is not None:
            self.potential.dataset_index(head)
        self.head = head
        self.neighbors = SkinList(self.potential.graphs, skin=skin)
        self.replay = _replay(self.potential, skin, replay)
        # The structure of the last calculation, where that was replayed, and whether it has a lattice.
        self._known: tuple[AtomicData, bool] | None = None
        self.implemented_properties = property_names(self.potential.outputs)

    def take(self, atoms: ase.Atoms) -> bool:
        """Put atoms into `replay`, at once, where they can be replayed."""
        self._known = None
        return self.replay is not None and self.replay.prepare(self._input(from_atoms(atoms, labels=False)), at_once=True)

    def adopt(self, atoms: ase.Atoms, predictions: dict[str, Tensor]) -> None:
        """Make predictions that `replay` made the results for atoms where they are now."""
        data = self._input(from_atoms(atoms, labels=False))
        self.results, self.atoms, self._known = as_results(clean(predictions, data)), atoms.copy(), None

    def _input(self, sample: AtomicData) -> AtomicData:
        return model_input(self.potential, sample, self.head)

    def _moved(self, properties: Sequence[str]) -> dict[str, Any] | None:
        if self.replay is None or self._known is None or self.atoms is None:
            return None
        data, lattice = self._known
        if not lattice:
            _require_lattice(properties, data)
        predictions = self.replay.move(torch.from_numpy(self.atoms.positions), data.cell)
        return None if predictions is None else as_results(clean(predictions, data, lattice))

    def _predict(self, sample: AtomicData) -> dict[str, Any]:
        self._known = None  # should this fail
        data = self._input(sample)
        if not data.num_nodes:
            return as_results(nothing(self.potential, data))
        if self.replay is not None and (predictions := self.replay(data)) is not None:
            self._known = data, has_lattice(data)
            return as_results(clean(predictions, *self._known))
        batch = collate([data]).to(next(self.potential.parameters()).device)
        self.neighbors.update(batch)
        return as_results(clean(split(evaluate(self.potential, batch), batch)[0], data))


def _replay(potential: Potential, skin: float, wanted: bool | None) -> Replay | None:
    """Whether and how calculations are replayed.

    Raises:
        InputError: they are to be, and cannot.
    """
    if wanted and not is_possible(potential):
        raise InputError("this model cannot be replayed: its edges end otherwise than smoothly at a cutoff", remedy="leave replay out")
    if wanted:
        return Replay(potential, skin, patience=0, max_edges=sys.maxsize)
    by_itself = wanted is None and is_possible(potential) and next(potential.parameters()).device.type == "cuda"
    return Replay(potential, skin) if by_itself else None


def _require_lattice(properties: Sequence[str], data: AtomicData) -> None:
    """Refuse to give the stress of a structure that has none."""
    if ("stress" in properties or "stress_variance" in properties) and not has_lattice(data):
        raise PropertyNotImplementedError("stress needs a lattice: this structure is not periodic, or its cell has no volume")


def _is_close(mine: np.ndarray, theirs: np.ndarray, tol: float) -> bool:
    """Whether two arrays of numbers are the same but for `tol`."""
    return mine.shape == theirs.shape and mine.dtype == theirs.dtype == float and bool(np.abs(mine - theirs).max(initial=0.0) <= tol)


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two values are equal: numbers, arrays, text or nothing at all, of numpy or not."""
    return mine is theirs or bool(np.array_equal(mine, theirs))


def property_names(outputs: Iterable[str]) -> list[str]:
    """Names of the results of a model with these outputs: with an energy, there are `free_energy` and `energies` too."""
    names = list(outputs)
    return names + (["free_energy", "energies"] if "energy" in names else [])
