"""GemNet-OC: parity with the published code, symmetry, tags, scale factors, edge cases, training."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ase
import ase.build
import ase.io
import pytest
import torch
from ase.build import bulk

from matfound import unpickle
from matfound.errors import InputError
from matfound.inference.calculator import Calculator
from matfound.models import checkpoint
from matfound.models.base import Head, Potential, Statistics
from matfound.models.convert import fairchem
from matfound.models.convert.gemnet_oc import load_factors
from matfound.models.gemnet_oc import GemNetOC
from matfound.models.gemnet_oc_heads import GemNetOCEnergy, GemNetOCForces
from matfound.models.gemnet_oc_layers import Scale
from matfound.structures.atomic_data import collate
from matfound.testing import check_gradients, check_model, check_symmetry, evaluate, prepare, random_crystal

TINY: dict[str, Any] = {
    "cutoff": 3.5, "cutoff_atoms": 4.0, "max_neighbors": 400, "max_neighbors_quadruplets": 400, "max_neighbors_atom_edges": 400,
    "cutoff_quadruplets": 2.5, "num_blocks": 1, "atom_channels": 6, "edge_channels": 7, "triplet_channels": [4, 5],
    "quadruplet_channels": [3, 4], "atom_message_channels": [4, 3], "radial_channels": 3, "circular_channels": 4, "spherical_channels": 3,
    "num_radial": 6, "num_spherical": 3, "num_elements": 24,
}  # fmt: skip
GRADIENT = {"direct_forces": False, "spherical_basis": "spherical_harmonics"}


def small(*, datasets: tuple[str, ...] = ("a",), extensive: bool = True, coupled: bool = False, **arguments: Any) -> Potential:
    """An untrained model whose scale factors are set."""
    torch.manual_seed(0)
    backbone = GemNetOC(**{**TINY, **arguments})
    direct = backbone.direct_forces
    heads: dict[str, Head] = {"energy": GemNetOCEnergy(1, extensive, forces=not direct, stress=not direct)}
    if direct:
        heads["forces"] = GemNetOCForces(1, coupled)
    potential = Potential(backbone, heads, datasets)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, Scale):
                module.factor.uniform_(0.6, 1.4)
    references = torch.full((len(datasets), 119), torch.nan, dtype=torch.float64)
    references[:, [1, 6, 8, 12, 22]] = torch.tensor([-13.6, -102.0, -204.0, -5.0, -7.0], dtype=torch.float64)
    ones = torch.ones(len(datasets), dtype=torch.float64)
    potential.fit_scales(Statistics(list(datasets), references, {"energy": ones, "forces": 2 * ones}, {}, {"main": 20.0}))
    return potential


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """The benchmark, imported."""
    spec = importlib.util.spec_from_file_location("matfound_parity_gemnet", Path(__file__).resolve().parents[2] / "benchmarks/parity.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["gemnet_oc_noquad", "gemnet_oc_quad", "gemnet_oc_quad_grad"])
def test_parity(shared_data, parity, model):
    rows = list(parity.equiformer(shared_data / "golden" / model, {}))
    assert len(rows) == {"gemnet_oc_noquad": 1 + 4 * (2 + 4)}.get(model, 1 + 4 * (8 + 4))
    assert not [row for row in rows if not row.ok]


def crystals() -> list[ase.Atoms]:
    molecule = random_crystal(3, 4, (8, 12, 22), pbc=False)
    molecule.cell[:] = 0
    return [random_crystal(1, 2, (8, 22)), random_crystal(2, 4, (8, 12, 22), pbc=(True, True, False)), molecule]


@pytest.mark.parametrize("arguments", [{}, GRADIENT], ids=["direct", "gradient"])
def test_declarations_hold(arguments):
    check_model(small(**arguments), crystals()[len(arguments) // 2 :])


@pytest.mark.parametrize("absent", ["quadruplets", "atom_edge", "edge_atom", "atom_atom"])
def test_without_one_interaction(absent):
    potential = small(**{absent: False}, **GRADIENT).double().eval()
    atoms = crystals()[2]
    check_symmetry(potential, atoms)
    check_gradients(potential, atoms, components=2)


def test_graphs_that_are_not_needed_are_not_made():
    nothing = {"quadruplets": False, "atom_edge": False, "edge_atom": False, "atom_atom": False}
    potential = small(**nothing)
    assert list(potential.graphs) == ["main"]
    assert potential.graphs["main"].tie_squared
    assert not small().graphs["main"].tie_squared
    evaluate(potential, crystals())


def quads(potential: Potential, structures: list[ase.Atoms]) -> int:
    batch = collate([prepare(potential, atoms) for atoms in structures])
    return int(potential.backbone.indices(batch).middles.quads.mask.sum())


def test_tags():
    """Middle edges have a tagged end; a structure without any tag keeps all of them, whatever else is in the batch."""
    potential, slab = small(), crystals()[1]
    untagged = quads(potential, [slab])
    tagged = slab.copy()
    tagged.set_tags(1)
    assert quads(potential, [tagged]) == untagged > 0
    partly = slab.copy()
    partly.set_tags([0, 0, 0, 2])
    assert 0 < quads(potential, [partly]) < untagged
    assert quads(potential, [partly, slab]) == quads(potential, [partly]) + untagged
    zeros = slab.copy()
    zeros.set_tags(0)
    assert quads(potential, [zeros, partly]) == quads(potential, [partly]) + untagged
    assert quads(small(quadruplet_tags=[0, 1, 2]), [partly]) == untagged


def test_places_may_be_more_than_edges():
    """One atom has one edge, and the number of places is rounded up."""
    potential = small(max_neighbors=1, max_neighbors_quadruplets=1, max_neighbors_atom_edges=1, max_neighbors_atoms=1)
    batch = collate([prepare(potential, bulk("Al", "fcc", a=3.6))])
    assert batch.edge_index.shape == (2, 1)
    index = potential.backbone.indices(batch)
    assert index.atom_edges.places.row.shape == (1, 4)
    evaluate(potential, [bulk("Al", "fcc", a=3.6)])


def test_indices_are_few_operations(counting):
    """On a GPU each costs the host more time than the GPU."""
    potential = small()
    for count in (1, 3):
        structures = [atoms.copy() for atoms in crystals()[:count]]
        for atoms in structures:
            atoms.set_tags(1)
        batch = collate([prepare(potential, atoms) for atoms in structures])
        with counting() as found:
            potential.backbone.indices(batch)
        assert found.calls <= 110
        assert found.waits == 2, "main and middle edges; that for numbers of edges is none on a CPU"


def test_forces_that_add_up():
    out = evaluate(small(coupled=True).double().eval(), crystals()[0])
    assert out["forces"].abs().max() > 0.01
    assert out["forces"].sum(0).abs().max() < 1e-12


def test_intensive():
    potential, atoms = small(extensive=False).double().eval(), random_crystal(1, 2, (8, 22))
    single, double = (float(evaluate(potential, cell)["energy"]) for cell in (atoms, atoms.repeat((2, 1, 1))))
    reference = -204.0 - 7.0
    assert double - 2 * reference == pytest.approx(single - reference, abs=1e-9)


def test_training_reaches_every_weight():
    for arguments in ({}, GRADIENT):
        potential = small(datasets=("a", "b"), **arguments).train()
        batch = collate([prepare(potential, atoms) for atoms in crystals()])
        out = potential(batch)
        (out["energy"].sum() + out["forces"].square().sum()).backward()
        for name, parameter in potential.named_parameters():
            if name.endswith(".factor"):
                assert not parameter.requires_grad
            else:
                assert torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.any(), name


def test_perfect_crystal():
    """Three atoms in a line have no dihedral angle: everything stays finite."""
    potential = small(**GRADIENT).train()
    atoms = ase.build.bulk("MgO", "rocksalt", a=4.2)
    out = potential(collate([prepare(potential, atoms)]))
    (out["energy"].sum() + out["forces"].square().sum() + out["stress"].square().sum()).backward()
    assert torch.isfinite(out["forces"]).all()
    assert all(torch.isfinite(p.grad).all() for p in potential.parameters() if p.requires_grad)


def test_checkpoint(tmp_path):
    potential = small()
    checkpoint.save(potential, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    ours, theirs = (evaluate(model.eval(), crystals()) for model in (potential, loaded))
    assert torch.equal(ours["energy"], theirs["energy"])
    atoms = ase.build.bulk("MgO", "rocksalt", a=4.2)
    atoms.calc = Calculator(loaded)
    assert torch.isfinite(torch.tensor(atoms.get_potential_energy()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cutoff_quadruplets": 5.0}, "more than the 3.5 Å"),
        ({"max_neighbors": 2000}, "2000, more than"),
        ({"cutoff_atoms": 3.0}, "more than the 3 Å"),
        ({"triplet_channels": [4]}, "two numbers"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(InputError, match=message):
        GemNetOC(**{**TINY, **arguments})


def test_heads_need_their_features():
    with pytest.raises(InputError, match="direct_forces"):
        Potential(GemNetOC(**{**TINY, "direct_forces": False}), {"forces": GemNetOCForces()})


@pytest.mark.parametrize(("name", "blocks", "count"), [("gemnet-oc", 4, 54), ("gemnet-oc-large", 6, 80)])
def test_published_factors(shared_data, name, blocks, count):
    factors: Any = unpickle.load(shared_data / "data/fairchem" / f"all_gemnet_scaling_factors_{name}.pt")
    backbone = GemNetOC(**{**TINY, "num_blocks": blocks})
    load_factors(backbone, factors)
    scales = [module for module in backbone.modules() if isinstance(module, Scale)]
    assert len(scales) == len(factors) == count
    assert sorted(float(s.factor) for s in scales) == pytest.approx(sorted(float(value) for value in factors.values()))
    name, scale = "int_blocks.0.quad_interaction.scale_cbf", backbone.blocks[0].quadruplet.scale_circular
    assert float(scale.factor) == pytest.approx(float(factors[name]))
    load_factors(backbone, factors)
    with pytest.raises(InputError, match="in the model"):
        load_factors(backbone, {**factors, name: 1.0})
    with pytest.raises(InputError, match="only the model has"):
        load_factors(backbone, {key: value for key, value in factors.items() if key != name})


def test_older_layout(shared_data, caplog):
    """Normalizers by their old names, the model's options apart, scale factors in a dictionary of their own, prefixes."""
    folder = shared_data / "golden/gemnet_oc_quad"
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state: Any = unpickle.load(folder / "state_dict.pt")
    factors = {key.removesuffix(".scale_factor"): float(value) for key, value in state.items() if key.endswith(".scale_factor")}
    new = fairchem.convert({"config": {"model": {"name": "gemnet_oc", **described["config"]}}, "state_dict": state})
    old = fairchem.convert(
        {
            "config": {"model": "gemnet_oc", "model_attributes": described["config"]},
            "state_dict": {f"module.module.{key}": value for key, value in state.items() if not key.endswith(".scale_factor")},
            "scale_dict": factors,
            "normalizers": {"target": {"mean": -0.75, "std": 2.5}, "grad_target": {"mean": 0.0, "std": 2.5}},
        }
    )
    atoms = ase.build.molecule("CH3OH")
    ours, theirs = evaluate(new.double().eval(), atoms), evaluate(old.double().eval(), atoms)
    torch.testing.assert_close(theirs["energy"], 2.5 * ours["energy"] - 0.75, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theirs["forces"], 2.5 * ours["forces"], rtol=1e-5, atol=1e-6)
    bare = {key: value for key, value in state.items() if not key.endswith(".scale_factor")}
    fairchem.convert({"config": {"model": {"name": "gemnet_oc", **described["config"]}}, "state_dict": bare})
    assert "has no value for 28 scale factors" in caplog.text
    with pytest.raises(InputError, match="scale_basis"):
        fairchem.convert({"config": {"model": {"name": "gemnet_oc", **described["config"], "scale_basis": True}}, "state_dict": state})


