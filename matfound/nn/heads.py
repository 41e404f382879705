"""Heads: invariant features to physical quantities. They own scale, shift and references, per dataset, in float64."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound import fields
from matfound.errors import InputError
from matfound.nn.base import Head, NodeFeatures, Statistics
from matfound.nn.gradients import forces_and_stress, sum_over
from matfound.nn.radial import SILU_FACTOR
from matfound.structures.atomic_data import AtomicData


class Float64Buffers(nn.Module):
    """Named buffers that stay float64 when the model is cast: references are large numbers with small differences."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...

    def __init__(self, **values: Float[Tensor, "..."]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, value.double())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float64Buffers":
        for name, value in self._buffers.items():
            if value is not None:
                moved = fn(value)
                self._buffers[name] = moved if moved.dtype == torch.float64 else value.to(moved.device)
        return self


class Readout(nn.Module):
    """A bias-free multilayer perceptron on invariant features whose last layer exists once for each dataset.

    Args:
        channels: input width.
        hidden: widths of the hidden layers.
        outputs: numbers per atom.
        datasets: size of the vocabulary.
        activation: of the hidden layers; "none" makes the whole map linear.
    """

    def __init__(
        self, channels: int, hidden: Sequence[int], outputs: int, datasets: int, activation: Literal["silu", "none"] = "silu"
    ) -> None:
        super().__init__()
        sizes = [channels, *hidden]
        self.activation = activation
        self.hidden = nn.ParameterList([torch.randn(a, b) for a, b in pairwise(sizes)])
        self.last = nn.Parameter(torch.randn(datasets, sizes[-1], outputs))

    def forward(self, x: Float[Tensor, "atoms channels"], dataset: Int[Tensor, " atoms"]) -> Float[Tensor, "atoms outputs"]:
        """Each atom's outputs by the last layer of its dataset."""
        for weight in self.hidden:
            x = x @ (weight / weight.shape[0] ** 0.5)
            if self.activation == "silu":
                x = SILU_FACTOR * nn.functional.silu(x)
        last = self.last / self.last.shape[1] ** 0.5
        if last.shape[0] == 1:
            return x @ last[0]
        # One product for each dataset and a choice: exact, and cheaper than gathering a matrix for every atom.
        return torch.einsum("nc,dco->ndo", x, last)[torch.arange(len(x), device=x.device), dataset]


def system_dataset(batch: AtomicData) -> Int[Tensor, " systems"]:
    """Dataset index of each structure; 0 where the batch does not say."""
    return batch.dataset.clamp(min=0) if "dataset" in batch else torch.zeros_like(batch.natoms)


def atom_dataset(batch: AtomicData) -> Int[Tensor, " atoms"]:
    """Dataset index of each atom; 0 where the batch does not say."""
    return system_dataset(batch)[batch.batch]


