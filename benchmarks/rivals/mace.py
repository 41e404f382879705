"""mace-torch 0.3.16 with each of its back ends, in the shape of MACE-MP-0-medium with random weights."""

import contextlib
import importlib
import io
import logging
from collections.abc import Sequence
from typing import Any

import ase
import numpy as np
import torch
from e3nn.o3 import Irreps
from rivals.codes import Code, Outputs, default_dtype
from rivals.sevennet import sharpen

from matfound.models.base import Potential
from matfound.models.convert import mace as converter

#: Back end to the converter of a model in mace-torch, and the packages that it needs; without them it takes e3nn and says nothing.
BACKENDS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "e3nn": (None, ()),
    "oeq": ("mace.cli.convert_e3nn_oeq", ("openequivariance",)),
    "cueq": ("mace.cli.convert_e3nn_cueq", ("cuequivariance_torch", "cuequivariance_ops_torch")),
    "hybrid": ("mace.cli.convert_e3nn_hybrid", ("openequivariance", "cuequivariance_torch", "cuequivariance_ops_torch")),
    "e3nn-compiled": (None, ()),
}
CUTOFF, ELEMENTS = 6.0, list(range(1, 90))


def original(dtype: torch.dtype = torch.float32) -> Any:
    """The model on e3nn, always with the same weights."""
    from mace import modules

    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    with default_dtype(torch.float32):
        torch.manual_seed(0)
        model = modules.ScaleShiftMACE(
            r_max=CUTOFF, num_bessel=10, num_polynomial_cutoff=5, max_ell=3, interaction_cls=block, interaction_cls_first=block,
            num_interactions=2, num_elements=len(ELEMENTS), hidden_irreps=Irreps("128x0e+128x1o"), MLP_irreps=Irreps("16x0e"),
            gate=torch.nn.functional.silu, atomic_energies=np.zeros((1, len(ELEMENTS))), avg_num_neighbors=61.96,
            atomic_numbers=ELEMENTS, correlation=3, radial_MLP=[64, 64, 64], radial_type="bessel", atomic_inter_scale=0.8,
            atomic_inter_shift=0.16,
        )  # fmt: skip
    model.to(dtype)
    if dtype == torch.float64:
        sharpen(model)
    return model


def converted() -> Potential:
    """The same model here, through the facts that `matfound.models.convert.mace` reads."""
    from mace.tools.scripts_utils import extract_config_mace_model

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        return value if isinstance(value, bool | int | float | list) or value is None else getattr(value, "__name__", str(value))

    model = original()
    config = {key: plain(value) for key, value in extract_config_mace_model(model).items()}
    return converter.convert({"state_dict": model.state_dict(), "config": config})


class MACETorch(Code):
    """The model on a back end.

    Args:
        backend: key of `BACKENDS`.
        device: where to compute.
        dtype: of weights and positions.
    """

    def __init__(self, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        script, packages = BACKENDS[backend]
        for package in packages:
            importlib.import_module(package)
        self.device, self.dtype = device, dtype
        self.calculator_only = backend == "e3nn-compiled"
        with default_dtype(dtype), contextlib.redirect_stdout(io.StringIO()):
            self.model = original(dtype)
            if script is not None:
                self.model = importlib.import_module(script).run(self.model, device=device.type, return_model=True)
        self.module = self.model.to(device)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]

    def calculator(self) -> Any:
        from mace.calculators import MACECalculator

        logging.getLogger().setLevel(logging.ERROR)
        options = {"compile_mode": "default"} if self.calculator_only else {}
        return MACECalculator(models=self.model, device=str(self.device), default_dtype="float32", **options)

    def batch(self, structures: Sequence[ase.Atoms]) -> Any:
        from mace import data, tools
        from mace.tools import torch_geometric

        table = tools.AtomicNumberTable(ELEMENTS)
        with default_dtype(self.dtype):
            samples = [data.AtomicData.from_config(data.config_from_atoms(a), z_table=table, cutoff=CUTOFF) for a in structures]
        loader = torch_geometric.dataloader.DataLoader(samples, batch_size=len(samples), shuffle=False)
        return next(iter(loader)).to(self.device).to_dict()

    def edges(self, batch: Any) -> int:
        return int(batch["edge_index"].shape[1])

    def outputs(self, batch: Any, *, training: bool) -> Outputs:
        batch["positions"] = batch["positions"].detach()
        found = self.model(batch, training=training, compute_force=True, compute_stress=False)
        return found["energy"], found["forces"], None
