"""What happens to published files that are not as they should be: each is refused with one line that names the file and the reason."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import ase
import pytest
import torch
from ase.build import bulk, molecule

import matfound
from matfound import unpickle
from matfound.errors import InputError
from matfound.models import published
from matfound.models.convert import convert

_spec = importlib.util.spec_from_file_location("matfound_tests_tiny_sevennet", Path(__file__).parent / "tiny_sevennet.py")
assert _spec is not None
assert _spec.loader is not None
tiny = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny)

needs_weights = pytest.mark.skipif(importlib.util.find_spec("sevenn") is None, reason="sevenn is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(file):
    with pytest.raises(InputError) as error:
        convert(file)
    text = str(error.value)
    assert str(file) in text
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------------ a small file, changed


def test_the_small_file_is_fine(tmp_path):
    potential = convert(tiny.write(tmp_path / "a.pth"))
    atoms = molecule("H2O")
    atoms.calc = matfound.Calculator(potential, dtype="float64")
    forces = atoms.get_forces()
    atoms.positions[0, 0] += 1e-4
    up = atoms.get_potential_energy()
    atoms.positions[0, 0] -= 2e-4
    assert forces[0, 0] == pytest.approx(-(up - atoms.get_potential_energy()) / 2e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("0_convolution.denominator", lambda _: None, ["'0_convolution.denominator' is missing"]),
        ("reduce_hidden_to_energy.linear.weight", lambda _: None, ["is missing"]),
        ("1_self_interaction_2.linear.weight", lambda t: t[:-1], ["'1_self_interaction_2.linear.weight'", "expected 24"]),
        ("0_self_connection_intro.linear.weight", lambda t: t * float("nan"), ["'0_self_connection_intro.linear.weight'", "not finite"]),
        ("onehot_to_feature_x.linear.weight", lambda t: t.tolist(), ["is no tensor but list"]),
        ("rescale_atomic_energy.shift", lambda t: t.repeat(2), ["'rescale_atomic_energy.shift'"]),
    ],
)
def test_changed_tensors(tmp_path, key, change, words):
    content = tiny.checkpoint()
    state = content["model_state_dict"]
    state[key] = change(state[key])
    if state[key] is None:
        del state[key]
    found = refused(tiny.write(tmp_path / "a.pth", content))
    for word in words:
        assert word in found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interaction_type": "mace"}, "interaction_type = 'mace'"),
        ({"act_gate": {"e": "tanh", "o": "tanh"}}, "act_gate"),
        ({"self_connection_type": "none"}, "self_connection_type = 'none'"),
        ({"cutoff_function": {"cutoff_function_name": "cosine"}}, "'cosine' is not known"),
        ({"irreps_manual": None}, "the training options lack 'channel'"),
        ({"cutoff": "five"}, "cannot be read"),
        ({"_type_map": {1: 0, 8: 2}}, "_type_map"),
    ],
)
def test_changed_options(tmp_path, options, words):
    assert words in refused(tiny.write(tmp_path / "a.pth", tiny.checkpoint(**options)))


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -1])
def test_truncated(tmp_path, keep):
    file = tiny.write(tmp_path / "a.pth")
    file.write_bytes(file.read_bytes()[:keep])
    refused(file)


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize("place", ["config", "model_state_dict", "optimizer_state_dict"])
def test_code_in_any_part_is_refused(tmp_path, place):
    content = tiny.checkpoint()
    content[place] = {**content[place], "extra": Evil()}
    found = refused(tiny.write(tmp_path / "a.pth", content))
    assert "refused" in found
    assert "exec" in found


# -------------------------------------------------------------------------------------------------------------- the real ones


@pytest.fixture
def real(tmp_path):
    """The content of the real SevenNet-0, and where to write a changed copy."""
    file = published.installed(published.card("sevennet-0")[2])
    assert file is not None
    return unpickle.load(file), tmp_path / "copy.pth"


@needs_weights
def test_unknown_keys_of_a_real_file_are_listed(real):
    content, copy_file = real
    state = copy.copy(content["model_state_dict"])
    for key in ("5_convolution.denominator", "readout_mlp.layer0.weight"):
        state[key] = torch.ones(1)
    torch.save({**content, "model_state_dict": state}, copy_file)
    assert "5_convolution.denominator, readout_mlp.layer0.weight" in refused(copy_file)


@needs_weights
def test_coefficients_of_no_known_convention(real):
    content, copy_file = real
    key = "1_convolution.convolution._compiled_main_left_right._w3j_1_1_2"
    state = {**content["model_state_dict"], key: content["model_state_dict"][key] * 0.5}
    torch.save({**content, "model_state_dict": state}, copy_file)
    assert "Clebsch-Gordan" in refused(copy_file)
    del state[key]
    torch.save({**content, "model_state_dict": state}, copy_file)
    assert "(1, 1, 2)" in refused(copy_file)


@needs_weights
@pytest.mark.parametrize("element", ["At", "Cm", "Po", "Ra", "Og"])
def test_elements_beyond(element, cache):
    atoms = ase.Atoms(element, cell=[9, 9, 9], pbc=True)
    atoms.calc = matfound.Calculator("sevennet-0")
    with pytest.raises(InputError, match=f"has not seen the element {element}"):
        atoms.get_potential_energy()


@needs_weights
def test_modality_is_asked_for():
    potential = matfound.load("sevennet-mf-0")
    with pytest.raises(InputError, match="R2SCAN, PBE"):
        bulk_energy(matfound.Calculator(potential))
    with pytest.raises(InputError, match="no level of theory 'HSE'"):
        matfound.Calculator(potential, head="HSE")
    assert bulk_energy(matfound.Calculator(potential, head="pbe")) != bulk_energy(matfound.Calculator(potential, head="R2SCAN"))


def bulk_energy(calculator):
    atoms = bulk("Cu")
    atoms.calc = calculator
    return atoms.get_potential_energy()


@needs_weights
def test_the_real_package_is_never_imported(cache):
    code = "import matfound, sys; matfound.load('sevennet-0'); assert not [m for m in sys.modules if m.partition('.')[0] == 'sevenn']"
    subprocess.run([sys.executable, "-c", code], check=True)
