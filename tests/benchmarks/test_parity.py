"""Parity with the original Equiformers: a fixture passes, and one with other weights does not."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from matfound import unpickle


@pytest.fixture(scope="module")
def parity(repo: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("matfound_benchmarks_parity", repo / "benchmarks/parity.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["matfound_benchmarks_parity"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(shared_data: Path, tmp_path: Path) -> Path:
    """A fixture with denoising, and one of its cases."""
    for name in ("eqv3_mptrj_dens_l4", "eqv3_mptrj_dens_l4_nacl"):
        shutil.copytree(shared_data / "golden" / name, tmp_path / name, copy_function=shutil.copyfile)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def test_a_fixture_passes(parity: ModuleType, folder: Path) -> None:
    out = folder / "ours.npz"
    assert parity.main([str(folder), "--require", "eqv3", "--save", str(out)]) == 0
    content = unpickle.load(folder / "eqv3_mptrj_dens_l4_nacl/data.pt")
    saved = np.load(out)
    for part, reference in (("", content["outputs_f64"]), ("dens/", content["dens"]["outputs_f64"])):
        for key, value in reference.items():
            ours = saved[f"eqv3_mptrj_dens_l4_nacl/{part}{key}_f64"]
            assert np.abs(ours.reshape(value.shape) - value.numpy()).max() < 1e-12


def test_other_weights_do_not_pass(parity: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "eqv3_mptrj_dens_l4/state_dict.pt"
    state = unpickle.load(file)
    state["blocks.1.ga.so2_linear_2.so2_m_linear.1.fc.weight"][0, 0] += 1e-3
    torch.save(state, file)
    assert parity.main([str(folder), "--require", "eqv3"]) == 1
    assert "OFF" in capsys.readouterr().out


def test_the_mask_of_the_float64_run_is_drawn_again(parity: ModuleType, folder: Path) -> None:
    content = unpickle.load(folder / "eqv3_mptrj_dens_l4_nacl/data.pt")
    masks = [parity.noise_mask(content, precision) for precision in ("f32", "f64")]
    assert torch.equal(masks[0], content["dens"]["noise_mask"])
    assert not torch.equal(masks[1], masks[0])
    content["dens"]["forces"] += 0.1  # another draw: what is stored counts
    assert torch.equal(parity.noise_mask(content, "f64"), content["dens"]["noise_mask"])
