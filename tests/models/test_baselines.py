"""SchNet, DimeNet++, PaiNN and CGCNN: conformance, parity with fairchem-core 1.10, conversion, and what can be worked out by hand."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import ase
import pytest
import torch
from scipy.special import sph_harm_y, spherical_jn
from torch_geometric.nn.models.dimenet import SphericalBasisLayer

from matfound import unpickle
from matfound.errors import InputError
from matfound.models import checkpoint as saved
from matfound.models.base import Backbone, Head, Potential, Statistics
from matfound.models.cgcnn import CGCNN, CGCNNEnergy
from matfound.models.convert import fairchem
from matfound.models.dimenetplusplus import DimeNetPlusPlus, SphericalBasis, triplets
from matfound.models.extend import extend
from matfound.models.painn import PaiNN, PaiNNForces, symmetrized
from matfound.models.perceptron_heads import PerceptronEnergy
from matfound.models.schnet import SchNet
from matfound.structures.atomic_data import collate
from matfound.testing import check_batching, check_model, check_op, check_outputs, check_symmetry, evaluate, prepare, random_crystal

ELEMENTS = (8, 12, 22)
SCHNET: dict[str, Any] = {"cutoff": 4.0, "channels": 6, "num_filters": 5, "num_layers": 2, "num_basis": 7}
DIMENET: dict[str, Any] = {
    "cutoff": 3.5, "channels": 5, "num_layers": 1, "interaction_channels": 4, "basis_channels": 3, "output_channels": 6,
    "num_spherical": 3, "num_radial": 2, "num_output_layers": 1,
}  # fmt: skip
PAINN: dict[str, Any] = {"cutoff": 4.0, "max_neighbors": None, "channels": 6, "num_layers": 2, "num_basis": 7, "num_elements": 30}
CGC: dict[str, Any] = {"cutoff": 4.0, "max_neighbors": None, "channels": 5, "num_layers": 2, "num_basis": 7}


def made(backbone: Backbone, **heads: Head) -> Potential:
    """An untrained model of two levels of theory, with references."""
    torch.manual_seed(0)
    potential = Potential(backbone, heads, ("a", "b"), {"periodic": "a", "molecular": "a"})
    with torch.no_grad():
        for name, parameter in potential.named_parameters():
            if not name.endswith("freq"):  # sines that nearly vanish at the cutoff hide its order
                parameter.add_(0.1 * torch.randn_like(parameter))
    references = torch.full((2, 119), torch.nan, dtype=torch.float64)
    references[:, list(ELEMENTS)] = torch.tensor([-13.0, -20.0, -5.0], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    potential.fit_scales(Statistics(["a", "b"], references, {"forces": 2 * ones}, {}, {"main": 20.0}))
    return potential


def model(name: str) -> Potential:
    """A small one of each kind."""
    torch.manual_seed(1)
    if name == "schnet":
        return made(SchNet(**SCHNET), energy=PerceptronEnergy([4], "shifted_softplus"))
    if name == "dimenetplusplus":
        return made(DimeNetPlusPlus(**DIMENET), energy=PerceptronEnergy([], bias=False))
    if name == "painn":
        return made(PaiNN(**PAINN), energy=PerceptronEnergy([4], "scaled_silu", forces=False, stress=False), forces=PaiNNForces())
    if name == "painn, gradient":
        return made(PaiNN(**PAINN), energy=PerceptronEnergy([4], "scaled_silu"))
    return made(CGCNN(**CGC), energy=CGCNNEnergy([4]))


NAMES = ["schnet", "dimenetplusplus", "painn", "painn, gradient", "cgcnn"]


def structures() -> list[ase.Atoms]:
    """A crystal, a cell smaller than the cutoff, a molecule."""
    molecule = random_crystal(3, 4, ELEMENTS, pbc=False)
    molecule.cell[:] = 0
    return [random_crystal(0, 4, ELEMENTS), random_crystal(1, 2, ELEMENTS[:2]), molecule]


@pytest.mark.parametrize("name", NAMES)
def test_conformance(name: str) -> None:
    check_model(model(name), structures())


@pytest.mark.parametrize("name", NAMES)
def test_parameter_gradients_of_a_force_loss(name: str) -> None:
    """Every parameter that is trained takes part, and its gradient is right."""
    potential = model(name).double().train()
    batch = collate([prepare(potential, atoms) for atoms in structures()[1:]])

    def loss() -> torch.Tensor:
        found = potential(batch.clone())
        return found["energy"].sum() / 50 + found["forces"].square().sum()

    loss().backward()
    trained = {n: p for n, p in potential.named_parameters() if p.requires_grad}
    unused = [n for n, p in trained.items() if p.grad is None]
    assert not unused
    parameter = trained["backbone.embedding.emb.weight" if name == "dimenetplusplus" else "backbone.embedding.weight"]
    row = 8 - (name.startswith("painn"))
    h, values = 1e-5, []
    assert parameter.grad is not None
    for sign in (1, -1):
        with torch.no_grad():
            parameter[row, 1] += sign * h
        values.append(float(loss().detach()))
        with torch.no_grad():
            parameter[row, 1] -= sign * h
    assert float(parameter.grad[row, 1]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_keeps_everything(name: str, tmp_path: Path) -> None:
    potential = model(name).eval()
    again = saved.load(saved.save(potential, tmp_path / "model"))
    before, after = (evaluate(found, structures()) for found in (potential, again))
    assert all(torch.equal(before[key].nan_to_num(), after[key].nan_to_num()) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_level_of_theory_starts_from_its_parent(name: str) -> None:
    old = model(name).double().eval()
    new = extend(old, "mine", parent="a")
    crystal = structures()[0]
    data = [prepare(old, crystal) for _ in range(2)]
    data[1].dataset = torch.tensor([2])
    before, after = old(collate(data[:1])), new(collate(data[1:]))
    for key, value in before.items():
        assert torch.allclose(after[key], value, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------- parity


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


@pytest.mark.parametrize("name", ["schnet", "dimenetplusplus", "painn"])
def test_parity(shared_data: Path, parity: ModuleType, name: str) -> None:
    rows = list(parity.equiformer(shared_data / "golden" / name, {}))
    assert len(rows) == 21
    assert not [row for row in rows if not row.ok]


@pytest.fixture
def checkpoint(shared_data: Path) -> dict[str, Any]:
    """As fairchem's trainer saves it."""
    folder = shared_data / "golden" / "painn"
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state: Any = unpickle.load(folder / "state_dict.pt")
    normalizers = {"target": {"mean": -0.75, "std": 2.9}, "grad_target": {"mean": 0.0, "std": 2.9}}
    return {
        "config": {"model": "painn", "model_attributes": described["config"]},
        "state_dict": {f"module.module.{key}": value for key, value in state.items()},
        "normalizers": normalizers,
    }


