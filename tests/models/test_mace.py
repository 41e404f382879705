"""MACE: symmetry, gradients, continuity, its equations with e3nn's own modules, and its energy head."""

from collections.abc import Iterator
from typing import Any

import ase
import pytest
import torch
from e3nn import o3

from matfound.errors import InputError
from matfound.models import checkpoint
from matfound.models.base import Potential, Statistics
from matfound.models.extend import extend
from matfound.models.mace import MACE, MACEEnergyHead, MACELayer
from matfound.nn.activations import SILU_FACTOR
from matfound.nn.heads import GraphHead
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.nn.so3.layout import from_e3nn, to_e3nn
from matfound.ops import backends
from matfound.ops.symmetric_contraction import u_matrix
from matfound.structures.atomic_data import collate
from matfound.testing import check_model, evaluate, prepare, random_crystal

VARIANTS: dict[str, dict[str, Any]] = {
    "medium": {},
    "large": {"irreps": "4x0e+4x1o+4x2e", "first_residual": False},
    "small": {"irreps": "4x0e", "lmax": 2},
    "three layers": {"num_layers": 3, "lmax": 1, "degree": 2},
    "density": {"density": True, "transform": "agnesi", "pair_repulsion": True, "residual": False},
    "one layer": {"num_layers": 1, "trainable_basis": True},
}


def potential(datasets: tuple[str, ...] = ("a",), **arguments: Any) -> Potential:
    torch.manual_seed(0)
    options = {"cutoff": 4.0, "irreps": "4x0e+4x1o", "num_basis": 4, "radial_hidden": (8,), "elements": [1, 6, 8, 12, 22]} | arguments
    heads = {"energy": MACEEnergyHead(options.get("num_layers", 2), (8,)), "gap": GraphHead("gap", (8,))}
    model = Potential(MACE(**options), heads, datasets)
    references = torch.full((len(datasets), 119), torch.nan, dtype=torch.float64)
    references[:, [1, 6, 8, 12, 22]] = torch.tensor([-13.6, -1029.0, -2041.0, -5.0, -7.0], dtype=torch.float64)
    ones = torch.ones(len(datasets), dtype=torch.float64)
    model.fit_scales(Statistics(list(datasets), references, {"energy": ones, "forces": ones}, {}, {"main": 8.0}))
    with torch.no_grad():
        for layer in model.backbone.layers:  # every degree as large as the others
            layer.contraction_weights.normal_()
    return model


def molecule() -> ase.Atoms:
    atoms = random_crystal(3, 4, (1, 6, 8), pbc=False)
    atoms.cell[:] = 0
    return atoms


@pytest.mark.parametrize("variant", VARIANTS)
def test_conformance(variant: str) -> None:
    structures = [random_crystal(1, 2, (8, 22)), molecule()]
    if variant == "medium":
        structures += [random_crystal(0, 4, (8, 12, 22)), random_crystal(2, 3, (12, 22), pbc=(True, True, False))]
    check_model(potential(**VARIANTS[variant]), structures)


