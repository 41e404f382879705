"""SevenNet checkpoints reproduce the original: published files against stored outputs, small ones against an independent reading."""

import importlib.util
import math
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import ase.io
import numpy as np
import pytest
import torch
from ase.stress import full_3x3_to_voigt_6_stress
from e3nn.nn import Gate
from e3nn.o3 import FullyConnectedTensorProduct, Irreps, Linear, TensorProduct, spherical_harmonics, wigner_3j

from matfound import testing
from matfound.errors import InputError
from matfound.graphs.neighbors import add_graphs, edge_vectors
from matfound.graphs.spec import GraphSpec
from matfound.inference.predict import predict
from matfound.models import checkpoint, published
from matfound.models.base import Potential
from matfound.models.convert import convert, sevennet
from matfound.models.extend import extend
from matfound.nn.so3.layout import to_e3nn
from matfound.structures.ase import from_atoms

FIXTURES = {
    "sevennet_0": ("sevennet-0", None),
    "sevennet_0_22may2024": ("sevennet-0-may2024", None),
    "sevennet_l3i5": ("sevennet-l3i5", None),
    "sevennet_mf_0_pbe": ("sevennet-mf-0", "PBE"),
    "sevennet_mf_0_r2scan": ("sevennet-mf-0", "R2SCAN"),
}
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("sevenn") is None, reason="the package sevenn, with the weights, is not installed"
)


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    """The module that makes small checkpoints."""
    name = "matfound_tests_tiny_sevennet"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "tiny_sevennet.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(potential: Potential, frames: list[ase.Atoms], head: str | None = None) -> dict[str, np.ndarray]:
    found = [row for _, row in predict(potential, [from_atoms(atoms, labels=False) for atoms in frames], dataset=head)]
    nan = np.full(6, np.nan)
    return {
        "energy": np.concatenate([row["energy"] for row in found]),
        "energies": np.concatenate([row["energies"] for row in found]),
        "forces": np.concatenate([row["forces"] for row in found]),
        "stress": np.array([full_3x3_to_voigt_6_stress(row["stress"][0].numpy()) if "stress" in row else nan for row in found]),
    }


@needs_weights
@pytest.mark.parametrize("folder", FIXTURES)
def test_published_outputs(folder: str, shared_data: Path, cache: Path) -> None:
    name, head = FIXTURES[folder]
    frames = ase.io.read(shared_data / "golden" / folder / "structures.extxyz", ":")
    stored = np.load(shared_data / "golden" / folder / "outputs.npz")
    potential = checkpoint.load(name, dtype="float64")
    for key, value in outputs(potential, frames, head).items():
        reference = stored[f"{key}_f64"]
        np.testing.assert_array_equal(np.isnan(value), np.isnan(reference))
        assert np.nanmax(np.abs(value - reference)) < 1e-11, key
    single = outputs(potential.float(), frames, head)
    for key, value in single.items():
        allowed = 4 * np.nanmax(np.abs(stored[f"{key}_f32"] - stored[f"{key}_f64"])) + 1e-6 * np.nanmax(np.abs(stored[f"{key}_f64"]))
        assert np.nanmax(np.abs(value - stored[f"{key}_f64"])) < allowed, key


@needs_weights
def test_layers_one_by_one(shared_data: Path, cache: Path) -> None:
    """Features after every gate, so that an error that later layers hide would be seen."""
    folder = shared_data / "golden" / "sevennet_l3i5"
    frames = {atoms.info["name"]: atoms for atoms in ase.io.read(folder / "structures.extxyz", ":")}
    stored = np.load(folder / "intermediates_zns2_skewed.npz")
    potential = checkpoint.load("sevennet-l3i5", dtype="float64")
    found: list[torch.Tensor] = []
    for layer in potential.backbone.layers:  # type: ignore[union-attr]
        layer.register_forward_hook(lambda module, _, out: found.append(to_e3nn(out.detach(), str(module.gate.irreps_out))))
    outputs(potential, [frames["zns2_skewed"]])
    for n, features in enumerate(found):
        np.testing.assert_allclose(features, stored[f"{n}_equivariant_gate"], rtol=1e-6, atol=1e-7)


@needs_weights
@pytest.mark.parametrize("name", ["sevennet-0", "sevennet-l3i5", "sevennet-mf-0"])
def test_published_models_keep_their_promises(name: str, cache: Path) -> None:
    testing.check_model(checkpoint.load(name), [testing.random_crystal(0, 4)])


