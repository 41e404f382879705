"""EquiformerV2: parity with the published code, symmetry, frames, grids, edge cases, training."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ase
import pytest
import torch

from matfound.errors import InputError
from matfound.models import checkpoint
from matfound.models.base import Head, Potential, Statistics
from matfound.models.equiformer_v2 import EquiformerV2, smallest_grid
from matfound.models.equiformer_v2_heads import EquiformerV2Energy, EquiformerV2Forces, EquiformerV2Stress
from matfound.models.extend import extend
from matfound.nn.heads import EnergyHead
from matfound.nn.so3.grid import GridWarning
from matfound.nn.so3.rotation import edge_frames
from matfound.ops.so2 import SO2Layout
from matfound.structures.atomic_data import collate
from matfound.testing import check_gradients, check_model, check_outputs, check_symmetry, evaluate, prepare, random_crystal

ELEMENTS = (8, 12, 22)
TINY: dict[str, Any] = {
    "cutoff": 4.0, "max_neighbors": None, "num_layers": 2, "lmax": 2, "mmax": 1, "channels": 8, "heads": 2, "attention_hidden": 6,
    "alpha_channels": 4, "value_channels": 3, "ffn_hidden": 7, "edge_channels": 5, "num_elements": 24,
}  # fmt: skip
GATE = {"activation": "gate", "grid_mlp": False}


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    """The benchmark, imported."""
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "parity.py"
    spec = importlib.util.spec_from_file_location("matfound_benchmarks_parity", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small(*heads: str, datasets: tuple[str, ...] = ("a",), **arguments: Any) -> Potential:
    """An untrained model whose l > 0 features are not negligible."""
    torch.manual_seed(0)
    made: dict[str, Head] = {"energy": EquiformerV2Energy(2.0), "forces": EquiformerV2Forces(), "stress": EquiformerV2Stress()}
    potential = Potential(EquiformerV2(**{**TINY, **arguments}), {name: made[name] for name in heads or ("energy", "forces")}, datasets)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    references = torch.full((len(datasets), 119), torch.nan, dtype=torch.float64)
    references[:, [1, 6, *ELEMENTS]] = torch.tensor([-13.6, -1029.0, -2041.0, -5.0, -7.0], dtype=torch.float64)
    ones = torch.ones(len(datasets), dtype=torch.float64)
    rms = {"energy": ones, "forces": 2 * ones, "stress": 0.1 * ones}
    potential.fit_scales(Statistics(list(datasets), references, rms, {}, {"main": 20.0}))
    return potential


@pytest.mark.parametrize("model", ["eqv2_l2m1", "eqv2_l3m3_gate_share", "eqv2_l4m2", "eqv2_l6m3_s2act", "eqv2_hydra_efs_l4m2"])
def test_parity(shared_data, parity, model):
    rows = list(parity.equiformer(shared_data / "golden" / model, {}))
    assert len(rows) > 20
    assert not [row for row in rows if not row.ok]


VARIANTS = {
    "gate": GATE,
    "gate, shared": {**GATE, "shared_embedding": True, "shared_radial": True, "mmax": 2, "norm": "rms_norm_sh"},
    "separable": {"lmax": 1, "grid": 40, "grid_mlp": False, "norm": "layer_norm"},
    "network on the grid": {"lmax": 1, "grid": 40},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_conformance(variant):
    crystal = random_crystal(0, 5, ELEMENTS)
    molecule = random_crystal(3, 4, ELEMENTS, pbc=False)
    molecule.cell[:] = 0
    potential = small(**VARIANTS[variant])
    assert not potential.conservative
    check_model(potential, [crystal, molecule])


def test_mirror_images_and_the_cutoff_are_not_promised():
    potential = small(**GATE).double().eval()
    assert potential.backbone.symmetry == "SE3"
    potential.backbone.symmetry = "E3"
    with pytest.raises(AssertionError, match="reflection"):
        check_symmetry(potential, random_crystal(0, 5, ELEMENTS))
    pairs = [ase.Atoms("O2", [[0, 0, 0], [r, 0, 0]]) for r in (4.0 - 1e-9, 4.0 + 1e-9)]
    energies = [float(evaluate(potential, pair)["energy"]) for pair in pairs]
    assert abs(energies[0] - energies[1]) > 1e-6


def test_a_gradient_of_its_energy_is_right():
    """Nobody publishes such a V2, but the generic head must not be wrong on it: frames are differentiated through."""
    torch.manual_seed(0)
    potential = Potential(EquiformerV2(**TINY, **GATE), {"energy": EnergyHead((8,))}).double().eval()
    with torch.no_grad():
        potential.heads["energy"].table.reference[:, list(ELEMENTS)] = 0.0
    assert potential.backbone.differentiated
    # No distance near the cutoff, where the energy jumps; the first bond along the polar axis.
    molecule = ase.Atoms("OMgTiO", [[0, 0, 0], [0, 1.9, 0], [1.4, 0.8, 0.9], [-0.9, 0.3, 1.2]])
    # The 600 Gaussians are 0.013 Å wide.
    check_gradients(potential, molecule, step=3e-5, components=12)


def test_direct_heads_need_no_gradient():
    potential = small()
    assert not potential.backbone.differentiated
    features = potential.backbone(collate([prepare(potential, random_crystal(0, 3, ELEMENTS))]))
    assert not features.vectors["main"].requires_grad


def test_outputs_do_not_depend_on_the_gauge():
    potential = small(grid=(26, 24), attention_grid=(10, 24)).double().eval()
    crystal = random_crystal(0, 4, ELEMENTS)
    reference = evaluate(potential, crystal)
    generator = torch.Generator().manual_seed(0)
    potential.backbone.frames = lambda v: edge_frames(v, 6.3 * torch.rand(len(v), generator=generator, dtype=torch.float64))
    for _ in range(2):
        found = evaluate(potential, crystal)
        for name, value in reference.items():
            assert torch.allclose(found[name], value, rtol=0, atol=1e-7 * float(value.abs().max()))


def test_stress_head():
    """Symmetric, traceless apart from its isotropic part, and not equivariant, as its docstring says."""
    potential = small("energy", "stress", "forces", **GATE).double().eval()
    crystal = random_crystal(0, 4, ELEMENTS)
    check_outputs(potential, crystal)
    molecule = random_crystal(3, 4, ELEMENTS, pbc=False)
    molecule.cell[:] = 0
    check_outputs(potential, molecule)
    stress = evaluate(potential, crystal)["stress"][0]
    assert torch.equal(stress, stress.T)
    batch = collate([prepare(potential, crystal)])
    isotropic, anisotropic = potential.heads["stress"].parts(potential.backbone(batch), batch)
    scale = 0.1 * 1.5**0.5
    assert torch.allclose(stress.trace(), scale * 3**0.5 * isotropic[0, 0])
    assert torch.allclose(stress[0, 2], scale * anisotropic[0, 0] / 2**0.5)
    assert torch.allclose(stress[2, 2] - stress[0, 0], scale * 2**0.5 * anisotropic[0, 4])
    assert torch.allclose((stress**2).sum(), scale**2 * (isotropic**2 + (anisotropic**2).sum()))
    with pytest.raises(AssertionError, match="rotation changes 'stress'"):
        check_symmetry(potential, crystal)


def test_levels_of_theory_have_outputs_of_their_own():
    potential = small("energy", "forces", "stress", datasets=("a", "b"), **GATE).eval()
    samples = [prepare(potential, random_crystal(0, 3, ELEMENTS)) for _ in range(2)]
    samples[1].dataset[:] = 1
    out = potential(collate(samples))
    assert out["energy"][0] != out["energy"][1]
    assert not torch.allclose(out["forces"][:3], out["forces"][3:])
    assert not torch.allclose(out["stress"][0], out["stress"][1])


def test_a_new_level_of_theory_starts_as_its_parent():
    potential = small("energy", "forces", "stress", **GATE).eval()
    grown = extend(potential, "b")
    samples = [prepare(potential, random_crystal(0, 3, ELEMENTS)) for _ in range(2)]
    samples[1].dataset[:] = 1
    found, expected = grown(collate(samples)), potential(collate(samples[:1]))
    for name in ("energy", "forces", "stress"):
        both = found[name].chunk(2)
        assert torch.allclose(both[0], expected[name], atol=1e-6)
        assert torch.allclose(both[1], expected[name], atol=1e-6)


@pytest.mark.parametrize("activation", [GATE, {"grid_mlp": True}, {"grid_mlp": False}])
def test_energy_by_the_short_way(activation):
    """In training the whole feed-forward network runs, in inference the part that the energy needs."""
    potential = small("energy", **activation).double()
    batch = collate([prepare(potential, random_crystal(0, 3, ELEMENTS))])
    whole = potential.train()(batch)["energies"]
    short = potential.eval()(batch)["energies"]
    assert torch.allclose(whole, short, rtol=1e-13)
    potential.train()(batch)["energy"].sum().backward()
    assert all(parameter.grad is not None for parameter in potential.parameters())


def test_memory_can_be_saved_in_training():
    batch = collate([prepare(small(**GATE), random_crystal(0, 4, ELEMENTS)) for _ in range(2)])
    gradients = []
    for arguments in ({}, {"checkpoint_blocks": True}):
        potential = small(**GATE, alpha_drop=0.3, drop_path=0.3, **arguments).train()
        torch.manual_seed(1)
        out = potential(batch)
        (out["energy"].sum() + out["forces"].square().sum()).backward()
        gradients.append([parameter.grad for parameter in potential.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()) + 1e-12)


def test_bfloat16_training_stays_finite():
    potential = small("energy", "forces", "stress").train()
    batch = collate([prepare(potential, random_crystal(n, 4, ELEMENTS)) for n in range(2)])
    exact = potential(batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = potential(batch)
        loss = out["energy"].square().mean() + out["forces"].square().mean() + out["stress"].square().mean()
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in potential.parameters())
    difference = (out["forces"] - exact["forces"]).detach().abs().max()
    assert difference < 0.1 * exact["forces"].detach().abs().max()


@pytest.mark.parametrize(
    ("arguments", "least"),
    [
        ({"grid": None}, 10),
        ({"grid": (6, 7), "attention_grid": (6, 3)}, 10),
        ({"grid": 8}, 10),
        ({"lmax": 4, "mmax": 4, "attention_grid": 12}, 14),
        ({"lmax": 6, "mmax": 6}, 20),
    ],
)
def test_coarse_grids_are_refused(arguments, least):
    with pytest.raises(InputError, match=f"grid: {least}"):
        EquiformerV2(**{**TINY, **arguments})
    sizes = {key: arguments[key] for key in ("lmax", "mmax") if key in arguments}
    assert smallest_grid(SO2Layout(**{"lmax": 2, "mmax": 1, **sizes})) == least
    EquiformerV2(**{**TINY, **sizes}, grid=least)


def test_a_coarse_grid_is_loaded_with_a_warning(tmp_path):
    with pytest.warns(GridWarning, match=r"up to 12.5% of the largest"):
        potential = small(grid=(6, 7), attention_grid=(6, 3), grid_error=0.125)
    checkpoint.save(potential, tmp_path / "model")
    with pytest.warns(GridWarning, match=r"up to 12.5% of the largest"):
        loaded = checkpoint.load(tmp_path / "model")
    crystal = random_crystal(0, 4, ELEMENTS)
    assert torch.allclose(evaluate(loaded, crystal)["forces"], evaluate(potential.eval(), crystal)["forces"], atol=1e-6)


def test_other_mistakes():
    with pytest.raises(InputError, match="'gate' without grid_mlp"):
        EquiformerV2(**TINY, activation="gate")
    with pytest.raises(InputError, match="mmax <= lmax"):
        EquiformerV2(**{**TINY, "mmax": 3})
    from matfound.models.nequip import NequIP

    with pytest.raises(InputError, match="works on EquiformerV2's features, not on NequIP's"):
        Potential(NequIP(irreps="2x0e", num_layers=1), {"energy": EquiformerV2Energy()})