@pytest.mark.skipif("MATFOUND_WEIGHTS" not in os.environ, reason="MATFOUND_WEIGHTS does not name a folder of published files")
def test_published_weights(shared_data):
    """fairchem's own snapshot of the base model, in normalised units."""
    file = Path(os.environ["MATFOUND_WEIGHTS"]) / "gemnet_oc_base_s2ef_all.pt"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    content: Any = unpickle.load(file)
    content.pop("normalizers", None)
    content.pop("ema", None)
    potential = fairchem.convert(content).eval()
    assert sum(p.numel() for p in potential.parameters()) == 38_864_438
    found = evaluate(potential, ase.io.read(shared_data / "data/fairchem/tests_core_models_atoms.json", format="json"))
    snapshot = (shared_data / "data/fairchem/snapshots/test_gemnet_oc.ambr").read_text(encoding="utf-8")
    energy, forces = (json.loads(text) for text in re.findall(r"array\((\[.*?\])(?:,\s*dtype=\w+)?,?\s*\)", snapshot, re.DOTALL)[:2])
    assert found["energy"].numpy() == pytest.approx(energy, abs=1e-3, rel=1e-3)
    assert found["forces"].numpy().ravel() == pytest.approx([x for row in forces for x in row], abs=1e-3, rel=1e-3)
