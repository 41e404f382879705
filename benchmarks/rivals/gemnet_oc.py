"""GemNet-OC in this package and in fairchem-core 1.10.0, behind one interface: graphs, indices and network apart."""

import contextlib
import functools
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import ase
import torch
from rivals import scatter
from torch import Tensor

from matfound.graphs.neighbors import add_graphs
from matfound.models.convert import fairchem
from matfound.models.gemnet_oc import GemNetOC
from matfound.structures.ase import from_atoms
from matfound.structures.atomic_data import AtomicData, collate

#: Energies (systems,) and forces (atoms, 3).
Outputs = tuple[Tensor, Tensor]
Weights = Mapping[str, Tensor]


@contextlib.contextmanager
def quick_weights() -> Iterator[None]:
    """Normal variables for orthogonal matrices, of which the large model has a minute's worth."""
    with mock.patch("torch.nn.init.orthogonal_", torch.nn.init.normal_):
        yield


class Code(ABC):
    """A model on a device, and one batch of structures for it."""

    module: torch.nn.Module

    @abstractmethod
    def take(self, structures: Sequence[ase.Atoms]) -> dict[str, int]:
        """Make the batch, its graphs and its indices; returns how many edges there are, and what else is counted."""

    def drop(self) -> None:
        """Forget the batch."""
        for name in ("batch", "known", "found"):
            vars(self).pop(name, None)

    @abstractmethod
    def graphs(self) -> Any:
        """The four graphs of the batch anew."""

    @abstractmethod
    def indices(self) -> Any:
        """The symmetric main graph, triplets and quadruplets anew, from the graphs that there are."""

    @abstractmethod
    def outputs(self) -> Outputs:
        """The network with the graphs and indices that there are."""

    @abstractmethod
    def everything(self) -> Outputs:
        """Graphs, indices and network."""

    def infer(self, call: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Without gradients."""
        self.module.eval()

        def run() -> Outputs:
            with torch.no_grad():
                return call()

        return run

    def train(self, labels: Outputs, *, step: bool) -> Callable[[], Tensor]:
        """Forward and backward of an L1 loss of energies and forces, and with `step` AdamW."""
        self.module.train()
        # Its work, and the weights stay what they are, for what is measured next.
        optimizer = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], lr=0.0)

        def run() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            energy, forces = self.outputs()
            loss = (energy - labels[0]).abs().mean() + 100 * (forces - labels[1]).abs().mean()
            loss.backward()
            if step:
                optimizer.step()
            return loss.detach()

        return run


class Ours(Code):
    """This package's.

    Args:
        options: fairchem's, of the model.
        weights: under fairchem's names or ours.
        device: where to compute.
        dtype: of the network.
    """

    def __init__(self, options: Mapping[str, Any], weights: Weights, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        content = {"config": {"model": {"name": "gemnet_oc", **options}}, "state_dict": dict(weights)}
        with quick_weights():
            self.module = self.potential = fairchem.convert(content).to(device, dtype)
        backbone = self.potential.backbone
        assert isinstance(backbone, GemNetOC)
        for name, parameter in self.potential.named_parameters():
            parameter.requires_grad_(not name.endswith(".factor"))
        self.backbone, self.device = backbone, device

    def drop(self) -> None:
        super().drop()
        vars(self.backbone).pop("indices", None)

    def take(self, structures: Sequence[ase.Atoms]) -> dict[str, int]:
        self.drop()
        samples = [add_graphs(from_atoms(atoms, labels=False), self.potential.graphs) for atoms in structures]
        self.batch = collate(samples).to(self.device)
        found = self.backbone.indices(self.batch)
        # The forward pass finds these in place of the method.
        vars(self.backbone)["indices"] = lambda _: found
        counts = {name: self.batch[key].shape[1] for name, key in (("atom pairs", "edge_index@a2a"), ("directed", "edge_index"))}
        return counts | {"edges": len(found.main.swap)}

    def graphs(self) -> AtomicData:
        return add_graphs(self.batch, self.potential.graphs)

    def indices(self) -> Any:
        return type(self.backbone).indices(self.backbone, self.batch)

    def outputs(self) -> Outputs:
        found = self.potential(self.batch)
        return found["energy"], found["forces"]

    def everything(self) -> Outputs:
        self.graphs()
        known = vars(self.backbone).pop("indices")
        try:
            return self.outputs()
        finally:
            vars(self.backbone)["indices"] = known


class Fairchem(Code):
    """fairchem-core's.

    Args:
        options: of the model.
        weights: under its names.
        device: where to compute.

    Raises:
        ImportError: fairchem-core, or what its imports ask for, is not installed.
    """

    def __init__(self, options: Mapping[str, Any], weights: Weights, device: torch.device) -> None:
        self.module = _network(options)
        self.module.load_state_dict(weights)
        self.module.to(device)
        self.device = device

    def take(self, structures: Sequence[ase.Atoms]) -> dict[str, int]:
        from fairchem.core.datasets import data_list_collater
        from torch_geometric.data import Data

        samples = [
            Data(
                pos=torch.tensor(atoms.positions, dtype=torch.float32),
                cell=torch.tensor(atoms.cell.array, dtype=torch.float32)[None],
                atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.float32),
                natoms=len(atoms),
                tags=torch.tensor(atoms.get_tags()),
                pbc=torch.tensor(atoms.pbc),
                fixed=torch.zeros(len(atoms), dtype=torch.int64),
            )
            for atoms in structures
        ]
        self.batch = data_list_collater(samples, otf_graph=True).to(self.device)
        self.known = self.graphs()
        self.found = self.indices()
        main, pairs, _, _, _, triplets, _, _, quadruplets = self.found
        counts = {"edges": main["edge_index"].shape[1], "atom pairs": pairs["edge_index"].shape[1]}
        return counts | {"triplets": len(triplets["in"]), "quadruplets": len(quadruplets["out"])}

    def graphs(self) -> list[dict[str, Tensor]]:
        """Atom pairs, main graph, atoms and edges, middle edges."""
        network = self.module
        whole = (network.cutoff_aint, network.max_neighbors_aint)
        found = [network.generate_graph_dict(self.batch, *whole)]
        for kind in ("", "_aeaint", "_qint"):
            part = (getattr(network, f"cutoff{kind}"), getattr(network, f"max_neighbors{kind}"))
            found.append(network.subselect_graph(self.batch, found[0], *part, *whole))
        return found

    def indices(self) -> Any:
        graphs = iter([graph.copy() for graph in self.known])
        known = {name: (lambda *_: next(graphs)) for name in ("generate_graph_dict", "subselect_graph")}
        with mock.patch.multiple(self.module, **known):
            return self.module.get_graphs_and_indices(self.batch)

    def outputs(self) -> Outputs:
        copies = tuple(part.copy() if isinstance(part, dict) else part for part in self.found)
        with mock.patch.object(self.module, "get_graphs_and_indices", return_value=copies):
            return self.everything()

    def everything(self) -> Outputs:
        found = self.module(self.batch)
        return found["energy"], found["forces"]


@functools.cache
def _class() -> Any:
    if importlib.util.find_spec("fairchem") is None:
        raise ImportError("No module named 'fairchem'")
    scatter.install()
    from fairchem.core.models.gemnet_oc.gemnet_oc import GemNetOC as Theirs

    return Theirs


def _network(options: Mapping[str, Any]) -> Any:
    with quick_weights():
        return _class()(**options)


def random_weights(options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Fairchem's names and random values, on the CPU, with scale factors that count; under our own names where it cannot be imported."""
    torch.manual_seed(0)
    try:
        state = _network(options).state_dict()
    except ImportError:
        from matfound.models.convert import gemnet_oc

        with quick_weights():
            backbone, heads = gemnet_oc.build(options, {})
            for head in heads.values():
                head.attach(backbone, 1)
        state = {f"backbone.{name}": p.detach() for name, p in backbone.named_parameters()}
        state |= {f"heads.{key}.{name}": p.detach() for key, head in heads.items() for name, p in head.named_parameters()}
    for name, value in state.items():
        if name.endswith((".scale_factor", ".factor")):
            value.fill_(1.0)
    return state
