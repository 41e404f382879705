"""OC20's evaluator, as fairchem's gives it, its splits in one table, and submissions that are read back and scored."""

import json
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
import torch
from ase.build import add_adsorbate, fcc111
from ase.constraints import FixAtoms

from matfound import unpickle
from matfound.cli.main import main
from matfound.data.files import FileDataset
from matfound.data.open import open_dataset
from matfound.errors import InputError
from matfound.evaluation import oc20
from matfound.models.base import Potential
from matfound.models.checkpoint import save


def test_the_evaluator_is_reproduced_exactly(shared_data: Path) -> None:
    folder = shared_data / "golden/evaluator"
    data: Any = unpickle.load(folder / "data.pt")
    reference = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    got, want = data["s2ef_pred"], data["s2ef_target"]
    energy = oc20.energy_errors(got["energy"], want["energy"])
    both = oc20.energy_forces_within_threshold(got["energy"], got["forces"], want["energy"], want["forces"], got["natoms"])
    ours = {
        "s2ef": energy | oc20.force_errors(got["forces"], want["forces"]) | both,
        "is2re": energy,
        "is2rs": oc20.position_errors(data["is2rs_pred"], data["is2rs_target"], data["cell"], data["natoms"]),
    }
    for task, expected in reference.items():
        for name, value in expected.items():
            assert ours[task][name] == (value["total"], value["numel"]), name
            assert oc20.metrics(ours[task])[name] == value["metric"]


def test_thresholds_are_strict() -> None:
    energy, forces, natoms = torch.tensor([0.02, 0.0], dtype=torch.float64), torch.zeros(2, 3).double(), torch.tensor([1, 1])
    zero = torch.zeros(2).double()
    assert oc20.energy_errors(energy, zero)["energy_within_threshold"] == (1, 2)
    forces[1, 2] = 0.03
    found = oc20.energy_forces_within_threshold(energy, forces, zero, torch.zeros(2, 3).double(), natoms)
    assert found["energy_forces_within_threshold"] == (0, 2)
    forces[1, 2] = 0.03 - 1e-9
    found = oc20.energy_forces_within_threshold(energy, forces, zero, torch.zeros(2, 3).double(), natoms)
    assert found["energy_forces_within_threshold"] == (1, 2)


def test_distances_are_wrapped() -> None:
    cell = torch.tensor([[[4.0, 0, 0], [1, 5, 0], [0, 0, 20]]])
    target = torch.tensor([[0.1, 0.2, 0.3]])
    pos, natoms = target + cell[0, 0] - cell[0, 1] + torch.tensor([0.2005, 0, 0]), torch.tensor([1])
    name = "positions_average_distance_within_threshold"
    expected = float((oc20.DISTANCES > 0.2005).sum())
    assert oc20.position_errors(pos, target, cell, natoms)[name] == (expected, 490)
    assert oc20.position_errors(pos, target, cell, natoms, (False, False, False))[name] == (0, 490)


@pytest.fixture
def slabs(morse: Any) -> list[ase.Atoms]:
    """Slabs with fixed layers; their labels are the oracle's, relaxed ones those of the same structure, moved."""
    found = []
    for k, element in enumerate(("Cu", "Si", "Cu")):
        atoms = fcc111(element, (2, 1, 2 + k % 2), a=3.3, vacuum=5.0)
        add_adsorbate(atoms, "O", 1.6, "ontop")
        atoms.pbc = True
        atoms.rattle(0.03, seed=k)
        atoms.set_constraint(FixAtoms([atom.index for atom in atoms if atom.tag > 1]))
        energy, forces, _ = morse.oracle(atoms)
        atoms.arrays["relaxed_pos"] = atoms.positions + 0.01
        del atoms.info["adsorbate_info"]
        atoms.info |= {"frame_id": f"s{100 + k}_{k}", "relaxed_energy": energy + 0.01, "REF_energy": energy + 0.01}
        forces[[atom.index for atom in atoms if atom.tag > 1]] += 100.0  # which must not count
        atoms.arrays["REF_forces"] = forces + 0.01
        found.append(atoms)
    return found


