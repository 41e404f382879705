"""`matfound relax` with a checkpoint of each of OC20's five models: a slab with tags, and a crystal without."""

from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.constraints import FixAtoms
from ase.io import read, write

from matfound.cli.main import main
from matfound.models.base import Backbone, Head, Potential, Statistics
from matfound.models.cgcnn import CGCNN, CGCNNEnergy
from matfound.models.checkpoint import save
from matfound.models.dimenetplusplus import DimeNetPlusPlus
from matfound.models.gemnet_oc import GemNetOC
from matfound.models.gemnet_oc_heads import GemNetOCEnergy, GemNetOCForces
from matfound.models.painn import PaiNN, PaiNNForces
from matfound.models.perceptron_heads import PerceptronEnergy
from matfound.models.schnet import SchNet

#: Forces straight from the features, and no stress.
DIRECT = ("gemnet_oc", "painn")
MODELS = (*DIRECT, "schnet", "dimenetplusplus", "cgcnn")


def parts(name: str) -> tuple[Backbone, dict[str, Head]]:
    """The smallest network of each kind, and its heads in the recipe."""
    near: dict[str, Any] = {"cutoff": 4.0, "max_neighbors": 8, "num_layers": 1}
    if name == "gemnet_oc":
        widths: dict[str, Any] = dict.fromkeys(("atom_channels", "edge_channels", "num_radial"), 4)
        pairs: dict[str, Any] = dict.fromkeys(("triplet_channels", "quadruplet_channels", "atom_message_channels"), (4, 4))
        backbone = GemNetOC(
            cutoff=4.0, max_neighbors=6, max_neighbors_quadruplets=3, max_neighbors_atom_edges=4, max_neighbors_atoms=8, num_blocks=1,
            num_spherical=2, **widths, **pairs,
        )  # fmt: skip
        return backbone, {"energy": GemNetOCEnergy(), "forces": GemNetOCForces()}
    if name == "painn":
        return PaiNN(channels=4, num_basis=4, **near), {
            "energy": PerceptronEnergy([4], "scaled_silu", forces=False, stress=False),
            "forces": PaiNNForces(),
        }
    if name == "schnet":
        return SchNet(channels=4, num_filters=4, num_basis=8, **near), {"energy": PerceptronEnergy([4], "shifted_softplus")}
    if name == "dimenetplusplus":
        widths = {"channels": 4, "interaction_channels": 4, "basis_channels": 2, "output_channels": 4}
        return DimeNetPlusPlus(num_spherical=2, num_radial=2, **widths, **near), {"energy": PerceptronEnergy([], bias=False)}
    return CGCNN(channels=4, num_basis=8, **near), {"energy": CGCNNEnergy([4], extensive=False)}


def checkpoint(name: str, folder: Path) -> Path:
    """An untrained model of copper, oxygen and hydrogen."""
    torch.manual_seed(0)
    backbone, heads = parts(name)
    potential = Potential(backbone, heads, ["oc20"])
    references = torch.full((1, 119), torch.nan, dtype=torch.float64)
    references[0, [1, 8, 29]] = torch.tensor([-3.0, -4.0, -2.0], dtype=torch.float64)
    potential.fit_scales(Statistics(["oc20"], references, {"forces": torch.ones(1, dtype=torch.float64)}, {}, {"main": 8.0}))
    return save(potential, folder / name)


@pytest.fixture
def structures(here: Path) -> tuple[ase.Atoms, ase.Atoms]:
    """slab.extxyz: OH on two layers of copper, tagged as in OC20 with the lower layer held; bulk.cif: rattled copper."""
    slab = fcc111("Cu", (2, 2, 2), a=3.6, vacuum=6.0)
    add_adsorbate(slab, molecule("OH"), 1.5, "fcc")
    slab.pbc, slab.info = True, {}
    slab.set_tags([0] * 4 + [1] * 4 + [2] * 2)
    slab.set_constraint(FixAtoms(range(4)))
    write("slab.extxyz", slab)
    crystal = bulk("Cu", "fcc", a=3.6, cubic=True)
    crystal.rattle(0.1, seed=0)
    write("bulk.cif", crystal)
    return slab, crystal


@pytest.mark.parametrize("name", MODELS)
def test_relax(name, here, structures, capsys):
    model = checkpoint(name, here)
    assert main(["relax", "slab.extxyz", "bulk.cif", "--model", str(model), "--steps", "3", "--fmax", "1e-6", "--out", "r.extxyz"]) == 3
    assert "did not converge in 3 steps" in capsys.readouterr().err
    slab, crystal = read("r.extxyz", ":")
    assert slab.get_tags().tolist() == structures[0].get_tags().tolist()
    np.testing.assert_allclose(slab.positions[:4], structures[0].positions[:4], atol=1e-7)
    for relaxed, start in zip((slab, crystal), structures, strict=True):
        assert np.isfinite(relaxed.get_potential_energy())
        assert np.abs(relaxed.positions - start.positions).max() > 1e-4
    np.testing.assert_allclose(crystal.cell, structures[1].cell, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_relax_with_the_cell(name, here, structures, capsys):
    model = checkpoint(name, here)
    code = main(["relax", "bulk.cif", "--model", str(model), "--steps", "2", "--fmax", "1e-6", "--cell"])
    error = capsys.readouterr().err
    if name in DIRECT:
        assert code == 1
        assert error.startswith("matfound: error: bulk.cif: frame 0: this relaxation needs stress, which the model does not predict")
        assert error.count("\n") == 1
    else:
        assert code == 3
        assert read("bulk-relaxed.extxyz").cell.volume != pytest.approx(structures[1].cell.volume, rel=1e-7)