@needs_weights
def test_cached_copy_is_the_same(cache: Path) -> None:
    first, second = checkpoint.load("sevennet-mf-0"), checkpoint.load("sevennet-mf-0")
    assert len(list(cache.iterdir())) == 1
    assert first.licence == second.licence == "MIT"
    assert first.datasets == second.datasets == ["R2SCAN", "PBE"]
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)


@needs_weights
def test_damaged_cache_is_made_anew(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.load("sevennet-0")
    (folder,) = cache.iterdir()
    (folder / checkpoint.WEIGHTS).write_bytes(b"0123456789")
    assert checkpoint.load("sevennet-0").datasets == ["mptrj"]
    assert "made anew" in caplog.text
    caplog.clear()
    checkpoint.load("sevennet-0")
    assert not caplog.text


@needs_weights
def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "file" / "cache"))
    assert checkpoint.load("sevennet-0").datasets == ["mptrj"]
    assert "not cached" in caplog.text


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MATFOUND_CACHE", str(folder))
    return folder


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "a"))
    assert published.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("MATFOUND_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert published.cache_folder() == tmp_path / "b" / "matfound"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert published.cache_folder() == tmp_path / ".cache" / "matfound"


# ----------------------------------------------------------------------------------------------- small files, made by hand
# Three layers with vectors and rank-2 tensors, so that the order of the radial weights and the signs of couplings matter.

IRREPS = ["4x0e", "4x0e+3x1e+2x2e", "4x0e+3x1e+2x2e", "4x0e"]
SH = "0e+1e+2e"
GATES = 5


def content(tiny: ModuleType, modalities: dict[str, int] | None = None, **options: object) -> dict:
    """A checkpoint of the network above, in the order of version 0.11 on, with e3nn's present couplings."""
    start = tiny.checkpoint(modalities, **options)
    old, state = start["model_state_dict"], {}
    generator = torch.Generator().manual_seed(1)
    number = len(modalities or {})

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def linear(irreps_in: str, irreps_out: str, modal: int) -> torch.Tensor:
        pairs = [(a, b) for a, ir in Irreps(irreps_in) for b, other in Irreps(irreps_out) if ir == other]
        scalars = Irreps(irreps_out).count("0e")
        return random(sum(a * b for a, b in pairs) + modal * scalars)

    state |= {key: value for key, value in old.items() if not key[0].isdigit()}
    for n in range(3):
        irreps_in, irreps_out = IRREPS[n], IRREPS[n + 1]
        gate = irreps_out if n == 2 else f"{4 + GATES}x0e+3x1e+2x2e"
        slots = [
            (mul, ir) for mul, ir_in in Irreps(irreps_in) for _, ir_sh in Irreps(SH) for ir in ir_in * ir_sh if ir in Irreps(irreps_out)
        ]
        middle = "+".join(f"{sum(mul for mul, other in slots if other == ir)}x{ir}" for ir in sorted({ir for _, ir in slots}))
        state[f"{n}_self_connection_intro.linear.weight"] = linear(irreps_in, gate, 0)
        state[f"{n}_self_interaction_1.linear.weight"] = linear(irreps_in, irreps_in, number)
        state[f"{n}_self_interaction_2.linear.weight"] = linear(middle, gate, number)
        state[f"{n}_convolution.denominator"] = torch.tensor([3.5])
        state[f"{n}_convolution.weight_nn.layer0.weight"] = random(3, 8)
        state[f"{n}_convolution.weight_nn.layer1.weight"] = random(8, sum(mul for mul, _ in slots))
        for a in {ir.l for _, ir in Irreps(irreps_in)}:
            for b in range(3):
                for c in {ir.l for _, ir in Irreps(irreps_out)}:
                    if min(a, b, c) > 0 and abs(a - b) <= c <= a + b:
                        name = f"{n}_convolution.convolution._compiled_main_left_right._w3j_{a}_{b}_{c}"
                        state[name] = wigner_3j(a, b, c, dtype=torch.float32)
    more = {"irreps_manual": IRREPS, "lmax": 2, "num_convolution_layer": 3}
    return {"model_state_dict": state, "config": start["config"] | more | options}


def paths(n: int) -> list[tuple[int, int, int, int, int]]:
    """(multiplicity, l1, l2, l3, place before sorting) of each path of a layer."""
    found = [
        (mul, ir_in.l, ir_sh.l, ir.l)
        for mul, ir_in in Irreps(IRREPS[n])
        for _, ir_sh in Irreps(SH)
        for ir in ir_in * ir_sh
        if ir in Irreps(IRREPS[n + 1])
    ]
    return [(*path, place) for place, path in enumerate(found)]


def unsorted(checkpoint: dict) -> dict:
    """The same network as a file from before version 0.11: radial weights in the order of the paths."""
    state = dict(checkpoint["model_state_dict"])
    for n in range(3):
        key = f"{n}_convolution.weight_nn.layer1.weight"
        order = sorted(paths(n), key=lambda path: path[3])
        pieces = dict(zip([path[4] for path in order], state[key].split([path[0] for path in order], dim=1), strict=True))
        state[key] = torch.cat([pieces[place] for place in sorted(pieces)], dim=1)
    return {"model_state_dict": state, "config": checkpoint["config"] | {"version": "0.9.1"}}


def flipped(checkpoint: dict) -> dict:
    """The same network, trained with couplings of the other sign for (1, 2, 2) and its permutations: an old file."""
    state = dict(checkpoint["model_state_dict"])
    odd = {(1, 2, 2), (2, 1, 2), (2, 2, 1)}
    for n in range(3):
        key = f"{n}_convolution.weight_nn.layer1.weight"
        signs = [torch.full((path[0],), -1.0 if path[1:4] in odd else 1.0) for path in paths(n)]
        state[key] = state[key] * torch.cat(signs)
    for key, value in state.items():
        if any(key.endswith(f"_w3j_{a}_{b}_{c}") for a, b, c in odd):
            state[key] = -value
    return {"model_state_dict": state, "config": checkpoint["config"]}


def renamed(checkpoint: dict) -> dict:
    """Key names of May 2024."""
    names = {
        "edge_embedding": "EdgeEmbedding", "denominator": "denumerator", "reduce_input_to_hidden": "reducing nn input to hidden",
        "reduce_hidden_to_energy": "reducing nn hidden to energy", "_self_interaction_2": " self interaction 2",
        "_self_connection_intro": " self connection intro", "_convolution.": " convolution.", "rescale_atomic": "rescale atomic",
    }  # fmt: skip
    state = {}
    for key, value in checkpoint["model_state_dict"].items():
        new = key
        for name, old in names.items():
            new = new.replace(name, old)
        state[new] = value
    return {"model_state_dict": state, "config": checkpoint["config"]}


def small(checkpoint: dict) -> Potential:
    return sevennet.convert(checkpoint).double().eval()


@pytest.fixture(scope="module")
def water() -> list[ase.Atoms]:
    atoms = testing.random_crystal(3, natoms=6, numbers=(1, 8))
    molecule = ase.Atoms("OHH", positions=[[0.1, 0, 0], [0.8, 0.5, 0.2], [-0.7, 0.6, 0.1]])
    return [atoms, molecule, ase.Atoms("H")]


def alike(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 1e-12) -> bool:
    return all(np.allclose(a[key], b[key], rtol=tolerance, atol=tolerance, equal_nan=True) for key in a)


def test_old_files_are_the_same_network(tiny: ModuleType, water: list[ase.Atoms]) -> None:
    new = content(tiny)
    reference = outputs(small(new), water)
    assert alike(outputs(small(unsorted(new)), water), reference)
    assert alike(outputs(small(renamed(flipped(unsorted(new)))), water), reference)
    # and each difference matters: read as if it were new, an old file is another network
    wrong = unsorted(new)
    wrong["config"] = new["config"]
    assert not alike(outputs(small(wrong), water), reference, 1e-3)
    wrong = flipped(new)
    wrong["model_state_dict"] |= {key: value for key, value in new["model_state_dict"].items() if "_w3j_" in key}
    assert not alike(outputs(small(wrong), water), reference, 1e-3)
    wrong = {"model_state_dict": new["model_state_dict"], "config": new["config"] | {"_normalize_sph": False}}
    assert not alike(outputs(small(wrong), water), reference, 1e-3)


def test_modalities_are_datasets(tiny: ModuleType, water: list[ase.Atoms]) -> None:
    potential = small(content(tiny, {"B": 1, "A": 0}))
    assert potential.datasets == ["A", "B"]
    a, b = (outputs(potential, water, head) for head in ("a", "B"))
    assert not alike(a, b, 1e-3)
    with pytest.raises(InputError, match="name one with head=: A, B"):
        outputs(potential, water)
    grown = extend(potential, "mine", "B")
    assert alike(outputs(grown, water, "mine"), b)
    assert alike(outputs(grown, water, "A"), a)
    assert potential.heads["energy"].readout.last.shape[0] == 1  # as in the file, so that the number of parameters is the same
    assert grown.heads["energy"].readout.last.shape[0] == 3  # one more head is a last layer of its own


@pytest.mark.parametrize("part", ["use_modal_self_inter_intro", "use_modal_self_inter_outro", "use_modal_output_block"])
def test_a_part_without_modality(part: str, tiny: ModuleType, water: list[ase.Atoms]) -> None:
    """Leaving the modality out of a part is the same as rows of zeros there, but for the factor of the larger fan."""
    full = content(tiny, {"A": 0, "B": 1}, **{part: False})
    state, config = full["model_state_dict"], full["config"]
    keys = {
        "use_modal_self_inter_intro": [f"{n}_self_interaction_1.linear.weight" for n in range(3)],
        "use_modal_self_inter_outro": [f"{n}_self_interaction_2.linear.weight" for n in range(3)],
        "use_modal_output_block": ["reduce_input_to_hidden.linear.weight"],
    }[part]
    for key in keys:
        outputs_of = 2 if "reduce" in key else 4 if "interaction_1" in key or key.startswith("2") else 4 + GATES
        state[key] = state[key][: -2 * outputs_of]
    without = outputs(small(full), water, "A")
    zeros = {key: torch.cat([value, torch.zeros(2 * _outputs(key))]) if key in keys else value for key, value in state.items()}
    for key in keys:
        fan = {"i": 4, "r": 4}.get(key[0], 4)
        if "interaction_2" in key:
            n = int(key[0])
            fan = sum(path[0] for path in paths(n) if path[3] == 0)
        count = fan * _outputs(key)
        zeros[key][:count] *= ((fan + 2) / fan) ** 0.5
    other = {"model_state_dict": zeros, "config": config | {part: True}}
    assert alike(outputs(small(other), water, "A"), without, 1e-6)


def _outputs(key: str) -> int:
    return 2 if "reduce" in key else 4 if "interaction_1" in key or key.startswith("2") else 4 + GATES


@pytest.mark.parametrize(("shift", "scale"), [([0.5], [2.0]), (0.5, 2.0), ([0.5, -1.0], [2.0]), ([0.5, -1.0], [2.0, 3.0])])
def test_shapes_of_shift_and_scale(
    shift: float | list[float], scale: float | list[float], tiny: ModuleType, water: list[ase.Atoms]
) -> None:
    given = content(tiny)
    plain = content(tiny)
    given["model_state_dict"] |= {"rescale_atomic_energy.shift": torch.tensor(shift), "rescale_atomic_energy.scale": torch.tensor(scale)}
    plain["model_state_dict"] |= {"rescale_atomic_energy.shift": torch.zeros(2), "rescale_atomic_energy.scale": torch.ones(2)}
    got, base = outputs(small(given), water), outputs(small(plain), water)
    row = np.concatenate([np.where(atoms.numbers == 1, 0, 1) for atoms in water])
    np.testing.assert_allclose(got["energies"], np.resize(scale, 2)[row] * base["energies"] + np.resize(shift, 2)[row], rtol=1e-12)


def test_reads_files(tiny: ModuleType, tmp_path: Path) -> None:
    file = tiny.write(tmp_path / "mine.pth", content(tiny))
    potential = convert(file, ["pbe"], "MIT")
    assert (potential.datasets, potential.licence, potential.dtype) == (["pbe"], "MIT", torch.float32)
    assert not potential.training
    assert convert(file).datasets == ["default"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"self_connection_type": "none"}, "self_connection_type = 'none' is not known here"),
        ({"act_radial": "tanh"}, "act_radial = 'tanh'"),
        ({"act_gate": {"e": "tanh", "o": "tanh"}}, "act_gate"),
        ({"use_bias_in_linear": True}, "use_bias_in_linear = True"),
        ({"use_modal_node_embedding": True}, "use_modal_node_embedding"),
        ({"cutoff_function": {"cutoff_function_name": "cosine"}}, "cutoff function 'cosine'"),
        ({"radial_basis": {"radial_basis_name": "gauss"}}, "radial basis 'gauss'"),
        ({"irreps_manual": ["5x0e", "4x0e+3x1e+2x2e", "4x0e+3x1e+2x2e", "4x0e"]}, "layer 0 goes from 5x0e"),
        ({"irreps_manual": ["4x0e", "4x0e+3x1e+2x2e", "4x0e+3x1e+2x2e", "4x0e+1x1e"]}, "the last layer gives even scalars only"),
        ({"irreps_manual": ["4x0e", "4x0e+3x3e", "4x0e+3x1e+2x2e", "4x0e"]}, "layer 0 cannot make"),
        ({"_type_map": {1: 0, 8: 2}}, "does not number the elements"),
        ({"cutoff": "far"}, "training options cannot be read"),
    ],
)
def test_other_kinds_are_refused(options: dict, words: str, tiny: ModuleType) -> None:
    checkpoint = content(tiny)
    checkpoint["config"] |= options
    with pytest.raises(InputError, match=words):
        sevennet.convert(checkpoint)


