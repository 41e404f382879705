"""The NequIP family: symmetry, gradients, continuity, and the equations of the published models."""

from collections.abc import Callable

import pytest
import torch
from e3nn import o3

from matfound.errors import InputError
from matfound.models.base import Potential
from matfound.models.nequip import Interaction, NequIP
from matfound.nn.activations import SILU_FACTOR
from matfound.nn.so3.harmonics import spherical_harmonics
from matfound.structures.atomic_data import collate
from matfound.testing import check_gradients, check_model, check_supercell, check_symmetry, prepare, random_crystal

VARIANTS = {
    "natural parity": {},
    "full O(3)": {"irreps": "8x0e+4x0o+4x1e+4x1o+4x2e"},
    "SevenNet": {"irreps": "8x0e+4x1e+4x2e", "symmetry": "SE3", "envelope": "xplor", "envelope_onset": 3.6},
    "NequIP": {"self_connection": "nequip", "normalize_radial": False, "trainable_basis": False},
    "raw harmonics": {"irreps": "8x0e+8x1o", "lmax": 1, "self_connection": "none", "normalize_harmonics": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_conformance(small_potential: Callable[..., Potential], variant: str) -> None:
    potential = small_potential(**VARIANTS[variant])
    check_model(potential, [random_crystal(0, 5, (8, 12, 22)), random_crystal(1, 2, (8, 22)), _molecule()])


def _molecule():
    molecule = random_crystal(3, 4, (1, 6, 8), pbc=False)
    molecule.cell[:] = 0
    return molecule


@pytest.mark.parametrize("pbc", [(True, True, False), (True, False, False), (False, True, True)])
def test_mixed_periodicity(small_potential: Callable[..., Potential], pbc: tuple[bool, bool, bool]) -> None:
    potential = small_potential().double().eval()
    atoms = random_crystal(5, 4, (8, 12, 22), pbc=pbc)
    check_symmetry(potential, atoms)
    check_gradients(potential, atoms, components=4)


def test_gradients_on_a_cell_much_smaller_than_the_cutoff(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential(cutoff=6.0).double().eval()
    atoms = random_crystal(7, 1, (12,))
    check_gradients(potential, atoms)
    check_supercell(potential, atoms)


def test_se3_models_do_not_pretend_reflections(small_potential: Callable[..., Potential]) -> None:
    # Two layers cannot tell mirror images apart: the first odd coupling, 1 x 1 -> 1, needs a layer before and one after it.
    potential = small_potential(**VARIANTS["SevenNet"], num_layers=3).double().eval()
    assert potential.backbone.symmetry == "SE3"
    potential.backbone.symmetry = "E3"
    with pytest.raises(AssertionError, match="reflection"):
        check_symmetry(potential, random_crystal(0, 6, (8, 12, 22)))


def test_declared_continuity_is_tested(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential(envelope="xplor", trainable_basis=True)
    with torch.no_grad():
        potential.backbone.basis.frequencies.mul_(0.83)  # sin(k·cutoff) is no longer zero and adds no order of its own
    check_model(potential, [random_crystal(1, 2, (8, 22))])
    potential.backbone.continuity = 2
    with pytest.raises(AssertionError, match="continuity 2 needs"):
        check_model(potential, [random_crystal(1, 2, (8, 22))])


def test_interaction_is_what_the_paper_says() -> None:
    """One SevenNet layer against e3nn's own modules, equation by equation (anchors: W columns by path, denominator after the sum)."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        irreps_in, irreps_out, irreps_sh = "6x0e+4x1e", "6x0e+4x1e+2x2e", "0e+1e+2e"
        layer = Interaction(irreps_in, irreps_out, irreps_sh, [3, 5], 1, "linear")
        layer.denominator.fill_(3.7)
        edges, atoms = 9, 4
        x = torch.randn(atoms, o3.Irreps(irreps_in).dim)
        y = spherical_harmonics(torch.randn(edges, 3), 2)
        radial = torch.randn(edges, 3)
        source, target = torch.randint(0, atoms, (edges,)), torch.randint(0, atoms, (edges,)).sort()[0]
        got = layer(x, torch.zeros(atoms, dtype=torch.int64), y, radial, source, target)
        from matfound.nn.so3.layout import from_e3nn, to_e3nn

        spec = layer.spec
        product = o3.TensorProduct(
            spec.irreps_in, irreps_sh, spec.irreps_out, [(i, j, k, "uvu", True) for i, j, k in spec.paths],
            shared_weights=False, internal_weights=False,
        )  # fmt: skip
        w0, w1 = layer.weight_network.weights
        weights = (SILU_FACTOR * torch.nn.functional.silu(radial @ w0 / 3**0.5)) @ w1 / 5**0.5
        messages = product(to_e3nn(layer.linear_in(x), irreps_in)[source], y, weights)
        summed = torch.zeros(atoms, messages.shape[1]).index_add(0, target, messages) / 3.7
        gated = layer.linear_out(from_e3nn(summed, spec.irreps_stored)) + layer.self_connection(x)
        assert torch.allclose(got, layer.gate(gated), atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("published", "widths", "messages"), [
    ("128x0e+64x1e+32x2e", [384, 960, 960, 960, 224], [1152, 3136, 3136, 3136, 224]),
    ("128x0e+64x1e+32x2e+32x3e", [512, 1760, 1760, 1760, 256], [2048, 7776, 7776, 7776, 256]),
])  # fmt: skip
def test_sizes_of_the_published_sevennet_models(published: str, widths: list[int], messages: list[int]) -> None:
    lmax = published.count("+")
    model = NequIP(cutoff=5.0, num_layers=5, irreps=published, lmax=lmax, symmetry="SE3", elements=range(1, 90), envelope="xplor")
    assert [layer.spec.weight_numel for layer in model.layers] == widths
    assert [layer.spec.blocks_out.dim for layer in model.layers] == messages
    # 842,440 and 1,171,144 trainable numbers, less the readout 128·64 + 64.
    expected = {2: 842_440, 3: 1_171_144}[lmax] - 128 * 64 - 64
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_float32_follows_float64(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential().eval()
    batch = collate([prepare(potential, random_crystal(seed, 6, (8, 12, 22))) for seed in range(3)])
    single = potential(batch)
    double = potential.double()(batch)
    assert single["energy"].dtype == torch.float64
    for name in ("energy", "forces", "stress"):
        assert torch.allclose(single[name], double[name], rtol=0, atol=3e-5 * float(double[name].abs().max().clamp(max=10))), name


def test_references_survive_casts_in_float64(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential()
    value = torch.tensor(-2041.123456789012, dtype=torch.float64)
    potential.heads["energy"].table.reference[0, 8] = value
    potential.double().float().half().float()
    assert potential.heads["energy"].table.reference[0, 8] == value


def test_parameter_gradients_against_finite_differences(small_potential: Callable[..., Potential]) -> None:
    potential = small_potential(num_layers=1, irreps="4x0e+2x1o").double().train()
    batch = collate([prepare(potential, random_crystal(2, 3, (8, 12, 22)))])

    def loss() -> torch.Tensor:
        out = potential(batch)
        return out["forces"].square().sum() + out["stress"].square().sum() + 1e-3 * (out["gap"].sum() + out["charges"].square().sum())

    potential.zero_grad()
    loss().backward()
    for name, parameter in potential.named_parameters():
        flat = parameter.grad.flatten()
        index = int(flat.abs().argmax())
        with torch.no_grad():
            values = []
            for h in (1e-5, -1e-5):
                parameter.view(-1)[index] += h
                values.append(float(loss().detach()))
                parameter.view(-1)[index] -= h
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(flat[index]), rel=1e-5, abs=1e-8), name


def test_irreps_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="as even"):
        NequIP(irreps="8x0e+8x1o", symmetry="SE3")
    with pytest.raises(InputError, match="0e"):
        NequIP(irreps="8x0o+8x1o")
