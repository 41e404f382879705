import json
import re

import ase
import ase.build
import ase.io
import numpy as np
import pytest
from rich.console import Console

from matfound.cli.main import main
from matfound.data.dataset import Dataset
from matfound.data.files import FileDataset
from matfound.data.info import describe
from matfound.data.info_checks import energy_outliers
from matfound.data.info_text import render
from matfound.data.open import open_dataset
from matfound.structures.ase import from_atoms


def shown(description) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(render(description))
    return captured.get()


def described(tmp_path, frames, **options):
    ase.io.write(tmp_path / "x.extxyz", frames)
    return describe(FileDataset(str(tmp_path / "x.extxyz"), **options))


def row(description, quantity):
    return next(entry for entry in description.fields if entry.quantity == quantity)


def test_numbers_are_those_of_the_frames(tmp_path, frames):
    found = described(tmp_path, frames)
    assert found.frames == 12
    assert found.atoms == 72
    assert found.atoms_per_frame == (4, 6.0, 8)
    assert found.elements == {"Cu": {"atoms": 72, "frames": 12}}
    assert found.pbc == {"TTT": 12}
    assert found.config_types == {"even": 6, "odd": 6}
    assert found.volume_per_atom == pytest.approx((3.61**3 / 4,) * 3)
    energies = np.array([atoms.calc.results["energy"] for atoms in frames])
    norms = np.concatenate([np.linalg.norm(atoms.calc.results["forces"], axis=1) for atoms in frames])
    for quantity, values, unit in (
        ("energy", energies, "eV"),
        ("energy per atom", energies / [len(atoms) for atoms in frames], "eV/atom"),
        ("|forces|", norms, "eV/Å"),
        ("stress", np.concatenate([atoms.get_stress(voigt=False).ravel() for atoms in frames]), "eV/Å^3"),
    ):
        entry = row(found, quantity)
        assert entry.unit == unit
        assert (entry.frames, entry.missing, entry.first_missing) == (12, 0, "")
        np.testing.assert_allclose([entry.minimum, entry.mean, entry.maximum], [values.min(), values.mean(), values.max()], atol=1e-7)
    assert [key.name for key in found.keys] == ["group"]
    assert found.keys[0].content == "text: g0 4, g1 4, g2 4"
    assert found.warnings == []
    assert found.duplicates == 0
    assert "✓ no duplicates" in shown(found)


def test_missing_labels_are_counted(tmp_path, frames):
    for i in (2, 7):
        del frames[i].calc.results["forces"]
    found = described(tmp_path, frames, allow_missing=True)
    entry = row(found, "|forces|")
    assert (entry.frames, entry.missing) == (10, 2)
    assert entry.first_missing.endswith("x.extxyz: frame 2")


def test_keys_that_look_like_labels_get_a_hint(tmp_path, frames):
    for atoms in frames:
        results, atoms.calc = atoms.calc.results, None
        atoms.info.update(dft_energy=results["energy"], virial=np.eye(3), energy_per_atom=1.0, bandgap=0.5, ok=True, kpts=[1, 2, 3])
        atoms.info["note"] = {"a": 1}
        atoms.arrays["dft_forces"] = results["forces"]
        atoms.arrays["weights"] = np.ones(len(atoms))
    hints = {key.name: key.hint for key in described(tmp_path, frames).keys}
    assert hints["dft_energy"] == "--key energy=dft_energy"
    assert hints["dft_forces"] == "--key forces=dft_forces"
    assert hints["virial"] == "--key virial=virial"
    assert hints["energy_per_atom"] == hints["weights"] == hints["ok"] == hints["kpts"] == ""
    found = described(tmp_path, frames)
    assert found.fields == []
    text = shown(found)
    assert "No labels" in text
    assert "read it with" in text
    assert "yes or no: 12 yes" in text
    mapped = described(tmp_path, frames, keys={"energy": "dft_energy"})
    assert "dft_energy" not in {key.name for key in mapped.keys}
    assert row(mapped, "energy").frames == 12
    for atoms in frames:
        atoms.arrays["gradient"] = atoms.arrays.pop("dft_forces")
    assert {key.name: key.hint for key in described(tmp_path, frames).keys}["gradient"] == "--key forces=-gradient"


def test_ref_keys_are_read_without_being_named(tmp_path, frames):
    for atoms in frames:
        results, atoms.calc = atoms.calc.results, None
        atoms.info["REF_energy"] = results["energy"]
    found = described(tmp_path, frames)
    assert "REF_energy" not in {key.name for key in found.keys}
    assert row(found, "energy").frames == 12