def test_names_must_fit(tiny: ModuleType) -> None:
    with pytest.raises(InputError, match="the file has the levels of theory A, B, received x, y"):
        sevennet.convert(content(tiny, {"A": 0, "B": 1}), ["x", "y"])


# ------------------------------------------------- the other kinds of network: parity, a matrix an element, blocks that lead nowhere


class Original(torch.nn.Module):
    """A SevenNet of random weights in e3nn's own modules and layout, under SevenNet's names."""

    def __init__(self, irreps: list[str], lmax: int, parity: int, elementwise: bool) -> None:
        super().__init__()
        self.sh = Irreps([(1, (l, parity**l)) for l in range(lmax + 1)])
        self.irreps, self.elementwise = irreps, elementwise
        self.embedding = torch.nn.Parameter(torch.randn(2, Irreps(irreps[0]).dim))
        self.parts = torch.nn.ModuleList()
        self.radial = torch.nn.ParameterList()
        for n, (before, after) in enumerate(pairwise(irreps)):
            scalars = Irreps([(mul, ir) for mul, ir in Irreps(after) if ir.l == 0])
            gated = Irreps([(mul, ir) for mul, ir in Irreps(after) if ir.l > 0])
            gates = Irreps(f"{gated.num_irreps}x0e" if gated else "")
            acts = [torch.nn.functional.silu if ir.p == 1 else torch.tanh for _, ir in scalars]
            gate = Gate(scalars, acts, gates, [torch.nn.functional.silu] * len(gates), gated)
            last, top = n == len(irreps) - 2, Irreps(after).lmax
            slots, instructions = [], []
            for i, (mul, ir) in enumerate(Irreps(before)):
                for j, (_, other) in enumerate(self.sh):
                    for out in ir * other:
                        if out.l <= top and (out.p == 1 or not last):
                            instructions.append((i, j, len(slots), "uvu", True))
                            slots.append((mul, out))
            middle, place, _ = Irreps(slots).sort()
            instructions = sorted([(i, j, place[k], mode, train) for i, j, k, mode, train in instructions], key=lambda path: path[2])
            product = TensorProduct(before, self.sh, middle, instructions, shared_weights=False, internal_weights=False)
            connection = FullyConnectedTensorProduct(before, "2x0e", gate.irreps_in) if elementwise else Linear(before, gate.irreps_in)
            self.parts.append(
                torch.nn.ModuleList([connection, Linear(before, before), product, Linear(middle.simplify(), gate.irreps_in), gate])
            )
            self.radial.append(torch.randn(5, product.weight_numel))

    def forward(self, atoms: ase.Atoms) -> torch.Tensor:
        row = torch.tensor(np.where(atoms.numbers == 1, 0, 1))
        data = add_graphs(from_atoms(atoms, labels=False), {"main": GraphSpec(4.0)})
        vectors, (source, target) = edge_vectors(data), data.edge_index
        r = vectors.norm(dim=1, keepdim=True)
        k = torch.arange(1, 6) * math.pi / 4.0
        u = r / 4.0
        basis = 0.5 * torch.sin(k.float().double() * r) / r * (1 - 28 * u**6 + 48 * u**7 - 21 * u**8)
        harmonics = spherical_harmonics(self.sh, vectors, True, normalization="component")
        onehot = torch.nn.functional.one_hot(row, 2).double()
        x = self.embedding[row] / 2**0.5
        for (connection, first, product, second, gate), radial in zip(self.parts, self.radial, strict=True):
            kept = connection(x, onehot) if self.elementwise else connection(x)
            messages = product(first(x)[source], harmonics, basis @ radial / 5**0.5)
            summed = torch.zeros(len(x), messages.shape[1], dtype=torch.float64).index_add(0, target, messages) / 3.0
            x = gate(second(summed) + kept)
        return x.sum()

    def checkpoint(self, parity: bool) -> dict:
        state = {
            "onehot_to_feature_x.linear.weight": self.embedding,
            "edge_embedding.basis_function.coeffs": torch.arange(1, 6) * math.pi / 4.0,
        }
        for n, ((connection, first, product, second, _), radial) in enumerate(zip(self.parts, self.radial, strict=True)):
            name = "fc_tensor_product" if self.elementwise else "linear"
            state[f"{n}_self_connection_intro.{name}.weight"] = connection.weight
            state[f"{n}_self_interaction_1.linear.weight"] = first.weight
            state[f"{n}_self_interaction_2.linear.weight"] = second.weight
            state[f"{n}_convolution.denominator"] = torch.tensor([3.0])
            state[f"{n}_convolution.weight_nn.layer0.weight"] = radial
            state |= {f"{n}_convolution.convolution.{key}": value for key, value in product.state_dict().items()}
        width = Irreps(self.irreps[-1]).dim
        state["reduce_input_to_hidden.linear.weight"] = torch.ones(width)  # x.sum() / √width
        state["reduce_hidden_to_energy.linear.weight"] = torch.tensor([float(width) ** 0.5])
        state |= {"rescale_atomic_energy.shift": torch.zeros(2), "rescale_atomic_energy.scale": torch.ones(2)}
        config = {
            "version": "0.12.0", "_type_map": {1: 0, 8: 1}, "cutoff": 4.0, "num_convolution_layer": len(self.parts),
            "irreps_manual": self.irreps, "lmax": self.sh.lmax, "is_parity": parity, "radial_basis": {"radial_basis_name": "bessel"},
            "cutoff_function": {"cutoff_function_name": "poly_cut", "poly_cut_p_value": 6}, "weight_nn_hidden_neurons": [],
            "self_connection_type": "nequip" if self.elementwise else "linear", "_normalize_sph": True,
        }  # fmt: skip
        return {"model_state_dict": {key: value.detach() for key, value in state.items()}, "config": config}


