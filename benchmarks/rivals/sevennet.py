"""SevenNet's own code (sevenn 0.13.0) with each of its back ends."""

import contextlib
import copy
import importlib
import io
import re
from collections.abc import Sequence
from typing import Any

import ase
import torch
from e3nn.o3 import TensorProduct, wigner_3j
from rivals.codes import Code, Outputs

#: Model of the catalog to sevenn's name for it.
NAMES = {"sevennet-0": "7net-0", "sevennet-l3i5": "7net-l3i5"}
#: Back end to the option that asks for it, and the package that has it. Without the package, sevenn takes e3nn, and warns at most.
BACKENDS = {
    "e3nn": (None, "e3nn"),
    "oeq": ("enable_oeq", "openequivariance"),
    "cueq": ("enable_cueq", "cuequivariance_ops_torch"),
    "flashtp": ("enable_flash", "flashTP_e3nn"),
}


class SevenNet(Code):
    """A published model.

    Args:
        name: of the model in the catalog.
        backend: key of `BACKENDS`.
        device: where to compute.
        dtype: of weights and edge vectors.
    """

    def __init__(self, name: str, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        import sevenn.train.dataload  # noqa: F401 - what else is needed later: an error is to come now
        from sevenn.util import load_checkpoint

        option, package = BACKENDS[backend]
        importlib.import_module(package)
        self.name, self.device, self.dtype = NAMES[name], device, dtype
        self.options = {} if option is None else {option: True}
        with contextlib.redirect_stdout(io.StringIO()):
            self.model = load_checkpoint(self.name).build_model(**self.options).to(device=device, dtype=dtype)
        if dtype == torch.float64:
            sharpen(self.model)
            for module in self.model.modules():
                if type(module).__name__ == "OnehotEmbedding":  # makes float32 numbers, whatever the weights are
                    module.register_forward_hook(lambda _, __, data: data.apply(_doubled))
        self.model.set_is_batch_data(True)
        if option is not None and any(type(module) is TensorProduct for module in self.model.modules()):  # gates have others
            raise RuntimeError("sevenn took e3nn's product all the same")
        self.module, self.trainable = self.model, [p for p in self.model.parameters() if p.requires_grad]

    def calculator(self) -> Any:
        from sevenn.calculator import SevenNetCalculator

        with contextlib.redirect_stdout(io.StringIO()):
            return SevenNetCalculator(self.name, device=self.device, **self.options)

    def batch(self, structures: Sequence[ase.Atoms]) -> Any:
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.train.dataload import unlabeled_atoms_to_graph
        from torch_geometric.loader.dataloader import Collater

        graphs = []
        for atoms in structures:
            arrays = unlabeled_atoms_to_graph(atoms, self.model.cutoff)
            graphs.append(AtomGraphData.from_numpy_dict(dict(arrays)))
            for key in ("edge_vec", "cell_volume"):
                graphs[-1][key] = torch.as_tensor(arrays[key]).to(self.dtype)
        return Collater(graphs)(graphs).to(self.device)

    def edges(self, batch: Any) -> int:
        return int(batch.edge_index.shape[1])

    def outputs(self, batch: Any, *, training: bool) -> Outputs:
        found = self.model(copy.copy(batch))  # it writes what it computes into what it is given
        stress = -found["inferred_stress"][:, [0, 1, 2, 4, 5, 3]]
        return found["inferred_total_energy"], found["inferred_force"], stress


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.dtype == torch.float32 else tensor


def sharpen(model: torch.nn.Module) -> None:
    """Replace Clebsch-Gordan coefficients that were rounded to float32, in a model that was cast to float64."""
    for name, tensor in model.named_buffers():
        if found := re.search(r"_w3j_(\d)_(\d)_(\d)$", name):
            exact = wigner_3j(*map(int, found.groups()), dtype=torch.float64).to(tensor.device)
            tensor.copy_(exact * torch.sign((exact * tensor).sum()))
