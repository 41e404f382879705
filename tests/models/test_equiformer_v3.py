"""EquiformerV3: fixtures of the official code, conformance, gradients in every direction, gauges, denoising, options."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.build import bulk

from matfound import catalog
from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs
from matfound.models import checkpoint
from matfound.models.base import Potential
from matfound.models.convert import fairchem
from matfound.models.convert.equiformer_v3 import build
from matfound.models.equiformer_v3 import EquiformerV3, smallest_grids
from matfound.models.equiformer_v3_heads import (
    EquiformerV3Energy,
    EquiformerV3Forces,
    EquiformerV3Noise,
    EquiformerV3Stress,
    gradient_stage,
)
from matfound.models.extend import extend
from matfound.models.nequip import NequIP
from matfound.nn.heads import GraphHead
from matfound.nn.so3.grid import GridWarning
from matfound.nn.so3.rotation import edge_frames
from matfound.structures.atomic_data import AtomicData, collate
from matfound.testing import check_continuity, check_gradients, check_model, evaluate, prepare, random_crystal, rotate

SMALL: dict[str, Any] = {
    "cutoff": 3.6, "max_neighbors": None, "num_layers": 2, "lmax": 2, "mmax": 1, "channels": 8, "heads": 2, "attention_hidden": 4,
    "alpha_channels": 4, "value_channels": 2, "ffn_hidden": 12, "edge_channels": 6, "num_basis": 8, "num_elements": 30,
    "attention_grid": (8, 4), "ffn_grid": (8, 7), "avg_neighbors": 5.0,
}  # fmt: skip


def potential(kind: str = "gradient", datasets: tuple[str, ...] = ("a",), **options: Any) -> Potential:
    """A small model with weights that make every degree count; `kind` is "gradient" or "direct"."""
    torch.manual_seed(0)
    arguments = SMALL | options
    heads: dict[str, Any] = {"energy": EquiformerV3Energy(kind == "gradient", kind == "gradient")}
    if kind == "direct":
        heads |= {"forces": EquiformerV3Forces(), "stress": EquiformerV3Stress()}
    if arguments.get("force_embedding"):
        heads["noise"] = EquiformerV3Noise()
    model = Potential(EquiformerV3(**arguments), heads, datasets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if "edge_degree.network.layers.6" in name:
                parameter.mul_(5)
    model.heads["energy"].table.reference.fill_(-1.5)
    return model.eval()


def molecule(numbers: list[int], positions: list[list[float]]) -> ase.Atoms:
    return ase.Atoms(numbers=numbers, positions=positions)


@pytest.mark.parametrize("kind", ["gradient", "direct"])
def test_conformance(kind: str) -> None:
    free = random_crystal(3, 4, (1, 6, 8), pbc=False)
    free.cell[:] = 0
    check_model(potential(kind), [random_crystal(2, 2, (8, 22), pbc=kind == "gradient" or (True, True, False)), free])


def test_mirrored_structures_are_not_mirrored() -> None:
    """SE3 is what it has, and no more: the SO(2) convolutions mix +m with -m."""
    model = potential().double()
    atoms = molecule([8, 6, 22, 1], [[0, 0, 0], [1.2, 0.1, 0.2], [0.3, 1.5, -0.2], [-0.2, 0.4, 1.1]])
    mirrored = atoms.copy()
    mirrored.positions[:, 0] *= -1
    energies = [float(evaluate(model, structure)["energy"]) for structure in (atoms, mirrored)]
    assert abs(energies[0] - energies[1]) > 1e-9


MODELS = ["eqv3_mptrj_grad_l4", "eqv3_oc20_direct_l6", "eqv3_mptrj_dens_l4"]


def converted(folder: Path) -> tuple[Potential, dict[str, Any]]:
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = torch.load(folder / "state_dict.pt", weights_only=True)
    content = {"config": {"model": {"name": described["registry_name"], **described["config"]}}, "state_dict": state}
    return fairchem.convert(content).eval(), described


def case(folder: Path, model: Potential) -> tuple[AtomicData, dict[str, Any]]:
    content = torch.load(folder / "data.pt", weights_only=True)
    inputs = content["inputs"]
    atoms = AtomicData(numbers=inputs["atomic_numbers"], pos=inputs["pos"].double(), cell=inputs["cell"].double(), pbc=inputs["pbc"])
    return collate([add_graphs(atoms, model.graphs)]), content


@pytest.mark.parametrize("name", MODELS)
def test_fixtures(name: str, shared_data: Path) -> None:
    model, described = converted(shared_data / "golden" / name)
    assert sum(p.numel() for p in model.parameters()) == described["num_params"]
    batch, content = case(shared_data / "golden" / f"{name}_nacl", model)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        out = model.to(dtype)(batch)
        for key, reference in content["outputs_f64"].items():
            assert (out[key].reshape(reference.shape) - reference).abs().max() < tolerance * max(1.0, float(reference.abs().max()))


#: The options as the published configurations write them: defaults are left out, training options are there.
PUBLISHED: dict[str, Any] = {
    "use_pbc": True, "use_pbc_single": True, "otf_graph": True, "regress_forces": True, "regress_stress": True, "direct_prediction": False,
    "max_neighbors": 300, "max_radius": 6.0, "num_radial_basis": 64, "max_num_elements": 128, "num_layers": 7, "num_channels": 128,
    "attn_hidden_channels": 32, "num_heads": 8, "attn_alpha_channels": 64, "attn_value_channels": 16, "ffn_hidden_channels": 512,
    "norm_type": "merge_layer_norm", "lmax": 4, "mmax": 2, "attn_grid_resolution_list": [14, 8], "ffn_grid_resolution_list": [14, 14],
    "edge_channels": 128, "use_atom_edge_embedding": True, "use_envelope": True, "attn_activation": "sep-merge_gates2_swiglu",
    "use_attn_renorm": True, "use_add_merge": False, "use_rad_l_parametrization": True, "softcap": None,
    "ffn_activation": "sep-merge_gates2_swiglu", "use_grid_mlp": True, "alpha_drop": 0.0, "attn_mask_rate": 0.0, "attn_weights_drop": 0.0,
    "value_drop": 0.0, "drop_path_rate": 0.0, "proj_drop": 0.0, "ffn_drop": 0.0, "gradient_checkpointing_block_list": [0] * 7,
    "enforce_max_neighbors_strictly": True, "avg_num_nodes": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("card", "changes", "denoising"),
    [
        ("equiformer-v3-oam", {"attn_eps": 1e-8, "use_gate_force_head": False, "use_head_reg": False}, False),
        ("equiformer-v3-mptrj", {"num_radial_basis": 10, "use_gate_force_head": True}, False),
        ("equiformer-v3-omat24-direct", {"direct_prediction": True, "attn_weights_drop": 0.1, "drop_path_rate": 0.05}, True),
    ],
)
def test_published_configurations_are_those_of_the_cards(card: str, changes: dict[str, Any], denoising: bool) -> None:
    with torch.device("meta"):
        backbone, heads = build(PUBLISHED | changes, denoising)
    expected = catalog.model(card)
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in backbone.config["init_args"].items()}
    assert expected.init_args.items() <= arguments.items()
    assert set(heads) == set(expected.heads)
    for name, head in heads.items():
        assert type(head).__name__ == expected.heads[name].class_path.rpartition(".")[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "sep_layer_norm"}, "norm_type = 'sep_layer_norm'.*expected merge_layer_norm"),
        ({"num_lyers": 3}, "did you mean 'num_layers'"),
        ({"direct_prediction": True, "use_gate_force_head": False}, "without gates"),
    ],
)
def test_options_of_the_original_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(PUBLISHED | changes, False)
    with pytest.raises(InputError, match="lacks lmax"):
        build({name: value for name, value in PUBLISHED.items() if name != "lmax"}, False)


def test_denoising_fixture(shared_data: Path) -> None:
    """In float32: the fixture's float64 outputs belong to another noise mask than the one that it stores."""
    model, _ = converted(shared_data / "golden" / "eqv3_mptrj_dens_l4")
    batch, content = case(shared_data / "golden" / "eqv3_mptrj_dens_l4_ethanol", model)
    dens = content["dens"]
    batch.given_forces = torch.where(dens["noise_mask"][:, None], dens["forces"].double(), torch.nan)
    out = model(batch)
    forces = torch.where(dens["noise_mask"][:, None], out["noise"] / 0.025, out["forces"])
    assert (forces - dens["outputs_f32"]["forces"]).abs().max() < 3e-6
    assert (out["energy"] - dens["outputs_f32"]["energy"]).abs().max() < 3e-6