def test_duplicates_also_by_lattice_vectors(tmp_path, frames):
    copied = frames[3].copy()
    copied.positions[2] += copied.cell[1] - 2 * copied.cell[0]
    copied.calc = frames[3].calc.__class__(copied, **frames[3].calc.results)
    found = described(tmp_path, [*frames, copied])
    assert found.duplicates == 1
    assert [place.rpartition("x.extxyz: ")[2] for place in found.first_duplicate] == ["frame 3", "frame 12"]
    assert "1 duplicate of earlier structures" in shown(found)
    assert found.warnings == []
    copied.calc.results["energy"] += 1
    assert "another energy" in " ".join(described(tmp_path, [*frames, copied]).warnings)


def test_large_forces(tmp_path, frames):
    frames[5].calc.results["forces"][1] = [0, 300, 400]
    (warning,) = described(tmp_path, frames).warnings
    assert warning.startswith("1 frame with forces above 100 eV/Å; the largest, 500 eV/Å")
    assert warning.endswith("x.extxyz: frame 5")


def outliers(energies, compositions):
    """The frames that `energy_outliers` names, for energies by frame and compositions as {atomic number: atoms}."""
    elements = sorted({z for composition in compositions for z in composition})
    table = np.array([[composition.get(z, 0) for z in elements] for composition in compositions]).reshape(len(compositions), len(elements))
    frames = np.array(list(energies), np.int64)
    return list(energy_outliers(frames, np.array(list(energies.values()), float), frames, table))


@pytest.mark.parametrize("bad", [0, 17, 39])
def test_energy_outliers_by_formula(bad):
    rng = np.random.default_rng(0)
    compositions = [{29: 4 + 4 * (i % 2)} for i in range(40)]
    energies = {i: sum(c.values()) * (-3.5 + 0.05 * rng.normal()) for i, c in enumerate(compositions)}
    assert outliers(energies, compositions) == []
    energies[bad] /= 27.2
    assert outliers(energies, compositions) == [bad]


def test_energy_outliers_by_elements():
    # All formulas differ; total energies of thousands of eV an atom; one in hartree.
    rng = np.random.default_rng(0)
    reference = {1: -14.0, 6: -1030.0, 8: -2040.0, 16: -10830.0}
    compositions = [{z: int(n) for z, n in zip(reference, rng.integers(0, 9, 4), strict=True) if n} or {1: 1} for _ in range(60)]
    energies = {i: sum(n * (reference[z] + rng.normal()) for z, n in c.items()) for i, c in enumerate(compositions)}
    assert outliers(energies, compositions) == []
    energies[23] /= 27.2
    assert outliers(energies, compositions) == [23]
    assert outliers({}, []) == []


@pytest.mark.parametrize("kind", ["molecule", "wrapped", "thin", "image", "same place", "large"])
def test_overlapping_atoms(tmp_path, kind):
    atoms = {
        "molecule": ase.Atoms("HH", positions=[[0, 0, 0], [0, 0, 0.3]]),
        "wrapped": ase.Atoms("HHe", positions=[[0.1, 0.1, 0.1], [6.9, 4.9, -0.1]], cell=[[5, 0, 0], [2, 5, 0], [0, 0, 5]], pbc=True),
        "thin": ase.Atoms("HHe", positions=[[0, 0, 0], [0, 0, 0.7]], cell=[3, 3, 0.9], pbc=True),
        "image": ase.Atoms("H", cell=[3, 3, 0.4], pbc=True),
        "same place": ase.Atoms("HHe", positions=[[0, 0, 0], [0, 0, 0.9]], cell=[3, 3, 0.9], pbc=True),
        "large": ase.build.bulk("Cu", cubic=True) * (4, 5, 5),
    }[kind]
    if kind == "large":
        atoms.positions[7] = atoms.positions[300] + [0.2, 0, 0]
    fine = ase.build.molecule("H2O")
    found = described(tmp_path, [fine, atoms])
    assert [w for w in found.warnings if "atoms nearer than 0.5 Å" in w and w.endswith("frame 1")], found.warnings


def test_no_overlap_in_what_is_near_but_fine(tmp_path):
    slab = ase.build.fcc111("Cu", (1, 1, 3), vacuum=5)
    slab.info = {}
    assert slab.pbc.tolist() == [True, True, False]
    crystal = ase.build.bulk("Cu") * (7, 7, 7)
    assert described(tmp_path, [ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]]), slab, crystal]).warnings == []


def test_placeholders(tmp_path, frames):
    for atoms in frames:
        atoms.calc.results["forces"] = np.zeros((len(atoms), 3))
    assert described(tmp_path, frames).warnings == ["'forces' is 0 everywhere in 12 frames: a placeholder?"]


def test_isolated_atoms_have_no_forces_and_that_is_fine():
    assert describe(open_dataset("minidft-atoms")).warnings == []


