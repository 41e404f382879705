"""Heads: invariant features to physical quantities. They own scale, shift and references, per dataset, in float64."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from matfound import fields
from matfound.errors import InputError
from matfound.nn.activations import SILU_FACTOR, SiLU
from matfound.nn.base import Head, NodeFeatures, Statistics
from matfound.nn.gradients import forces_and_stress, sum_over
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


class EnergyTable(Float64Buffers):
    """Scale, shift and references of energies that were trained as a sum over atoms divided by a constant (fairchem's convention):

        E = scale[d] · Σ_i out_i / avg_atoms + shift[d] + Σ_i reference[d, z_i]

    Args:
        datasets: size of the vocabulary.
        avg_atoms: mean number of atoms of the structures that it was trained on.
    """

    def __init__(self, datasets: int, avg_atoms: float = 1.0) -> None:
        super().__init__(scale=torch.ones(datasets), shift=torch.zeros(datasets), reference=torch.full((datasets, 119), torch.nan))
        self.avg_atoms = avg_atoms

    def energies(self, out: Float[Tensor, " atoms"], batch: AtomicData) -> Float[Tensor, " atoms"]:
        """The part of each atom in eV, float64; of the shift each atom of a structure has the same part."""
        dataset = atom_dataset(batch)
        share = self.shift[dataset] / batch.natoms[batch.batch]
        return self.scale[dataset] / self.avg_atoms * out.double() + share + self.reference[dataset, batch.numbers]

    def elements(self, dataset: int) -> set[int]:
        """Elements with a reference energy in the dataset."""
        return set(torch.nonzero(~torch.isnan(self.reference[dataset])).flatten().tolist())

    def fit(self, statistics: Statistics) -> None:
        """References from the statistics; the scale is such that an output of 1 of an atom is the data's force, or energy per atom."""
        self.reference.copy_(statistics.references)
        self.shift.zero_()
        self.scale.copy_(self.avg_atoms * force_scale(statistics))


def force_scale(statistics: Statistics) -> Float[Tensor, " datasets"]:
    """Root mean square of the forces of each dataset, or else of its energies per atom; 1 where that is 0 or absent."""
    rms = statistics.rms.get("forces", torch.full((len(statistics.datasets),), torch.nan))
    rms = torch.where(torch.isnan(rms), statistics.rms.get("energy", torch.ones_like(rms)), rms)
    return torch.where(rms > 0, rms, torch.ones_like(rms))


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
        self.activation, self.silu = activation, SiLU()
        self.hidden = nn.ParameterList([torch.randn(a, b) for a, b in pairwise(sizes)])
        self.last = nn.Parameter(torch.randn(datasets, sizes[-1], outputs))

    def forward(self, x: Float[Tensor, "atoms channels"], dataset: Int[Tensor, " atoms"]) -> Float[Tensor, "atoms outputs"]:
        """Each atom's outputs by the last layer of its dataset."""
        return self.project(self.hide(x), dataset)

    def hide(self, x: Float[Tensor, "atoms channels"]) -> Float[Tensor, "atoms hidden"]:
        """The last hidden layer."""
        for weight in self.hidden:
            x = x @ (weight / weight.shape[0] ** 0.5)
            if self.activation == "silu":
                x = SILU_FACTOR * self.silu(x)
        return x

    def project(self, x: Float[Tensor, "rows hidden"], dataset: Int[Tensor, " rows"]) -> Float[Tensor, "rows outputs"]:
        """The last layer, which is linear: it may as well follow a pooling of its input."""
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
    """Shared by the heads below: one field, a readout, and mean and spread of the label.

    Args:
        field: what is predicted.
        hidden: widths of the readout's hidden layers.
        level: what a row of the field must belong to; None for any.
        width: numbers that the readout makes for each label.
        columns: of a group: how many labels it has. The group is declared if it is not known yet, so that a model can be loaded without the
            data; a data set that knows the names of the columns adds them.
        dtype: of the field.
    """

    def __init__(
        self,
        field: str,
        hidden: Sequence[int] = (32,),
        level: fields.Level | None = "system",
        width: int = 1,
        columns: int | None = None,
        dtype: fields.DType | None = None,
    ) -> None:
        super().__init__()
        if columns is not None:
            _declare(field, columns, level, dtype or "float64")
        known = fields.find(field)
        level = level or known.level
        if known.level != level or known.shape != (() if columns is None else (columns,)):
            raise _unfit(self, known, level, columns)
        if known.dtype != (dtype or ("float64" if columns else known.dtype)):
            raise InputError(
                f"{type(self).__name__} predicts {'integer labels' if dtype == 'int64' else 'numbers'}; '{field}' is {known.dtype}"
            )
        self.field, self.hidden, self.columns, self.level, self.width = field, tuple(hidden), columns, level, width
        self.outputs = (field,)

    @property
    def _shape(self) -> tuple[int, ...]:
        return () if self.columns is None else (self.columns,)

    def bind(self, channels: int, datasets: int) -> None:
        self.readout = Readout(channels, self.hidden, self.width * (self.columns or 1), datasets)
        self.scale = Float64Buffers(mean=torch.zeros(datasets, *self._shape), spread=torch.ones(datasets, *self._shape))

    def fit_scales(self, statistics: Statistics) -> None:
        if self.field in statistics.mean and self.field in statistics.rms:
            self.scale.mean.copy_(torch.nan_to_num(statistics.mean[self.field]))
            self.scale.spread.copy_(statistics.spread(self.field))

    def _rescale(self, values: Float[Tensor, "rows *columns"], dataset: Int[Tensor, " rows"]) -> Float[Tensor, "rows *columns"]:
        return self.scale.mean[dataset] + self.scale.spread[dataset] * values

    def _pooled(self, features: NodeFeatures, batch: AtomicData, how: Literal["mean", "sum"]) -> Float[Tensor, "systems d"]:
        """The readout of each structure; of a single label float64."""
        if self.columns is None:
            return pool(self.readout(features.scalars, atom_dataset(batch)).double(), batch, how)
        # A group may have a thousand columns: the last layer, which is linear, is applied to structures in place of atoms.
        return self.readout.project(pool(self.readout.hide(features.scalars), batch, how), system_dataset(batch))


def _declare(field: str, columns: int, level: fields.Level | None, dtype: fields.DType) -> None:
    if columns < 1:
        raise InputError(f"a group of labels has at least 1 column, received {columns}", remedy="leave columns out for a single label")
    if field not in fields.FIELDS or (fields.is_from_data(field) and fields.FIELDS[field].dtype == dtype):
        fields.group(field, columns, level=level or "system", dtype=dtype)


def _unfit(head: Head, known: fields.Field, level: str, columns: int | None) -> InputError:
    """A head whose field has another shape, or belongs to something else."""
    what = "a scalar" if columns is None else f"{columns} labels"
    remedy = f"set columns: {known.shape[0]}" if known.group and known.level == level else ""
    return InputError(
        f"{type(head).__name__} predicts {what} for each {level}; '{known.name}' is {known.shape} for each {known.level}", remedy=remedy
    )


class GraphHead(_LabelHead):
    """A number for each structure, or a group of them: mean + spread · pooled readout.

    Args:
        field: the system-level scalar or group to predict.
        hidden: widths of the readout's hidden layers.
        pool: "mean" for intensive quantities (gaps), "sum" for extensive ones.
        columns: of a group: how many numbers it has. Each has its own mean and spread in each dataset.
    """

    def __init__(
        self, field: str, hidden: Sequence[int] = (32,), pool: Literal["mean", "sum"] = "mean", columns: int | None = None
    ) -> None:
        super().__init__(field, hidden, "system", columns=columns)
        self.pool = pool

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`field` (systems,), or (systems, columns), float64."""
        values = self._pooled(features, batch, self.pool)
        return {self.field: self._rescale(values[:, 0] if self.columns is None else values, system_dataset(batch))}


class NodeHead(_LabelHead):
    """A number for each atom, or a group of them: mean + spread · readout.

    Args:
        field: the atom-level scalar or group to predict.
        hidden: widths of the readout's hidden layers.
        columns: of a group: how many numbers it has. Each has its own mean and spread in each dataset.
    """

    def __init__(self, field: str, hidden: Sequence[int] = (32,), columns: int | None = None) -> None:
        super().__init__(field, hidden, "atom", columns=columns)

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`field` (atoms,), or (atoms, columns), float64."""
        dataset = atom_dataset(batch)
        out = self.readout(features.scalars, dataset).double()
        return {self.field: self._rescale(out[:, 0] if self.columns is None else out, dataset)}


class ClassHead(_LabelHead):
    """Logits of a class label for each structure or atom, or of a group of them.

    Args:
        field: an int64 label, or a group of them.
        classes: number of classes (of each label), at least 2.
        hidden: widths of the readout's hidden layers.
        pool: for structures, how atoms are joined.
        columns: of a group: how many labels it has.
        level: of a group that is not declared yet: "system" (the default) or "atom".
    """

    def __init__(
        self,
        field: str,
        classes: int,
        hidden: Sequence[int] = (32,),
        pool: Literal["mean", "sum"] = "mean",
        columns: int | None = None,
        level: Literal["system", "atom"] | None = None,
    ) -> None:
        if classes < 2:
            raise InputError(f"a class head needs at least 2 classes, received {classes}", remedy="use GraphHead or NodeHead for numbers")
        super().__init__(field, hidden, level, classes, columns, "int64")
        self.pool, self.classes = pool, classes

    def fit_scales(self, statistics: Statistics) -> None:
        """Logits have no scale."""

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`field` (systems or atoms, classes), or (systems or atoms, columns, classes): logits."""
        if self.columns is not None and self.level == "system":
            logits = self._pooled(features, batch, self.pool)
        else:
            logits = self.readout(features.scalars, atom_dataset(batch))
            logits = pool(logits, batch, self.pool) if self.level == "system" else logits
        return {self.field: logits if self.columns is None else logits.unflatten(1, (self.columns, self.classes))}


class BinaryHead(_LabelHead):
    """One logit for each label that is 0 or 1 (loss "bce"): for assays, by the hundreds in a group.

    The logit starts from the share of 1 in the training data, column by column and for each dataset, since active molecules are rare.

    Args:
        field: an int64 label, or a group of them.
        hidden: widths of the readout's hidden layers.
        pool: for structures, how atoms are joined.
        columns: of a group: how many labels it has.
        level: of a group that is not declared yet: "system" (the default) or "atom".
    """

    def __init__(
        self,
        field: str,
        hidden: Sequence[int] = (32,),
        pool: Literal["mean", "sum"] = "mean",
        columns: int | None = None,
        level: Literal["system", "atom"] | None = None,
    ) -> None:
        super().__init__(field, hidden, level, 1, columns, "int64")
        self.pool = pool

    def fit_scales(self, statistics: Statistics) -> None:
        if self.field in statistics.mean:
            # Classes that do not occur at all are still thought possible.
            share = statistics.mean[self.field].clamp(RAREST, 1 - RAREST)
            self.scale.mean.copy_(torch.nan_to_num(torch.logit(share)))

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`field` (systems or atoms,), or (systems or atoms, columns): logits."""
        if self.level == "system":
            values, dataset = self._pooled(features, batch, self.pool), system_dataset(batch)
        else:
            dataset = atom_dataset(batch)
            values = self.readout(features.scalars, dataset)
        values = values[:, 0] if self.columns is None else values
        return {self.field: values + self.scale.mean.to(values.dtype)[dataset]}


#: A class of two is taken to have at least this share.
RAREST = 1e-3


def pool(values: Float[Tensor, "atoms d"], batch: AtomicData, how: Literal["mean", "sum"]) -> Float[Tensor, "systems d"]:
    """Sum or mean over the atoms of each structure (0 for one without atoms)."""
    total = sum_over(values, batch.batch, batch.num_systems)
    return total if how == "sum" else total / batch.natoms.clamp(min=1).to(total.dtype).unsqueeze(1)


def gradient_outputs(
    head: Head, energy: Float[Tensor, " systems"], features: NodeFeatures, batch: AtomicData
) -> dict[str, Float[Tensor, "..."]]:
    """`forces` (atoms, 3) and `stress` (systems, 3, 3) of an energy, those that a head has among its outputs."""
    if not head.conservative:
        return {}
    forces, stress = forces_and_stress(energy, features.vectors, batch, create_graph=head.training)
    return {name: value for name, value in (("forces", forces), ("stress", stress)) if name in head.outputs}


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
        self.table.scale.copy_(force_scale(statistics).unsqueeze(1).expand(-1, 119))

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Float[Tensor, "..."]]:
        """`energy` (systems,), `energies` (atoms,), `forces` (atoms, 3), `stress` (systems, 3, 3); all float64."""
        dataset = atom_dataset(batch)
        out = self.readout(features.scalars, dataset)[:, 0].double()
        energies = self.table.scale[dataset, batch.numbers] * out + self.table.reference[dataset, batch.numbers]
        energy = sum_over(energies, batch.batch, batch.num_systems)
        return {"energy": energy, "energies": energies} | gradient_outputs(self, energy, features, batch)