def test_parameter_gradients_of_the_original(shared_data: Path) -> None:
    """Norms of the gradient of Σ E + Σ F² + Σ stress², which differentiates twice."""
    folder = shared_data / "golden" / "eqv3_mptrj_grad_l4"
    model, _ = converted(folder)
    batch, _ = case(shared_data / "golden" / "eqv3_mptrj_grad_l4_nacl", model)
    out = model.double().requires_grad_(True).train()(batch)
    (out["energy"].sum() + out["forces"].square().sum() + out["stress"].square().sum()).backward()
    norms = json.loads((folder / "grad_norms_nacl.json").read_text(encoding="utf-8"))["grad_l2_norm"]
    network = model.backbone.blocks[0]
    for name, parameter in {
        "blocks.0.ga.so2_linear_1.so2_m_linear.1.fc.weight": network.attention.linear_1.weights[2],
        "blocks.0.ga.rad_func.net.0.weight": network.attention.radial.network.layers[0].weight,
        "blocks.0.norm_1.affine_weight": network.norm_1.weight,
        "blocks.0.ffn.grid_mlp.grid_linear_1.weight": network.feed_forward.grid_1.weight,
        "sphere_embedding.weight": model.backbone.embedding,
    }.items():
        assert float(parameter.grad.norm()) == pytest.approx(norms[name], rel=1e-9)