@pytest.fixture
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("residual", [True, False])
def test_layer_is_what_the_paper_says(residual: bool) -> None:
    """One layer with e3nn's own modules: eqs. 8-11 of arXiv:2206.07697."""
    torch.manual_seed(0)
    irreps_in, irreps_out, irreps_sh, elements = "4x0e+4x1o", "4x0e+4x1o", "0e+1o+2e", 3
    layer = MACELayer(irreps_in, irreps_out, irreps_sh, [3, 5], elements, residual=residual)
    layer.denominator.fill_(3.7)
    edges, atoms = 9, 4
    x, element = torch.randn(atoms, o3.Irreps(irreps_in).dim), torch.tensor([0, 2, 1, 2])
    y, radial = spherical_harmonics(torch.randn(edges, 3), 2), torch.randn(edges, 3)
    source, target = torch.randint(0, atoms, (edges,)), torch.randint(0, atoms, (edges,)).sort()[0]
    got = layer(x, element, y, radial, source, target)

    def linear(weights: torch.nn.ParameterDict, z: torch.Tensor, irreps: str, out: str) -> torch.Tensor:
        flat = torch.cat([weights[str(ir)].flatten() for _, ir in o3.Irreps(irreps).simplify() if str(ir) in weights])
        return from_e3nn(o3.Linear(o3.Irreps(irreps).simplify(), out)(to_e3nn(z, irreps), flat), out)

    def by_element(z: torch.Tensor, irreps: str, out: str) -> torch.Tensor:
        product = o3.FullyConnectedTensorProduct(irreps, f"{elements}x0e", out, internal_weights=False)
        weights = [layer.connection.weights[str(ir)].transpose(0, 1).flatten() for _, ir in o3.Irreps(out)]
        one_hot = torch.nn.functional.one_hot(element, elements).to(z.dtype)
        return from_e3nn(product(to_e3nn(z, irreps), one_hot, torch.cat(weights)), out)

    spec, irreps_sum = layer.spec, layer.contraction.irreps_in
    product = o3.TensorProduct(
        spec.irreps_in, irreps_sh, spec.irreps_out, [(i, j, k, "uvu", True) for i, j, k in spec.paths],
        shared_weights=False, internal_weights=False,
    )  # fmt: skip
    w0, w1 = layer.weight_network.weights
    weights = (SILU_FACTOR * torch.nn.functional.silu(radial @ w0 / 3**0.5)) @ w1 / 5**0.5
    messages = product(to_e3nn(linear(layer.linear_in.weights, x, irreps_in, irreps_in), irreps_in)[source], y, weights)
    summed = from_e3nn(torch.zeros(atoms, messages.shape[1]).index_add(0, target, messages), spec.irreps_stored)
    a = layer.linear_out(summed) / 3.7
    if not residual:
        a = by_element(a, irreps_sum, irreps_sum)
    components = torch.cat([z.unflatten(1, (-1, 4)) for z in a.split([block.dim for block in layer.contraction.blocks_in], dim=1)], dim=1)
    parts, start = [], 0
    for out in range(2):
        total = torch.zeros(())
        for degree, indices in ((1, "i"), (2, "ij"), (3, "ijk")):
            u = u_matrix(layer.contraction, out, degree)
            w = layer.contraction_weights[element][:, start : start + u.shape[-1]]
            start += u.shape[-1]
            total = total + torch.einsum(f"m{indices}p,npc,{','.join(f'n{i}c' for i in indices)}->nmc", u, w, *[components] * degree)
        parts.append(total.flatten(1))
    expected = linear(layer.linear_product.weights, torch.cat(parts, dim=1), irreps_out, irreps_out)
    if residual:
        expected = expected + by_element(x, irreps_in, irreps_out)
    assert torch.allclose(got, expected, rtol=0, atol=1e-11)


def test_an_isolated_atom_without_residual_has_its_reference_energy() -> None:
    model = potential(first_residual=False).double().eval()
    alone = prepare(model, molecule()[:1])
    number = int(alone.numbers[0])
    assert float(model(collate([alone]))["energy"]) == float(model.heads["energy"].table.reference[0, number])


@pytest.mark.parametrize(
    ("irreps", "parameters"), [("128x0e", 3_847_696), ("128x0e+128x1o", 4_688_656), ("128x0e+128x1o+128x2e", 5_725_072)]
)
def test_sizes_of_the_published_models(irreps: str, parameters: int) -> None:
    """MACE-MP-0 small, medium and large; mace-torch counts more, as it keeps weights of coupling trees that depend on each other."""
    model = MACE(irreps=irreps, elements=range(1, 90))
    trees = {"0e": 28, "1o": 58, "2e": 73}
    independent = {"0e": 13, "1o": 16, "2e": 20}
    kept = [sum(independent[str(ir)] for _, ir in layer.contraction.blocks_out) for layer in model.layers]
    assert [layer.contraction_weights.shape for layer in model.layers] == [(89, count, 128) for count in kept]
    more = sum((trees[str(ir)] - independent[str(ir)]) * 89 * 128 for layer in model.layers for _, ir in layer.contraction.blocks_out)
    head = MACEEnergyHead(2, (16,))
    head.bind(model.channels, 1)
    assert sum(p.numel() for module in (model, head) for p in module.parameters() if p.requires_grad) + more == parameters