def test_normalizers_and_averaged_weights(checkpoint: dict[str, Any]) -> None:
    potential = fairchem.convert(checkpoint, ["oc20"])
    table = potential.heads["energy"].table
    assert (float(table.shift[0]), float(table.scale[0]), float(potential.heads["forces"].table.scale[0])) == pytest.approx(
        (-0.75, 2.9, 2.9)
    )
    # Factors are not trained, and averaged weights leave them out.
    trained = {key: value for key, value in checkpoint["state_dict"].items() if not key.endswith((".offset", ".scale_factor"))}
    checkpoint["ema"] = {"shadow_params": [2 * value for value in trained.values()]}
    averaged = fairchem.convert(checkpoint, ["oc20"])
    assert torch.equal(averaged.backbone.embedding.weight, 2 * potential.backbone.embedding.weight)
    assert torch.equal(averaged.backbone.scales[0], potential.backbone.scales[0])


def test_a_factor_that_was_never_fitted_is_not_applied(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"]["module.module.upd_out_scalar_scale_0.scale_factor"].zero_()
    assert float(fairchem.convert(checkpoint).backbone.scales[0]) == 1.0


def test_what_is_not_known_is_refused(checkpoint: dict[str, Any]) -> None:
    attributes = checkpoint["config"]["model_attributes"]
    for option, value in (("radial", 3), ("rbf", {"name": "bernstein"}), ("envelope", {"name": "exponential"})):
        checkpoint["config"]["model_attributes"] = {**attributes, option: value}
        with pytest.raises(InputError, match=option):
            fairchem.convert(checkpoint)
    checkpoint["config"]["model_attributes"] = attributes
    checkpoint["state_dict"]["more"] = torch.zeros(1)
    with pytest.raises(InputError, match="more"):
        fairchem.convert(checkpoint)


# ---------------------------------------------------------------------------------------------------------------- DimeNet++


def test_triplets_by_hand() -> None:
    """0 - 1 - 2 in a row, and an atom whose two images are neighbours: back and forth is no triplet, on to the next image is one."""
    edges = torch.tensor([[1, 0, 2, 1], [0, 1, 1, 2]])
    inner, outer = triplets(edges, torch.zeros(4, 3), 3)
    found = {(int(edges[0, k]), int(edges[0, j]), int(edges[1, j])) for k, j in zip(inner, outer, strict=True)}
    assert found == {(2, 1, 0), (0, 1, 2)}
    inner, outer = triplets(torch.zeros(2, 2, dtype=torch.int64), torch.tensor([[1.0, 0, 0], [-1, 0, 0]]), 1)
    assert sorted(zip(inner.tolist(), outer.tolist(), strict=True)) == [(0, 0), (1, 1)]
    assert all(len(index) == 0 for index in triplets(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3), 0))