def test_minidft_is_clean():
    for name in ("minidft-molecules", "minidft-crystals"):
        found = describe(open_dataset(name))
        assert found.warnings == []
        assert found.duplicates == 0


def test_mixed_levels_of_theory_are_noticed():
    found = describe(open_dataset("minidft"))
    assert any("energy far from others" in warning for warning in found.warnings)


def test_many_kinds_and_files_are_cut_short(tmp_path, frames):
    many = [ase.Atoms("H", info={"config_type": f"kind{i}"}) for i in range(25)]
    for i, atoms in enumerate(many):
        ase.io.write(tmp_path / f"{i:02}.extxyz", atoms)
    text = shown(describe(FileDataset(str(tmp_path / "*.extxyz"))))
    assert "and 5 more" in text
    assert "and 17 more" in text


def test_brackets_in_names_are_printed_as_they_are(tmp_path, frames):
    frames[0].info["config_type"] = "[bold]x[/bold]"
    assert "[bold]x[/bold]" in shown(described(tmp_path, frames))


@pytest.mark.parametrize(
    "name", ["oc20/0.txt", "oc20/omat_like_ref.aselmdb", "oc20/random1000120.traj", "mlearn/Si_test.extxyz.xz", "acac/isolated_atoms.xyz"]
)
def test_real_data(shared_data, name):
    found = describe(open_dataset(shared_data / "data" / name))
    assert row(found, "energy").frames == found.frames
    assert json.loads(json.dumps(found.to_dict()))["frames"] == found.frames
    assert "energy per atom" in shown(found)
    if name == "oc20/0.txt":
        assert "adsorption energies" in shown(found)


# ---------------------------------------------------------------------------------------------------------------- command line


def test_command(capsys, tmp_path, frames):
    ase.io.write(tmp_path / "x.extxyz", frames)
    assert main(["data", "info", str(tmp_path / "x.extxyz")]) == 0
    out = capsys.readouterr().out
    assert "energy per atom" in out
    assert not any(line != line.rstrip() for line in out.splitlines())
    assert main(["data", "info", str(tmp_path / "x.extxyz"), "--json", "--index", ":5"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 5


def test_command_on_the_catalog(capsys):
    assert main(["data", "info", "minidft", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == ["minidft-molecules", "minidft-crystals", "minidft-atoms"]


def test_command_with_keys_and_units(capsys, tmp_path, frames):
    for atoms in frames:
        atoms.info["E"] = atoms.calc.results["energy"] / 0.04336410390059322
        atoms.calc = None
    ase.io.write(tmp_path / "x.extxyz", frames)
    assert main(["data", "info", str(tmp_path / "x.extxyz"), "--key", "energy=E", "--unit", "energy=kcal/mol", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fields"][1]["quantity"] == "energy per atom"
    assert -1 < found["fields"][1]["mean"] < 1
    assert main(["data", "info", str(tmp_path / "x.extxyz"), "--key", "energy=E", "--unit", "energy=kcl/mol"]) == 1
    assert "did you mean 'kcal'" in capsys.readouterr().err


def test_command_on_several_files(capsys, tmp_path, frames):
    ase.io.write(tmp_path / "a.extxyz", frames[:3])
    ase.io.write(tmp_path / "b.traj", frames[3:])
    assert main(["data", "info", str(tmp_path / "a.extxyz"), str(tmp_path / "b.traj"), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["files"].values()) == [3, 9]


def test_command_on_missing_labels(capsys, tmp_path, frames):
    del frames[7].calc.results["forces"]
    ase.io.write(tmp_path / "x.extxyz", frames)
    assert main(["data", "info", str(tmp_path / "x.extxyz")]) == 1
    captured = capsys.readouterr()
    assert re.search(r"forces\S* +eV/Å +11 +1 ", captured.out), "the page comes all the same"
    assert captured.err.startswith("matfound: error: ")
    assert "x.extxyz: frame 7: label 'forces' is missing" in captured.err
    assert captured.err.count("\n") == 1
    assert main(["data", "info", str(tmp_path / "x.extxyz"), "--allow-missing"]) == 0
    assert main(["data", "info", str(tmp_path / "nothing.xyz")]) == 1


def test_a_reader_of_one_s_own(frames):
    class Mine(Dataset):
        name = "mine"

        def __len__(self):
            return len(frames)

        def get(self, i):
            return from_atoms(frames[i])

        def keys(self, name):
            return ["x"] * len(frames)

        def place(self, i):
            return "memory", i

    found = describe(Mine())
    assert row(found, "energy").frames == 12
    assert Mine().natoms(1) == 8
    assert "mine" in shown(found)