def test_checkpoint_and_new_levels_of_theory(tmp_path: Any) -> None:
    model = potential(("a", "b")).eval()
    with torch.no_grad():
        model.heads["energy"].table.reference[1] += 1.0
    checkpoint.save(model, tmp_path / "mace")
    again = checkpoint.load(tmp_path / "mace")
    batch = collate([prepare(model, random_crystal(0, 4, (8, 12, 22)))])
    for name, value in model(batch).items():
        assert torch.allclose(again(batch)[name], value, rtol=0, atol=1e-6 * max(1.0, float(value.abs().max()))), name
    grown = extend(model, "mine", parent="b")
    batch.dataset = torch.tensor([1])
    expected = model(batch)
    batch.dataset = torch.tensor([2])
    for name, value in expected.items():
        assert torch.allclose(grown(batch)[name], value, rtol=0, atol=1e-6 * max(1.0, float(value.abs().max()))), name


def test_parameter_gradients_against_finite_differences() -> None:
    model = potential(irreps="2x0e+2x1o", lmax=2).double().train()
    batch = collate([prepare(model, random_crystal(2, 3, (8, 12, 22)))])

    def loss() -> torch.Tensor:
        out = model(batch)
        return out["forces"].square().sum() + out["stress"].square().sum() + 1e-3 * out["gap"].sum()

    model.zero_grad()
    loss().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        flat = parameter.grad.flatten()
        index = int(flat.abs().argmax())
        with torch.no_grad():
            values = []
            for h in (1e-5, -1e-5):
                parameter.view(-1)[index] += h
                values.append(float(loss().detach()))
                parameter.view(-1)[index] -= h
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(flat[index]), rel=1e-5, abs=1e-8), name


def test_float32_follows_float64() -> None:
    model = potential().eval()
    batch = collate([prepare(model, random_crystal(seed, 6, (8, 12, 22))) for seed in range(3)])
    single, double = model(batch), model.double()(batch)
    for name in ("energy", "forces", "stress"):
        assert torch.allclose(single[name], double[name], rtol=0, atol=3e-5 * float(double[name].abs().max().clamp(max=10))), name


def test_a_backend_with_a_contraction_of_its_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(len(arguments))
        return backends.get("symmetric_contraction")(*arguments)

    monkeypatch.setitem(backends.TABLE, ("tensor_product_gather_sum", "mine"), backends.get("tensor_product_gather_sum"))
    model = potential(backend="mine").double().eval()
    first = evaluate(model, molecule())["energy"]
    assert not calls, "a backend without one leaves it to the reference"
    monkeypatch.setitem(backends.TABLE, ("symmetric_contraction", "mine"), counted)
    assert torch.equal(evaluate(model, molecule())["energy"], first)
    assert calls == [4, 4]


def test_options_that_make_no_sense() -> None:
    for irreps, problem in {"4x1o": "0e", "4x0e+4x1e": "parity", "4x0e+2x1o": "same number"}.items():
        with pytest.raises(InputError, match=problem):
            MACE(irreps=irreps)
    with pytest.raises(InputError, match="raise lmax"):
        MACE(irreps="4x0e+4x2e", lmax=1)
    with pytest.raises(InputError, match="num_layers"):
        MACE(num_layers=0)
    with pytest.raises(InputError, match="degree"):
        MACE(degree=4)
    with pytest.raises(InputError, match="3 layers"):
        Potential(MACE(irreps="4x0e", num_layers=2, lmax=1), {"energy": MACEEnergyHead(3)})