def test_spherical_basis() -> None:
    """Against scipy, PyG's layer, and finite differences, a straight angle included."""
    basis = SphericalBasis(4, 3, 5.0, 5)
    r = torch.tensor([0.9, 2.0, 4.9], dtype=torch.float64)
    cosines = torch.tensor([1.0, -1.0, 0.3, 0.0], dtype=torch.float64)
    inner = torch.tensor([0, 1, 2, 0])
    found = basis(r, cosines, inner).view(4, 4, 3)
    x = (r / 5).numpy()
    for t, k in enumerate(inner.tolist()):
        for l in range(4):
            for n in range(3):
                root, norm = float(basis.roots[l, n]), float(basis.norms[l, n])
                expected = norm * spherical_jn(l, root * x[k]) * sph_harm_y(l, 0, math.acos(cosines[t]), 0.0).real
                expected *= float(basis.envelope(torch.tensor(x[k])))
                assert float(found[t, l, n]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
                assert spherical_jn(l, root) == pytest.approx(0.0, abs=1e-6)
    theirs = SphericalBasisLayer(2, 3, 5.0, 5)
    assert torch.allclose(SphericalBasis(2, 3, 5.0, 5)(r, cosines, inner), theirs(r, torch.acos(cosines), inner), atol=1e-12)
    check_op(lambda lengths, cos: basis(lengths, cos, inner), [r, cosines])


def test_detached_angles_change_the_forces_only() -> None:
    full = model("dimenetplusplus").double().eval()
    part = made(DimeNetPlusPlus(**DIMENET, detach_angles=True), energy=PerceptronEnergy([], bias=False)).double().eval()
    part.load_state_dict(full.state_dict())
    found = [evaluate(potential, structures()[0]) for potential in (full, part)]
    assert torch.equal(found[0]["energy"], found[1]["energy"])
    assert float((found[0]["forces"] - found[1]["forces"]).abs().max()) > 1e-4


# -------------------------------------------------------------------------------------------------------------------- PaiNN


def test_symmetrized_edges() -> None:
    edges = torch.tensor([[1, 0, 2, 0, 0], [0, 1, 1, 0, 0]])
    shift = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, -1], [0, -1, 1]])
    vectors = torch.arange(15, dtype=torch.float64).view(5, 3)
    found, turned = symmetrized(edges, shift, vectors)
    # 2 → 1 has no partner and goes; 0 → 1 and the image at (0, -1, 1) stay, and are mirrored.
    assert found.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert torch.equal(turned, torch.cat([vectors[[1, 4]], -vectors[[1, 4]]]))