@pytest.fixture
def files(slabs: list[ase.Atoms], tmp_path: Path) -> dict[str, Path]:
    """Four splits: two frames, one frame, three, one."""
    paths = {}
    for split, frames in zip(oc20.SPLITS, (slabs[:2], slabs[2:], slabs, slabs[:1]), strict=True):
        paths[split] = tmp_path / f"{split}.extxyz"
        ase.io.write(paths[split], frames)
    return paths


KEYS = {"energy": "REF_energy", "forces": "REF_forces"}


def datasets(files: dict[str, Path]) -> dict[str, FileDataset]:
    return {split: open_dataset(path, keys=KEYS) for split, path in files.items()}  # type: ignore[misc]


def test_s2ef(files: dict[str, Path], slabs: list[ase.Atoms], morse: Any, tmp_path: Path) -> None:
    potential = morse.potential()
    result = oc20.evaluate("s2ef", potential, dict(reversed(datasets(files).items())), max_atoms=10)
    assert list(result.splits) == list(oc20.SPLITS)
    rows = result.rows()
    assert [row["split"] for row in rows] == [*oc20.SPLITS, "mean"]
    for row in rows:
        assert row["energy MAE (eV)"] == pytest.approx(0.01, abs=1e-6)
        assert row["forces MAE (eV/Å)"] == pytest.approx(0.01, abs=1e-6)
        assert row["EFwT (%)"] == 100.0
    file = oc20.write_submission(result, tmp_path / "new" / "s2ef.npz")
    content = np.load(file, allow_pickle=False)
    assert set(content.files) == {f"{split}_{key}" for split in oc20.SPLITS for key in ("ids", "energy", "forces", "chunk_idx")}
    free = [len(atoms) - len(atoms.constraints[0].index) for atoms in slabs]
    assert content["ood_cat_ids"].tolist() == ["s100_0", "s101_1", "s102_2"]
    assert content["ood_cat_energy"].shape == (3,)
    assert content["ood_cat_forces"].shape == (sum(free), 3)
    assert content["ood_cat_chunk_idx"].tolist() == [free[0], free[0] + free[1]]
    assert content["ood_both_chunk_idx"].shape == (0,)
    again = oc20.score_submission("s2ef", file, datasets(files))
    for split in oc20.SPLITS:
        ours, theirs = (oc20.metrics(found.splits[split].totals) for found in (result, again))
        assert theirs == pytest.approx(ours, abs=1e-4)  # float32


def test_is2re_and_is2rs(files: dict[str, Path], slabs: list[ase.Atoms], morse: Any, tmp_path: Path) -> None:
    potential = morse.potential()
    direct = oc20.evaluate("is2re", potential, datasets(files))
    assert direct.rows()[0]["energy MAE (eV)"] == pytest.approx(0.01, abs=1e-6)
    assert set(np.load(oc20.write_submission(direct, tmp_path / "is2re.npz")).files) == {
        f"{split}_{key}" for split in oc20.SPLITS for key in ("ids", "energy")
    }
    relaxed = oc20.evaluate("is2rs", potential, {"id": datasets(files)["id"]}, fmax=0.3, max_steps=20)
    totals = oc20.metrics(relaxed.splits["id"].totals)
    assert 0 < totals["positions_average_distance_within_threshold"] < 1
    content = np.load(oc20.write_submission(relaxed, tmp_path / "is2rs.npz"))
    assert set(content.files) == {"id_ids", "id_pos", "id_chunk_idx"}
    assert content["id_pos"].shape == (len(slabs[0]) + len(slabs[1]), 3)
    assert content["id_chunk_idx"].tolist() == [len(slabs[0])]
    fixed = slabs[0].constraints[0].index
    assert np.allclose(content["id_pos"][fixed], slabs[0].positions[fixed], atol=1e-5)
    assert np.abs(content["id_pos"][: len(slabs[0])] - slabs[0].positions).max() > 1e-3
    again = oc20.score_submission("is2rs", tmp_path / "is2rs.npz", {"id": datasets(files)["id"]})
    name = "positions_mae"
    assert oc20.metrics(again.splits["id"].totals)[name] == pytest.approx(totals[name], abs=1e-5)


