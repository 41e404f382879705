"""Tensor products with weights from a table."""

import math

import pytest
import torch

from matfound.errors import InputError
from matfound.inference.predict import ready
from matfound.models.base import Potential
from matfound.models.mace import MACE, MACEEnergyHead
from matfound.models.nequip import NequIP
from matfound.nn.heads import EnergyHead
from matfound.nn.radial import radial_tables
from matfound.ops import backends
from matfound.ops.cuda import compiler
from matfound.ops.tensor_product import TensorProductSpec, cuda_source, tensor_product_gather_sum
from matfound.ops.tensor_product.table import interpolate, tensor_product_gather_sum_tabulated
from matfound.structures.atomic_data import collate
from matfound.testing import check_op, prepare, random_crystal

SPECS = {
    "even": TensorProductSpec.full("64x0e+128x1o+32x2e", "0e+1o+2e", "0e+1o+2e"),
    "ragged": TensorProductSpec.full("5x0e+40x1o+33x2e", "0e+1o+2e", "0e+1o+2e"),
    "joined": TensorProductSpec("64x0e+64x1o", "0e+1o", "64x0e", ((0, 0, 0), (1, 1, 0))),
    "holes": TensorProductSpec("4x0e+3x1o+2x2e", "0e+1o", "4x0e+7x0o+3x1o", ((0, 0, 0), (1, 0, 2))),
    "channels": TensorProductSpec.full("3x0e+3x1o", "3x0e+3x1o", "0e+1o", "uuu"),
}
CPU = torch.device("cpu")


def waves(weights: int):
    """Smooth functions that vanish at 5."""
    frequencies = torch.arange(1, weights + 1, dtype=torch.float64) / weights * 3
    return lambda r: torch.cos(r.unsqueeze(1) * frequencies.to(r.device)) * (1 - (r / 5).unsqueeze(1)).clamp(min=0) ** 3


def drawn(spec, atoms, edges, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(atoms + edges)
    sizes = (atoms, spec.dims[0]), (edges, spec.dims[1]), (atoms, spec.dims[2])
    x, y, g = (torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes)
    r = torch.rand(edges, generator=generator, dtype=torch.float64).to(device, dtype) * 5.5  # some are beyond
    target = torch.randint(atoms, (edges,), generator=generator).sort().values.to(device)
    source = torch.randint(atoms, (edges,), generator=generator).to(device)
    (table,) = radial_tables([waves(spec.weight_numel)], 5.0, CPU)
    return (
        (x.requires_grad_(), y.requires_grad_(), (r * ((len(table) - 1) / 5)).requires_grad_()),
        g,
        table.to(device, dtype),
        source,
        target,
    )


def test_tables_are_exact() -> None:
    function = waves(7)
    (table,) = radial_tables([function], 5.0, CPU)
    rows = len(table) - 1
    r = torch.linspace(0.01, 4.99, 3001, dtype=torch.float64)
    assert (interpolate(table, r / 5 * rows) - function(r)).abs().max() < 1e-7
    place = torch.tensor([0.0, 3.0, rows - 1e-9, rows, rows + 0.5, 1e9], dtype=torch.float64, requires_grad=True)
    values = interpolate(table, place)
    assert values[3:].abs().max() == 0 and torch.autograd.grad(values.sum(), place)[0][3:].abs().max() == 0
    assert torch.allclose(values[1], function(torch.tensor([3 * 5 / rows]))[0], atol=1e-12)
    assert interpolate(table, torch.tensor([math.nan], dtype=torch.float64)).isnan().all()
    assert interpolate(table, place[:0]).shape == (0, 7)


def test_slopes_are_exact_in_float32() -> None:
    function = waves(7)
    (table,) = radial_tables([function], 5.0, CPU)
    r = torch.linspace(0.01, 4.99, 301, dtype=torch.float64)
    scale = (len(table) - 1) / 5
    place = (r * scale).float().requires_grad_()
    slope = torch.autograd.grad(interpolate(table.float(), place).sum(), place)[0] * scale
    _, expected = torch.func.jvp(function, (place.detach().double() / scale,), (torch.ones_like(r),))
    assert (slope - expected.sum(1)).abs().max() < 1e-5, "differences of rounded values would be wrong by 1e-4"


def test_no_table_where_weights_are_rough() -> None:
    assert radial_tables([lambda r: torch.cos(300 * r).unsqueeze(1)], 5.0, CPU) is None
    assert radial_tables([lambda r: r.new_zeros(len(r), 2)], 5.0, CPU) is not None


@pytest.mark.parametrize("name", ["holes", "channels"])
def test_reference(name) -> None:
    spec = SPECS[name]
    tensors, _, table, source, target = drawn(spec, 3, 6)
    check_op(lambda x, y, place: tensor_product_gather_sum_tabulated(spec, x, y, place, table, source, target), list(tensors))
    x, y, place = tensors
    expected = tensor_product_gather_sum(spec, x, y, interpolate(table, place), source, target)
    assert torch.equal(tensor_product_gather_sum_tabulated(spec, x, y, place, table, source, target), expected)
    with pytest.raises(InputError, match="backend"):
        tensor_product_gather_sum_tabulated(spec, x, y, place, table, source, target, "cude")
    assert backends.get("tensor_product_gather_sum_tabulated", "auto", CPU) is not None


@pytest.mark.skipif(not compiler.is_available(), reason="NVRTC is not installed")
@pytest.mark.parametrize(("name", "dtype"), [("even", torch.float32), ("joined", torch.float32), ("holes", torch.float64)])
def test_sources_compile_without_a_gpu(name, dtype, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path))
    for make in (cuda_source.forward, cuda_source.backward):
        assert compiler.compile_source(make(SPECS[name], dtype, table=True), "sm_90")[:4] == b"\x7fELF"


