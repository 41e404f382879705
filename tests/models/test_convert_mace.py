"""Exported ScaleShiftMACE models reproduce the original: a stored one, and others built here from the equations."""

import copy
import json
import lzma
import math
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch

from matfound.cli.main import main
from matfound.errors import InputError
from matfound.inference.predict import predict
from matfound.models import checkpoint
from matfound.models.base import Potential
from matfound.models.convert import convert, mace
from matfound.models.mace import MACE
from matfound.structures.ase import from_atoms
from matfound.testing import check_model

GOLDENS = Path(__file__).parent / "goldens" / "mace"
#: Facts of the model, and all arrays by name.
Golden = tuple[dict[str, Any], dict[str, np.ndarray]]


def read_golden(name: str = "scale_shift_mace") -> Golden:
    content = lzma.decompress((GOLDENS / f"{name}.xz").read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    values, arrays = np.frombuffer(content, "<f8", offset=start), {}
    for name, (shape, dtype) in header["arrays"].items():
        size = math.prod(shape)
        arrays[name], values = values[:size].reshape(shape).astype(dtype), values[size:]
    return header["config"], arrays


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden()


@pytest.fixture
def export(golden: Golden) -> dict[str, Any]:
    return exported(golden)


def exported(golden: Golden) -> dict[str, Any]:
    """What the documented lines would have saved."""
    config, arrays = golden
    state = {name.partition("/")[2]: torch.from_numpy(np.array(value)) for name, value in arrays.items() if name.startswith("state/")}
    return {"state_dict": state, "config": copy.deepcopy(config)}


@pytest.fixture(scope="module")
def structures(golden: Golden) -> list[ase.Atoms]:
    _, arrays = golden
    numbers = sorted({name.split("/")[1] for name in arrays if name.startswith("structure/")})
    return [ase.Atoms(**{key: arrays[f"structure/{n}/{key}"] for key in ("numbers", "positions", "cell", "pbc")}) for n in numbers]


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def outputs(potential: Potential, structures: list[ase.Atoms], dataset: str | None = None) -> list[dict[str, np.ndarray]]:
    found = predict(potential, [from_atoms(atoms, labels=False) for atoms in structures], dataset=dataset)
    return [{name: np.asarray(value) for name, value in row.items()} for _, row in found]


def assert_equal_outputs(got: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]], tolerance: float) -> None:
    for name in ("energy", "energies", "forces", "stress"):
        pairs = [(a[name], b[name].reshape(a[name].shape)) for a, b in zip(got, expected, strict=True) if name in a]
        pairs = [(a, b) for a, b in pairs if not np.isnan(a).all()]
        largest = max(float(np.abs(b).max()) for _, b in pairs)
        assert largest > 1e-3
        for a, b in pairs:  # of a lone atom's forces, which are zero, nothing is left
            assert np.abs(a - b).max() <= tolerance * max(float(np.abs(b).max()), 1e-3 * min(largest, 1.0)), name