def test_mistakes(files: dict[str, Path], morse: Any, tmp_path: Path) -> None:
    result = oc20.evaluate("s2ef", morse.potential(), {"id": datasets(files)["id"]})
    file = oc20.write_submission(result, tmp_path / "s2ef.npz")
    with pytest.raises(InputError, match="'ood_ads' is not in the file"):
        oc20.score_submission("s2ef", file, datasets(files))
    with pytest.raises(InputError, match="'s102_2' of split 'id' is not in the file"):
        oc20.score_submission("s2ef", file, {"id": datasets(files)["ood_ads"]})
    with pytest.raises(InputError, match="no array 'id_pos'"):
        oc20.read_submission("is2rs", file)
    with pytest.raises(InputError, match="no split 'ood_ad' .*ood_ads|no split 'ood_ad'"):
        oc20.evaluate("s2ef", morse.potential(), {"ood_ad": datasets(files)["id"]})
    (tmp_path / "text.npz").write_text("no")
    with pytest.raises(InputError, match="cannot be read"):
        oc20.read_submission("s2ef", tmp_path / "text.npz")
    result.splits["id"].predictions[1].forces = np.zeros((1, 3))
    with pytest.raises(InputError, match="'s101_1' has .* atoms to predict, received 1"):
        oc20.score_submission("s2ef", oc20.write_submission(result, file), {"id": datasets(files)["id"]})


def test_command_line(shared_data: Path, small_slab_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On OC20's own formats."""
    data = shared_data / "data/oc20"
    out = tmp_path / "out"
    options = ["--model", str(small_slab_model), "--index", ":2", "--out", str(out)]
    assert main(["evaluate", "oc20-s2ef", f"{data / 's2ef_ref.lmdb'}", f"ood_cat={data / 's2ef_ref.lmdb'}", *options]) == 0
    shown = capsys.readouterr().out
    assert "ood_cat" in shown and "EFwT" in shown and "not in the file: ood_ads, ood_both" in shown
    content = json.loads((out / "oc20_s2ef.json").read_text(encoding="utf-8"))
    assert content["splits"]["id"]["energy_mae"]["numel"] == 2
    assert "| ood_cat |" in (out / "oc20_s2ef.md").read_text(encoding="utf-8")
    score = ["--submission", str(out / "oc20_s2ef.npz"), "--index", ":2"]
    assert main(["evaluate", "oc20-s2ef", str(data / "s2ef_ref.lmdb"), *score]) == 0
    assert "EFwT" in capsys.readouterr().out
    assert main(["evaluate", "oc20-is2re", str(data / "is2re_ref.lmdb"), *options]) == 0
    relaxing = ["--max-steps", "1", "--index", "0"]
    assert main(["evaluate", "oc20-is2rs", str(data / "is2re_ref.lmdb"), *options[:2], *relaxing]) == 0
    assert "ADwT" in capsys.readouterr().out
    assert main(["evaluate", "oc20-s2ef", str(data / "s2ef_ref.lmdb")]) == 1


@pytest.fixture
def small_slab_model(tmp_path: Path) -> Path:
    """A model that takes every element."""
    from matfound.models.perceptron_heads import PerceptronEnergy
    from matfound.models.schnet import SchNet

    torch.manual_seed(0)
    potential = Potential(SchNet(4.0, 20, 4, 4, 1, 5), {"energy": PerceptronEnergy([4])})
    potential.heads["energy"].table.reference.zero_()
    return save(potential, tmp_path / "schnet")