def potential(kind: str) -> Potential:
    torch.manual_seed(0)
    if kind == "nequip":
        backbone, head = NequIP(4.0, 2, "8x0e+8x1o", lmax=1, radial_hidden=(8,), envelope="xplor"), EnergyHead()
    else:
        backbone, head = MACE(4.0, 2, "8x0e+8x1o", lmax=1, degree=2, radial_hidden=(8,), elements=(8, 12, 22)), MACEEnergyHead()
    made = Potential(backbone, {"energy": head})
    made.heads["energy"].table.reference.zero_()
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["nequip", "mace"])
def test_models(kind: str) -> None:
    model = potential(kind)
    batch = collate([prepare(model, random_crystal(seed)) for seed in range(2)])
    network = model(batch)
    exact = potential(kind).double()(batch)
    names = model.state_dict().keys()
    assert model.backbone.tabulate() and model.state_dict().keys() == names
    tabulated = model(batch)
    for name, value in exact.items():
        scale = float(value.abs().max())
        assert (tabulated[name] - value).abs().max() <= 2 * (network[name] - value).abs().max() + 1e-6 * scale, name
    model.load_state_dict(model.state_dict())
    assert all(torch.equal(value, network[name]) for name, value in model(batch).items()), "loaded weights count"
    assert model.backbone.tabulate()
    model.train()
    assert all(layer.table is None for layer in model.backbone.layers) and not model.backbone.tabulate()
    assert not potential(kind).double().backbone.tabulate(), "float64 needs the network"


def test_a_copy_for_another_type_has_no_tables() -> None:
    model = potential("nequip")
    assert model.backbone.tabulate()
    linear = model.backbone.layers[0].linear_in
    linear.fold()
    copy = ready(model, "cpu", "float64")
    assert all(layer.table is None for layer in copy.backbone.layers) and copy.backbone.layers[0].linear_in.folded is None
    assert not copy.training and model.backbone.layers[0].table is not None and linear.folded is not None


def test_models_without_tables() -> None:
    assert not potential("nequip").requires_grad_(True).backbone.tabulate()
    mace = MACE(4.0, 2, "4x0e", lmax=1, degree=2, radial_hidden=(8,), elements=(8, 12), transform="agnesi")
    assert not mace.eval().requires_grad_(False).tabulate()


# --------------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(7, 40), (1, 1), (3, 0), (50, 1500)])
@pytest.mark.parametrize("name", SPECS)
def test_cuda_equals_the_reference(name, sizes, dtype) -> None:
    spec = SPECS[name]
    tensors, g, table, source, target = drawn(spec, *sizes, dtype, "cuda")

    def results(backend):
        out = tensor_product_gather_sum_tabulated(spec, *tensors, table, source, target, backend)
        return out, *torch.autograd.grad(out, tensors, g)

    found = results("cuda")
    for got, expected in zip(found, results("reference"), strict=True):
        close = 1e-12 if dtype == torch.float64 else 2e-6
        assert (got - expected).abs().max() <= close * max(1.0, float(expected.detach().abs().max())) if expected.numel() else True
    assert all(torch.equal(a, b) for a, b in zip(found, results("cuda"), strict=True)), "the same in every run"


@pytest.mark.gpu
def test_second_derivatives_on_a_gpu() -> None:
    spec = SPECS["holes"]
    tensors, _, table, source, target = drawn(spec, 3, 6, device="cuda")
    check_op(lambda x, y, place: tensor_product_gather_sum_tabulated(spec, x, y, place, table, source, target, "cuda"), list(tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nequip", "mace"])
def test_models_on_a_gpu(kind: str) -> None:
    model = potential(kind).to("cuda")
    batch = collate([prepare(model, random_crystal(seed)) for seed in range(2)]).to("cuda")
    exact = potential(kind).double().to("cuda")(batch)
    assert model.backbone.tabulate()
    for name, value in model(batch).items():
        assert (value - exact[name]).abs().max() <= 1e-5 * max(1.0, float(exact[name].abs().max())), name