class _LabelHead(Head):
    """Shared by the heads below: one field, a readout, and mean and spread of the label."""

    def __init__(self, field: str, hidden: Sequence[int] = (32,), level: fields.Level = "system", width: int = 1) -> None:
        super().__init__()
        known = fields.find(field)
        if known.level != level or known.shape:
            raise InputError(f"{type(self).__name__} predicts a scalar for each {level}; '{field}' is {known.shape} for each {known.level}")
        self.field, self.hidden, self.width = field, tuple(hidden), width
        self.outputs = (field,)

    def bind(self, channels: int, datasets: int) -> None:
        self.readout = Readout(channels, self.hidden, self.width, datasets)
        self.scale = Float64Buffers(mean=torch.zeros(datasets), spread=torch.ones(datasets))

    def fit_scales(self, statistics: Statistics) -> None:
        if self.width == 1 and self.field in statistics.mean:
            mean, rms = statistics.mean[self.field], statistics.rms[self.field]
            # The spread is the standard deviation; a constant label keeps 1.
            spread = torch.sqrt((rms**2 - mean**2).clamp(min=0))
            self.scale.mean.copy_(torch.nan_to_num(mean))
            self.scale.spread.copy_(torch.where(spread > 1e-6 * rms, spread, torch.ones_like(spread)))

    def _rescale(self, values: Float[Tensor, " rows"], dataset: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        return self.scale.mean[dataset] + self.scale.spread[dataset] * values


class GraphHead(_LabelHead):
    """A scalar for each structure: mean + spread · pooled readout.

    Args:
        field: the system-level scalar to predict.
        hidden: widths of the readout's hidden layers.
        pool: "mean" for intensive quantities (gaps), "sum" for extensive ones.
    """

    def __init__(self, field: str, hidden: Sequence[int] = (32,), pool: Literal["mean", "sum"] = "mean") -> None:
        super().__init__(field, hidden, "system")
        self.pool = pool

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`field` (systems,), float64."""
        pooled = pool(self.readout(features.scalars, atom_dataset(batch)).double(), batch, self.pool)
        return {self.field: self._rescale(pooled[:, 0], system_dataset(batch))}


class NodeHead(_LabelHead):
    """A scalar for each atom: mean + spread · readout.

    Args:
        field: the atom-level scalar to predict.
        hidden: widths of the readout's hidden layers.
    """

    def __init__(self, field: str, hidden: Sequence[int] = (32,)) -> None:
        super().__init__(field, hidden, "atom")

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`field` (atoms,), float64."""
        dataset = atom_dataset(batch)
        out = self.readout(features.scalars, dataset).double()
        return {self.field: self._rescale(out[:, 0], dataset)}


class ClassHead(_LabelHead):
    """Logits of a class label for each structure or atom.

    Args:
        field: an int64 label.
        classes: number of classes, at least 2.
        hidden: widths of the readout's hidden layers.
        pool: for structures, how atoms are joined.
    """

    def __init__(self, field: str, classes: int, hidden: Sequence[int] = (32,), pool: Literal["mean", "sum"] = "mean") -> None:
        if classes < 2:
            raise InputError(f"a class head needs at least 2 classes, received {classes}", remedy="use GraphHead or NodeHead for numbers")
        super().__init__(field, hidden, fields.find(field).level, classes)
        if fields.find(field).dtype != "int64":
            raise InputError(f"ClassHead predicts integer labels; '{field}' is {fields.find(field).dtype}")
        self.pool = pool

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`field` (systems or atoms, classes): logits."""
        logits = self.readout(features.scalars, atom_dataset(batch))
        return {self.field: pool(logits, batch, self.pool) if fields.find(self.field).level == "system" else logits}


def pool(values: Float[Tensor, "atoms d"], batch: AtomicData, how: Literal["mean", "sum"]) -> Float[Tensor, "systems d"]:
    """Sum or mean over the atoms of each structure (0 for one without atoms)."""
    total = sum_over(values, batch.batch, batch.num_systems)
    return total if how == "sum" else total / batch.natoms.clamp(min=1).to(total.dtype).unsqueeze(1)


class EnergyHead(Head):
    """E = Σ_i (scale[d, z_i] · readout_i + reference[d, z_i]), with forces and stress as its gradients.

    d is the level of theory (`batch.dataset`), z the element. References come from least squares over the training data and are NaN for
    elements that a dataset does not have. The sum and both tables are float64.

    Args:
        hidden: widths of the readout's hidden layers.
        activation: of the hidden layers; "none" for SevenNet's linear readout.
        forces: predict forces, -dE/dpos.
        stress: predict stress, (1/V) dE/dstrain.
        shared: one last layer for all datasets; scale and reference are theirs all the same.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (32,),
        activation: Literal["silu", "none"] = "silu",
        forces: bool = True,
        stress: bool = True,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.hidden, self.activation, self.shared = tuple(hidden), activation, shared
        self.forces, self.stress = forces, stress
        self.conservative = forces or stress
        self.outputs = ("energy", *(["forces"] if forces else []), *(["stress"] if stress else []))

    def bind(self, channels: int, datasets: int) -> None:
        self.readout = Readout(channels, self.hidden, 1, 1 if self.shared else datasets, self.activation)
        self.table = Float64Buffers(scale=torch.ones(datasets, 119), reference=torch.full((datasets, 119), torch.nan))

    def grown(self, parent: int) -> dict[str, Any]:
        """A new dataset gets a last layer of its own, and so do those that shared one."""
        return {"shared": False} if self.shared else {}

    def elements(self, dataset: int) -> set[int]:
        """Elements with a reference energy in the dataset."""
        return set(torch.nonzero(~torch.isnan(self.table.reference[dataset])).flatten().tolist())

    def fit_scales(self, statistics: Statistics) -> None:
        self.table.reference.copy_(statistics.references)
        rms = statistics.rms.get("forces", torch.full((len(statistics.datasets),), torch.nan))
        rms = torch.where(torch.isnan(rms), statistics.rms["energy"], rms)
        self.table.scale.copy_(torch.where(rms > 0, rms, torch.ones_like(rms)).unsqueeze(1).expand(-1, 119))

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`energy` (systems,), `energies` (atoms,), `forces` (atoms, 3), `stress` (systems, 3, 3); all float64."""
        dataset = atom_dataset(batch)
        out = self.readout(features.scalars, dataset)[:, 0].double()
        energies = self.table.scale[dataset, batch.numbers] * out + self.table.reference[dataset, batch.numbers]
        energy = sum_over(energies, batch.batch, batch.num_systems)
        predictions = {"energy": energy, "energies": energies}
        if self.conservative:
            forces, stress = forces_and_stress(energy, features.vectors, batch, create_graph=self.training)
            predictions |= {"forces": forces} if self.forces else {}
            predictions |= {"stress": stress} if self.stress else {}
        return predictions