#: Bonds along every axis, near both poles, and on both sides of the equator, where the frames switch.
DIRECTIONS = [
    *([float(s * (k == axis)) for k in range(3)] for axis in range(3) for s in (1, -1)),
    *([s * angle, pole, 2 * angle] for angle in (1e-9, 1e-6, 1e-3) for pole in (1.0, -1.0) for s in (1, -1)),
    [0.6, 1e-12, 0.8],
    [0.6, -1e-12, 0.8],
]


def bonded(direction: list[float]) -> ase.Atoms:
    """A molecule with one bond along a direction, and nothing symmetric about it."""
    unit = np.array(direction) / np.linalg.norm(direction)
    return molecule([8, 6, 1], [[0, 0, 0], (1.3 * unit).tolist(), [0.7, -1.1, 1.4]])


@pytest.mark.parametrize("direction", DIRECTIONS[1::4])
def test_forces_are_gradients_in_every_direction(direction: list[float]) -> None:
    check_gradients(potential(num_layers=1).double(), bonded(direction), components=4)


def test_stress_is_the_gradient_in_an_aligned_crystal() -> None:
    """Edges lie on all axes, and those along y stay there when strained."""
    rocksalt = bulk("MgO", "rocksalt", a=4.2)
    rocksalt.positions[0] += [0.0, 0.03, 0.0]
    check_gradients(potential(num_layers=1).double(), rocksalt, components=3)


def test_special_directions_are_not_special() -> None:
    """Turning a structure off the axes, the poles and the equator turns its forces, also where the original code does not."""
    model = potential().double()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turn = turn * torch.linalg.det(turn)
    rocksalt = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    rocksalt.positions[0] += [0.0, 0.03, 0.0]
    structures = [bonded(direction) for direction in DIRECTIONS] + [rocksalt]
    turned = []
    for atoms in structures:
        other = atoms.copy()
        other.positions, other.cell[:] = atoms.positions @ turn.numpy().T, atoms.cell.array @ turn.numpy().T
        turned.append(other)
    before, after = evaluate(model, structures), evaluate(model, turned)
    for name in ("energy", "forces", "stress"):
        assert (after[name] - rotate(before[name], name, turn)).abs().nan_to_num().max() < 1e-12, name


def test_outputs_do_not_depend_on_the_gauge() -> None:
    for kind, force_embedding in (("gradient", False), ("direct", True)):
        model = potential(kind, force_embedding=force_embedding).double()
        atoms = random_crystal(1, 2, (8, 22))
        reference = evaluate(model, atoms)
        model.backbone.frames = lambda vectors: edge_frames(vectors, 7 * torch.rand(len(vectors)))
        for name, value in evaluate(model, atoms).items():
            assert (value - reference[name]).abs().max() < 1e-12, name