def test_painn_with_a_limit_of_neighbours() -> None:
    """As published: turning, mirroring and batching are right; the order of atoms is not promised."""
    few = {**PAINN, "max_neighbors": 5}
    potential = made(PaiNN(**few), energy=PerceptronEnergy([4], "scaled_silu")).double().eval()
    crystal = structures()[0]
    check_outputs(potential, crystal)
    check_batching(potential, structures())
    with pytest.raises(AssertionError, match="permutation"):
        check_symmetry(potential, random_crystal(0, 8, ELEMENTS))
    plain = made(PaiNN(**few, symmetrize=False), energy=PerceptronEnergy([4], "scaled_silu")).double().eval()
    check_symmetry(plain, random_crystal(0, 8, ELEMENTS))


def test_forces_need_their_family() -> None:
    with pytest.raises(InputError, match="PaiNN"):
        Potential(SchNet(**SCHNET), {"forces": PaiNNForces()})


# -------------------------------------------------------------------------------------------------------------------- CGCNN


def test_cgcnn_of_two_atoms_by_hand() -> None:
    """One channel, one layer, weights chosen so that every step of eq. 5 can be followed."""
    backbone = CGCNN(cutoff=4.0, max_neighbors=None, channels=1, num_layers=1, num_basis=2).double()
    potential = Potential(backbone, {"energy": CGCNNEnergy([])}).double().eval()
    layer = backbone.layers[0]
    with torch.no_grad():
        backbone.embedding.weight[8], backbone.embedding.weight[12] = 0.5, -0.25
        layer.lin_f.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
        layer.lin_f.bias.fill_(0.1)
        layer.lin_s.weight.copy_(torch.tensor([[-1.0, 0.5, 0.0, 4.0]]))
        layer.lin_s.bias.fill_(-0.2)
        potential.heads["energy"].network[0].weight.fill_(2.0)
        potential.heads["energy"].network[0].bias.fill_(0.3)
        potential.heads["energy"].table.reference.zero_()
    molecule = ase.Atoms("OMg", [[0, 0, 0], [0, 0, 2.0]])
    # Gaussians at 0 and 4 Å, 4 Å wide: both exp(-2²/(2·4²)) at 2 Å.
    g = math.exp(-0.125)

    def passed(own: float, other: float) -> float:
        gate = 1 / (1 + math.exp(-(own + 2 * other + 3 * g + 0.1)))
        return own + gate * math.log(1 + math.exp(-own + 0.5 * other + 4 * g - 0.2))

    mean = (passed(0.5, -0.25) + passed(-0.25, 0.5)) / 2
    assert float(evaluate(potential, molecule)["energy"]) == pytest.approx(2 * (2 * mean + 0.3), abs=1e-12)
    far = float(evaluate(potential, ase.Atoms("OMg", [[0, 0, 0], [0, 0, 4.5]]))["energy"])
    assert far == pytest.approx(2 * (2 * 0.125 + 0.3), abs=1e-12)


def test_an_energy_that_does_not_grow() -> None:
    """OC20's baseline: twice the structure, the same adsorption energy."""
    potential = made(CGCNN(**CGC), energy=CGCNNEnergy([4], extensive=False)).double().eval()
    potential.heads["energy"].table.reference.zero_()
    crystal = structures()[0]
    once, twice = (float(evaluate(potential, atoms)["energy"]) for atoms in (crystal, crystal.repeat((2, 1, 1))))
    assert once == pytest.approx(twice, abs=1e-10)
    check_outputs(potential, ase.Atoms())
    check_batching(potential, structures())