NATURAL = ["4x0e", "4x0e+3x1o+2x2e", "4x0e+3x1o+2x2e", "4x0e"]
FULL = ["4x0e", "4x0e+3x1o+2x2e", "4x0e+3x1o+3x1e+2x2o+2x2e", "4x0o+4x0e+3x1o+2x1e+2x2o", "4x0e"]
EVEN = ["4x0e", "4x0e+3x1e+2x2e", "4x0e+3x1e+2x2e", "4x0e"]


@pytest.mark.parametrize("elementwise", [True, False], ids=["nequip", "linear"])
@pytest.mark.parametrize(("irreps", "parity"), [(NATURAL, -1), (FULL, -1), (EVEN, 1)], ids=["natural", "full", "even"])
def test_other_networks(irreps: list[str], parity: int, elementwise: bool, water: list[ase.Atoms]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = Original(irreps, 2, parity, elementwise).double()
    checkpoint = original.checkpoint(parity == -1)
    potential = small(checkpoint)
    assert potential.backbone.symmetry == ("E3" if parity == -1 else "SE3")  # type: ignore[union-attr]
    # Energies of e3nn's modules; its activations are normalised by a random estimate, which is good to some digits.
    ours = outputs(potential, water)["energy"]
    theirs = [float(original(atoms).detach()) for atoms in water]
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    testing.check_symmetry(potential, water[0])


def test_irreps_by_channels(tiny: ModuleType, water: list[ase.Atoms]) -> None:
    """A file without irreps_manual has the same channels for everything that products give."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = Original(["4x0e", "4x0e+4x1o", "4x0e+4x1o+4x1e", "4x0e"], 1, -1, True).double()
    explicit = original.checkpoint(True)
    implicit = {**explicit, "config": explicit["config"] | {"irreps_manual": False, "channel": 4}}
    assert alike(outputs(small(implicit), water), outputs(small(explicit), water))