def test_hessian_vector_products() -> None:
    model = potential(num_layers=1).double().train()
    atoms = bonded(DIRECTIONS[2])
    data = prepare(model, atoms)
    direction = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def forces(shift: float) -> torch.Tensor:
        moved = atoms.copy()
        moved.positions += shift * direction.numpy()
        return evaluate(model, moved)["forces"]

    batch = collate([data])
    features = model.backbone(batch)
    out = model.heads["energy"](features, batch)
    vectors = features.vectors["main"]
    product = torch.zeros(3, 3, dtype=torch.float64)
    (along,) = torch.autograd.grad((out["forces"] * direction).sum(), vectors)
    source, target = batch.edge_index
    product = product.index_add(0, source, along.detach()).index_add(0, target, -along.detach())
    h = 1e-4
    expected = ((8 * (forces(h) - forces(-h)) - (forces(2 * h) - forces(-2 * h))) / (12 * h)).detach()
    assert expected.abs().max() > 1e-3
    assert (product - expected).abs().max() < 1e-7 * max(1.0, float(expected.abs().max()))


def test_energy_is_smooth_at_the_cutoff() -> None:
    model = potential().double()
    check_continuity(model)
    cutoff = model.graphs["main"].cutoff

    def at(r: float) -> tuple[float, float]:
        out = evaluate(model, molecule([8, 22, 6], [[0, 0, 0], [0, r, 0], [1.2, 0.1, 0.4]]))
        return float(out["energy"]), float(out["forces"][1, 1])

    for h in (1e-2, 1e-3):
        (e0, f0), (e1, f1) = at(cutoff - h), at(cutoff + h)
        assert abs(e1 - e0 + h * (f0 + f1)) < 3 * h**3
        assert abs(f1 - f0) < 3 * h


def test_structures_without_edges() -> None:
    for kind in ("gradient", "direct"):
        model = potential(kind)
        lonely = [molecule([8], [[0, 0, 0]]), molecule([8, 8], [[0, 0, 0], [9, 0, 0]])]
        out = evaluate(model, lonely)
        assert out["energy"][1] == pytest.approx(2 * float(out["energy"][0]))
        assert not out["forces"].any()


def loss_gradients(model: Potential, batch: AtomicData) -> dict[str, torch.Tensor]:
    """Parameter gradients of a loss on energy and forces."""
    torch.manual_seed(0)
    model.train().zero_grad()
    out = model(batch)
    (out["energy"].square().sum() + out["forces"].square().sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["gradient", "direct"])
def test_checkpointing_gives_the_same_gradients(kind: str) -> None:
    options = {"drop_path": 0.3, "attention_dropout": 0.1}
    plain, thrifty = potential(kind, **options).double(), potential(kind, checkpoint_blocks=True, **options).double()
    batch = collate([prepare(plain, random_crystal(seed, 3, (8, 22))) for seed in range(3)])
    expected, found = loss_gradients(plain, batch), loss_gradients(thrifty, batch)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("kind", ["gradient", "direct"])
def test_rows_are_taken_by_gathers(kind: str) -> None:
    """The derivative of x[index] sorts the index each time; that of a `Gather` is a sum over segments that are known."""
    model = potential(kind).train()
    out = model(collate([prepare(model, random_crystal(0, 3, (1, 6, 8)))]))
    nodes, found = [(out["energy"].sum() + out["forces"].sum()).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [following for following, _ in node.next_functions]
    names = {node.name() for node in found}
    assert "_TakeBackward" in names
    assert "IndexBackward0" not in names


def test_training_drops_and_evaluation_does_not() -> None:
    model = potential("direct", drop_path=0.5, attention_dropout=0.5)
    atoms = [random_crystal(seed, 3, (8, 22)) for seed in range(2)]
    with torch.no_grad():
        assert torch.equal(evaluate(model, atoms)["energy"], evaluate(model, atoms)["energy"])
        model.train()
        assert not torch.equal(evaluate(model, atoms)["energy"], evaluate(model, atoms)["energy"])


@pytest.mark.parametrize("kind", ["gradient", "direct"])
def test_bfloat16_is_finite(kind: str) -> None:
    model = potential(kind)
    batch = collate([prepare(model, random_crystal(0, 4, (8, 22)))])
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch)
        gradients = loss_gradients(model, batch)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name, value in exact.items():
        assert (rounded[name] - value).abs().max() < 0.1 * max(1.0, float(value.abs().max())), name