def stored(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    numbers = sorted({name.split("/")[1] for name in arrays if name.startswith("output/")})
    return [{key: arrays[f"output/{n}/{key}"] for key in ("energy", "energies", "forces", "stress")} for n in numbers]


@pytest.mark.parametrize("name", ["scale_shift_mace", "density_mace"])
def test_outputs_of_the_original(name: str, structures: list[ase.Atoms], tmp_path: Path) -> None:
    golden = read_golden(name)
    potential = convert(save(tmp_path / "mace.pt", exported(golden)), licence="MIT")
    assert potential.dtype == torch.float64 and potential.licence == "MIT" and potential.datasets == ["default"]
    assert sorted(potential.elements(0)) == [1, 8]
    assert_equal_outputs(outputs(potential, structures), stored(golden[1]), 1e-11)
    check_model(potential, structures[2:3])


def test_parts_of_pairs_that_do_not_fit(tmp_path: Path) -> None:
    export = exported(read_golden("density_mace"))
    export["state_dict"]["pair_repulsion_fn.p"] += 1
    with pytest.raises(InputError, match="envelope of the repulsion"):
        convert(save(tmp_path / "mace.pt", export))
    export["config"]["interaction_cls_first"] = "RealAgnosticInteractionBlock"
    with pytest.raises(InputError, match="normalised in another way"):
        convert(save(tmp_path / "mace.pt", export))


def test_float32_files_stay_float32(golden: Golden, export: dict[str, Any], structures: list[ase.Atoms], tmp_path: Path) -> None:
    """Their coupling coefficients are float32, too."""
    state = export["state_dict"]
    export["state_dict"] = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    potential = convert(save(tmp_path / "mace.pt", export))
    assert potential.dtype == torch.float32
    assert_equal_outputs(outputs(potential.double(), structures), stored(golden[1]), 3e-6)


def test_redundant_trees_and_other_bases_of_the_same_space(export: dict[str, Any], structures: list[ase.Atoms], tmp_path: Path) -> None:
    """Any coefficients that span the space will do, e.g. those of `use_reduced_cg`: the weights follow them."""
    expected = outputs(convert(save(tmp_path / "a.pt", export)), structures)
    torch.manual_seed(0)
    state = export["state_dict"]
    for name in [name for name in state if name.endswith("weights_max")]:
        u = name.replace("weights_max", "U_matrix_3")
        mixing = torch.linalg.qr(torch.randn(state[name].shape[1], state[name].shape[1], dtype=torch.float64)).Q
        state[u] = state[u] @ mixing
        state[name] = torch.einsum("etc,ts->esc", state[name], mixing)
    assert_equal_outputs(outputs(convert(save(tmp_path / "b.pt", export)), structures), expected, 1e-12)


def with_heads(export: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The same model with as many heads, which differ in their readouts, scales and references."""
    state, count = export["state_dict"], len(names)
    generator = torch.Generator().manual_seed(1)

    def more(name: str, *shape: int) -> torch.Tensor:
        old = state[name].reshape(*shape, 1)
        return torch.cat([old, *(torch.randn(*shape, 1, generator=generator, dtype=torch.float64) for _ in names[1:])], dim=-1)

    state["readouts.0.linear.weight"] = more("readouts.0.linear.weight", 2).flatten()
    hidden = more("readouts.1.linear_1.weight", 2, 4)  # of each head its own units, side by side
    state["readouts.1.linear_1.weight"] = hidden.transpose(1, 2).flatten()
    # Normalised by all units: the first head stays what it was with a factor. Weights between different heads are never used.
    last = torch.randn(count, 4, count, generator=generator, dtype=torch.float64)
    last[0, :, 0] = state["readouts.1.linear_2.weight"] * count**0.5
    state["readouts.1.linear_2.weight"] = last.flatten()
    for name in ("scale", "shift"):
        state[f"scale_shift.{name}"] = more(f"scale_shift.{name}").flatten()
    state["atomic_energies_fn.atomic_energies"] = more("atomic_energies_fn.atomic_energies", 2).T.contiguous()
    export["config"]["heads"] = names
    return export


def test_heads_become_levels_of_theory(golden: Golden, export: dict[str, Any], structures: list[ase.Atoms], tmp_path: Path) -> None:
    potential = convert(save(tmp_path / "heads.pt", with_heads(export, ["pbe", "r2scan"])))
    assert potential.datasets == ["pbe", "r2scan"]
    assert_equal_outputs(outputs(potential, structures, "pbe"), stored(golden[1]), 1e-12)
    other = outputs(potential, structures, "r2scan")
    assert abs(float(other[0]["energy"].item() - stored(golden[1])[0]["energy"].item())) > 1e-3
    with pytest.raises(InputError, match="levels of theory pbe, r2scan, received a, b"):
        convert(tmp_path / "heads.pt", ["a", "b"])


def test_command_line(export: dict[str, Any], structures: list[ase.Atoms], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save(tmp_path / "mace.pt", export)
    assert main(["convert", str(file), str(tmp_path / "mine"), "--datasets", "water"]) == 0
    assert "MACE, " in capsys.readouterr().out
    again = checkpoint.load(tmp_path / "mine")
    assert again.datasets == ["water"] and isinstance(again.backbone, MACE)
    assert_equal_outputs(outputs(again, structures), outputs(convert(file), structures), 1e-14)


@pytest.mark.parametrize(("option", "value"), [
    ("interaction_cls", "RealAgnosticResidualNonLinearInteractionBlock"),
    ("interaction_cls_first", "RealAgnosticAttResidualInteractionBlock"),
    ("distance_transform", "Soft"),
    ("radial_type", "gaussian"),
    ("use_so3", True),
    ("gate", "tanh"),
])  # fmt: skip
def test_other_networks_are_refused(export: dict[str, Any], option: str, value: object, tmp_path: Path) -> None:
    export["config"][option] = value
    with pytest.raises(InputError, match=f"{option} = {value!r} is not known here"):
        convert(save(tmp_path / "mace.pt", export))


def test_unknown_tensors_are_listed(export: dict[str, Any], tmp_path: Path) -> None:
    export["state_dict"]["joint_embedding.weight"] = torch.ones(3)
    with pytest.raises(InputError, match=r"mace\.pt.*does not know: joint_embedding\.weight.*ScaleShiftMACE"):
        convert(save(tmp_path / "mace.pt", export))


def test_damaged_exports(export: dict[str, Any], tmp_path: Path) -> None:
    def attempt(change: dict[str, Any], state: dict[str, Any], without: tuple[str, ...] = ()) -> str:
        changed = {
            "state_dict": {k: v for k, v in (export["state_dict"] | state).items() if k not in without},
            "config": {k: v for k, v in (export["config"] | change).items() if k not in without},
        }
        with pytest.raises(InputError) as caught:
            convert(save(tmp_path / "mace.pt", changed))
        return str(caught.value)

    assert "could not describe" in attempt({"error": "Model is not a ScaleShiftMACE model"}, {})
    assert "lack 'max_ell'" in attempt({}, {}, ("max_ell",))
    assert "cannot be read" in attempt({"num_bessel": "many"}, {})
    assert "elements of the weights" in attempt({"atomic_numbers": [1, 9]}, {})
    assert "order of their degree" in attempt({"hidden_irreps": "2x1o+2x0e+2x2e"}, {})
    assert "same number of channels" in attempt({"hidden_irreps": "2x0e+1x1o"}, {})
    assert "is missing" in attempt({}, {}, ("products.0.linear.weight",))
    assert "expected 2 numbers" in attempt({}, {"readouts.0.linear.weight": torch.ones(3)})
    assert "not finite" in attempt({}, {"readouts.0.linear.weight": torch.full((2,), torch.nan)})
    assert "no tensor" in attempt({}, {"r_max": 4.0})
    assert "3 values for 1 heads" in attempt({}, {"scale_shift.scale": torch.ones(3)})
    name = "products.0.symmetric_contractions.contractions.0.U_matrix_2"
    wrong = export["state_dict"][name].clone()
    wrong[0, 1] += 1.0
    assert "U_matrix_2 of contraction 0 does not hold" in attempt({}, {name: wrong})
    name = next(name for name in export["state_dict"] if name.endswith("_w3j_1_1_2"))
    assert "neither ours nor minus ours" in attempt({}, {name: 2 * export["state_dict"][name]})
    assert not mace.recognises({"state_dict": {}, "config": {"r_max": 1.0}}) and not mace.recognises([1])


def test_signs_of_other_e3nn_versions(export: dict[str, Any], structures: list[ase.Atoms], tmp_path: Path) -> None:
    """A file whose coefficients have the other sign, and its weights too, is the same model."""
    expected = outputs(convert(save(tmp_path / "a.pt", export)), structures)
    state = export["state_dict"]
    (name,) = [name for name in state if name.startswith("interactions.1.") and name.endswith("_w3j_1_1_2")]
    state[name] = -state[name]
    changed = outputs(convert(save(tmp_path / "b.pt", export)), structures)
    assert abs(float(changed[2]["energy"].item() - expected[2]["energy"].item())) > 1e-6, "the path counts"
    # Into 2e lead 0⊗2, 1⊗1, 1⊗3, 2⊗0, 2⊗2 in the file's order, after the paths into 0e (3) and 1o (5 with 1⊗0, 1⊗2, …).
    weight = state["interactions.1.conv_tp_weights.layer1.weight"]
    spec = convert(tmp_path / "a.pt").backbone.layers[1].spec
    slot = next(k for i, j, k in spec.paths if (spec.blocks_in[i].ir.l, spec.blocks_sh[j].ir.l, spec.blocks_out[k].ir.l) == (1, 1, 2))
    weight[:, 2 * slot : 2 * slot + 2] *= -1
    assert_equal_outputs(outputs(convert(save(tmp_path / "c.pt", export)), structures), expected, 1e-12)


def test_pickled_models_are_not_read(tmp_path: Path) -> None:
    """The first thing that a `.model` file of mace-torch asks for is its class."""
    file = tmp_path / "my.model"
    file.write_bytes(b"\x80\x02cmace.modules.models\nScaleShiftMACE\n)\x81.")
    with pytest.raises(InputError, match=r"my\.model.*only its own code can read.*export it with mace-torch"):
        convert(file)
    with pytest.raises(InputError, match="an exported MACE model"):
        convert(save(tmp_path / "other.pt", {"weights": 1}))
