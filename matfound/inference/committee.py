"""The ASE calculator of several models of the same thing: their mean, and how far they disagree."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matfound.errors import InputError
from matfound.graphs.skin import SkinList
from matfound.inference.calculator import ModelCalculator, property_names
from matfound.inference.predict import clean, evaluate, model_input, nothing, ready, split
from matfound.inference.results import VARIANCE, as_results
from matfound.models.base import Potential
from matfound.structures.atomic_data import AtomicData, collate

#: Outputs whose variance is reported.
VARIED = ("energy", "forces", "stress")


@dataclass
class _Member:
    """A model, what to call it, and the neighbour list that it shares with the members that have the same graphs."""

    name: str
    potential: Potential
    neighbors: SkinList


class Committee(ModelCalculator):
    """Several trained potentials as one ASE calculator: the mean of their predictions, and the variance as a measure of doubt.

    Results are those of `matfound.Calculator`, for every output that all members have, averaged over the members; and

    - `energy_variance`: eV², of the total energy;
    - `forces_variance (atoms, 3)`: (eV/Å)², of each component;
    - `stress_variance (6,)`: (eV/Å³)², of each component in Voigt order, where there is a stress.

    The variance is that of the population: the mean squared deviation from the mean, divided by the number of members as `numpy.var`
    does. With two members it is a quarter of their squared difference. Its size in terms of real errors has to be calibrated on data.

    The mean of conservative members is conservative. Members with equal graphs share one neighbour list.

    Args:
        models: at least two: names or folders of checkpoints, or `Potential` objects (which are copied).
        device: see `Calculator`.
        dtype: see `Calculator`; None takes the type of each member's weights.
        head: level of theory, which every member must have; None takes `atoms.info["head"]`, else each member's default.
        skin: Å, see `Calculator`.

    Raises:
        InputError: fewer than two members, a member without energies, or what `Calculator` refuses, naming the member.
    """

    def __init__(
        self,
        models: Sequence[str | Path | Potential],
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        head: str | None = None,
        skin: float = 0.5,
    ) -> None:
        super().__init__()
        if isinstance(models, (str, Path)) or len(models) < 2:
            given = f"'{models}'" if isinstance(models, (str, Path)) else len(models)
            raise InputError(f"a committee is a list of at least 2 models, received {given}", remedy="for one: matfound.Calculator")
        self.head = head
        self.members: list[_Member] = []
        for number, model in enumerate(models):
            name = f"member {number}" + ("" if isinstance(model, Potential) else f" ({model})")
            potential = ready(model, device, dtype)
            if "energy" not in potential.outputs:
                raise InputError(f"{name} of the committee predicts no energy but {', '.join(potential.outputs)}", remedy="leave it out")
            if head is not None:
                try:
                    potential.dataset_index(head)
                except InputError as error:
                    raise _by(name, error) from None
            known = (member.neighbors for member in self.members if member.neighbors.graphs == potential.graphs)
            self.members.append(_Member(name, potential, next(known, None) or SkinList(potential.graphs, skin=skin)))
        first, *others = [member.potential.outputs for member in self.members]
        names = property_names(name for name in first if all(name in outputs for outputs in others))
        self.implemented_properties = names + [name + VARIANCE for name in VARIED if name in names]

    def _predict(self, sample: AtomicData) -> dict[str, Any]:
        found = self._all(sample)
        results: dict[str, Any] = {}
        for name in self.implemented_properties:
            if any(name not in one for one in found):
                continue
            values = np.stack([np.asarray(one[name], dtype=np.float64) for one in found])
            results[name] = _plain(values.mean(0))
            if name in VARIED:
                results[name + VARIANCE] = _plain(values.var(0))
        return results

    def _all(self, sample: AtomicData) -> list[dict[str, Any]]:
        """The results of every member."""
        built: dict[int, AtomicData] = {}
        found = []
        for member in self.members:
            try:
                data = model_input(member.potential, sample, self.head)
                if not data.num_nodes:
                    found.append(as_results(nothing(member.potential, data)))
                    continue
                shared = built.get(id(member.neighbors))
                if shared is None:
                    device = next(member.potential.parameters()).device
                    shared = built[id(member.neighbors)] = member.neighbors.update(collate([data]).to(device))
                batch = copy.copy(shared)
                batch.dataset = data.dataset.to(shared.numbers.device)
                found.append(as_results(clean(split(evaluate(member.potential, batch), batch)[0], data)))
            except InputError as error:
                raise _by(member.name, error) from None
        return found


def _plain(value: Any) -> Any:
    """A number of Python for a number of numpy."""
    return value if np.ndim(value) else float(value)


def _by(name: str, error: InputError) -> InputError:
    """The error of a member."""
    return InputError(f"{name} of the committee: {error.problem}", remedy=error.remedy, file=error.file, frame=error.frame)
