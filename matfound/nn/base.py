"""What backbones and heads are; they know only `AtomicData`, the field table and `GraphSpec`."""

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matfound.errors import InputError, nearest
from matfound.graphs.spec import GraphSpec
from matfound.structures.atomic_data import AtomicData

Symmetry = Literal["E3", "SE3", "none"]


class Configurable(nn.Module):
    """A module that remembers the arguments it was built from, so that a checkpoint can build it again.

    `config` is JSON: {"class_path": ..., "init_args": {...}}, nested for arguments that are `Configurable` themselves.
    """

    config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = cls.__init__

        @functools.wraps(init)
        def remember(self: Any, *args: Any, **kwargs: Any) -> None:
            outermost = "config" not in self.__dict__
            if outermost:
                bound = inspect.signature(init).bind(self, *args, **kwargs)
                arguments = {k: _to_json(v) for k, v in list(bound.arguments.items())[1:]}
                path = f"{type(self).__module__}.{type(self).__qualname__}"
                self.__dict__["config"] = {"class_path": path, "init_args": arguments}
            init(self, *args, **kwargs)

        cls.__init__ = remember  # type: ignore[method-assign]


def _to_json(value: Any) -> Any:
    if isinstance(value, Configurable):
        return value.config
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    return value


def build(config: Mapping[str, Any]) -> Any:
    """The module of a `Configurable.config`.

    A class outside matfound is used only when its package has been imported already: a checkpoint must not choose what code runs.

    Raises:
        InputError: unknown or untrusted class, or arguments that it does not take.
    """
    path = str(config["class_path"])
    module, _, name = path.rpartition(".")
    package = module.partition(".")[0]
    if package != "matfound" and module not in sys.modules:
        raise InputError(f"the checkpoint needs '{path}', which is not part of matfound", remedy=f"import {module} first, if you trust it")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise InputError(f"there is no class '{path}' in this version of matfound", remedy="upgrade matfound") from None
    if not (isinstance(cls, type) and issubclass(cls, Configurable)):
        raise InputError(f"'{path}' is not a matfound model class")
    arguments = {k: _from_json(v) for k, v in config["init_args"].items()}
    known = inspect.signature(cls).parameters
    unknown = next((k for k in arguments if k not in known), None)
    if unknown is not None:
        raise InputError(f"{path} takes no argument '{unknown}'", remedy=nearest(unknown, known))
    return cls(**arguments)


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"class_path", "init_args"}:
            return build(value)
        return {k: _from_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    return value


@dataclass
class NodeFeatures:
    """What a backbone hands to the heads.

    Args:
        scalars: (atoms, channels) invariant features.
        vectors: edge vectors of each graph in Å, float64, leaves of the autograd graph: energies are differentiated by these.
        equivariant: (atoms, irreps.dim) features, with their `irreps`.
    """

    scalars: Float[Tensor, "atoms channels"]
    vectors: dict[str, Float[Tensor, "edges 3"]] = field(default_factory=dict)
    equivariant: Float[Tensor, "atoms dim"] | None = None
    irreps: str = ""


class Backbone(Configurable):
    """Structure in, features out.

    Subclasses set: `graphs`, which the datamodule and the calculator build for it; `symmetry`; `continuity`, the number of continuous
    derivatives of the energy when an atom crosses the cutoff, -1 where it jumps; `channels`, the width of `NodeFeatures.scalars`;
    `elements`, the atomic numbers that it can take.

    `exact_cutoff` says that an edge beyond the cutoff contributes exactly nothing to features and derivatives, so that a batch may hold
    such edges in any number (the backbone must then take vectors and order of its edges from `matfound.nn.gradients`).

    `differentiated` is set by `Potential`: whether a head differentiates the energy by the edge vectors. A backbone may save the work
    where none does.
    """

    graphs: dict[str, GraphSpec]
    symmetry: Symmetry = "none"
    continuity: int = 0
    channels: int
    elements: frozenset[int] = frozenset(range(1, 119))
    exact_cutoff: bool = False
    differentiated: bool = True

    def forward(self, batch: AtomicData) -> NodeFeatures:
        raise NotImplementedError

    def grown(self, parent: int) -> dict[str, Any]:
        """Arguments that change when the vocabulary grows by a dataset that starts as a copy of `parent`. Default: none."""
        return {}

    def fit_scales(self, statistics: "Statistics") -> None:
        """Set what depends on the training data (mean neighbour counts, …) before training starts. Default: nothing."""

    def tabulate(self) -> bool:
        """Put tables in place of networks that depend on one number only, until weights are loaded or trained. Default: nothing.

        Returns:
            Whether there are tables now.
        """
        return False


Kind = TypeVar("Kind", bound=Backbone)


def required(head: "Head", backbone: Backbone, kind: type[Kind]) -> Kind:
    """The backbone, of the family whose features a head works on.

    Raises:
        InputError: it is of another.
    """
    if not isinstance(backbone, kind):
        raise InputError(f"{type(head).__name__} works on {kind.__name__}'s features, not on {type(backbone).__name__}'s")
    return backbone


class Head(Configurable):
    """Features in, predictions out, in the units of the field table.

    `outputs` names the fields that a head predicts.
    """

    outputs: tuple[str, ...] = ()
    conservative: bool = False

    def attach(self, backbone: Backbone, datasets: int) -> None:
        """Make the parameters for a backbone and a vocabulary of datasets; `Potential` calls this once. Heads of one family override it."""
        self.bind(backbone.channels, datasets)

    def bind(self, channels: int, datasets: int) -> None:
        """The same, for heads that need to know the backbone's width only."""

    def grown(self, parent: int) -> dict[str, Any]:
        """As `Backbone.grown`."""
        return {}

    def elements(self, dataset: int) -> set[int] | None:
        """Atomic numbers that the head can judge in a dataset; None where it does not care. Default: None."""
        return None

    def forward(self, features: NodeFeatures, batch: AtomicData) -> dict[str, Tensor]:
        raise NotImplementedError

    def fit_scales(self, statistics: "Statistics") -> None:
        """Set scale, shift and references from the training data before training starts. Default: nothing."""


@dataclass
class Statistics:
    """What training needs to know of its data beforehand; `tasks.statistics.collect` fills it.

    Args:
        datasets: names, in the order of the vocabulary.
        references: (datasets, 119) energy of each element from least squares, eV; NaN for elements that a dataset does not have.
        rms: (datasets,) root mean square of each label's components (energy: per atom, after the references, and 0 where these leave
            nothing over); NaN without a label. Of a group (datasets, columns): of each of its labels by itself.
        mean: likewise, mean of each label; of classes 0 and 1 the share of 1.
        avg_neighbors: mean number of edges per atom, of each graph.
    """

    datasets: list[str]
    references: Float[Tensor, "datasets 119"]
    rms: dict[str, Float[Tensor, "datasets ..."]] = field(default_factory=dict)
    mean: dict[str, Float[Tensor, "datasets ..."]] = field(default_factory=dict)
    avg_neighbors: dict[str, float] = field(default_factory=dict)

    def spread(self, name: str) -> Float[Tensor, "datasets ..."]:
        """Standard deviation of a label in each dataset; 1 where it is constant or absent."""
        mean, rms = self.mean[name], self.rms[name]
        spread = torch.sqrt((rms**2 - mean**2).clamp(min=0))
        return torch.where(spread > 1e-6 * rms, spread, torch.ones_like(spread))