def test_direct_models_do_not_differentiate() -> None:
    model = potential("direct")
    assert not model.conservative
    features = model.backbone(collate([prepare(model, random_crystal(0, 3, (8, 22)))]))
    assert not features.vectors["main"].requires_grad
    assert not features.edges.rotation.requires_grad
    assert features.equivariant.shape == (3, 9 * SMALL["channels"])


def test_only_given_forces_count() -> None:
    model = potential("direct", force_embedding=True).double()
    atoms = [random_crystal(0, 3, (8, 22)), random_crystal(1, 3, (8, 22))]
    batch = collate([prepare(model, structure) for structure in atoms])
    reference = model(batch)
    batch.given_forces = torch.full((6, 3), torch.nan, dtype=torch.float64)
    assert torch.equal(model(batch)["energy"], reference["energy"])
    batch.given_forces[1] = torch.tensor([0.1, 2.0, -0.3])
    out = model(batch)
    assert out["energy"][0] != reference["energy"][0]
    assert out["energy"][1] == reference["energy"][1]
    batch.given_forces[1] = 0.0
    assert model(batch)["energy"].isfinite().all()


def test_a_checkpoint_gives_the_same(tmp_path: Path) -> None:
    model = potential("direct", force_embedding=True, datasets=("a", "b"))
    atoms = random_crystal(0, 4, (8, 22))
    loaded = checkpoint.load(checkpoint.save(model, tmp_path / "model"))
    for name, value in evaluate(model, atoms).items():
        assert torch.allclose(evaluate(loaded, atoms)[name], value, rtol=1e-5, atol=1e-7), name
    wider = extend(model, "c", "b")
    batch = collate([prepare(model, atoms)])
    batch.dataset[:] = 1
    expected = model(batch)
    batch.dataset[:] = 2
    for name, value in wider(batch).items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-7), name


def test_the_gradient_stage_starts_from_the_direct_one() -> None:
    direct = potential("direct", force_embedding=True, drop_path=0.1, attention_dropout=0.1)
    second = gradient_stage(direct, ["mine"])
    assert second.conservative
    assert second.datasets == ["mine"]
    assert second.backbone.config["init_args"]["drop_path"] == 0.0
    batch = collate([prepare(direct, random_crystal(0, 3, (8, 22)))])
    assert torch.allclose(second.eval().backbone(batch).scalars, direct.backbone(batch).scalars, atol=1e-6)
    assert all(parameter.requires_grad for parameter in second.parameters())
    assert not any("force_embedding" in name for name, _ in second.named_parameters())
    second.heads["energy"].table.reference.fill_(0.0)
    check_gradients(second.double(), random_crystal(0, 3, (8, 22)), components=3)
    with pytest.raises(InputError, match="starts from EquiformerV3"):
        gradient_stage(Potential(NequIP(irreps="4x0e", num_layers=1), {"gap": GraphHead("gap")}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EquiformerV3(**SMALL | {"attention_grid": (8, 3)}), "attention_grid: \\[8, 4\\]"),
        (lambda: EquiformerV3(**SMALL | {"ffn_grid": (6, 7)}), "ffn_grid: \\[8, 7\\]"),
        (lambda: EquiformerV3(**SMALL | {"mmax": 3}), "mmax"),
        (lambda: Potential(EquiformerV3(**SMALL), {"noise": EquiformerV3Noise()}), "force_embedding: true"),
        (lambda: Potential(EquiformerV3(**SMALL | {"lmax": 1}), {"stress": EquiformerV3Stress()}), "needs l = 2"),
        (lambda: Potential(NequIP(irreps="4x0e", num_layers=1), {"forces": EquiformerV3Forces()}), "not on NequIP's"),
    ],
)
def test_what_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_coarse_grids_warn_with_their_error() -> None:
    with pytest.warns(GridWarning, match="changes its forces by up to 3.0%"):
        EquiformerV3(**SMALL | {"ffn_grid": (6, 6)}, grid_error=0.03)


@pytest.mark.parametrize(("lmax", "mmax", "expected"), [(4, 2, (7, (14, 13))), (6, 2, (7, (20, 19))), (2, 1, (4, (8, 7)))])
def test_smallest_grids(lmax: int, mmax: int, expected: tuple[int, tuple[int, int]]) -> None:
    assert smallest_grids(lmax, mmax) == expected
