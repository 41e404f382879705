"""Pages of OC20, OMat24, ToyMix, LargeMix and ABX3, of tables and of damaged rows."""

import json

import ase
import ase.build
import ase.io
import numpy as np
import pytest
from rich.console import Console

from matfound.cli.main import main
from matfound.data import info_tables
from matfound.data.dataset import Dataset, Problem
from matfound.data.info import chosen, describe
from matfound.data.info_text import render
from matfound.data.open import open_dataset
from matfound.errors import InputError
from matfound.structures.ase import from_atoms


def shown(description) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(description))
    return captured.get()


def page(shared_data, name, **options):
    found = describe(open_dataset(shared_data / "data" / name, **options))
    assert json.loads(json.dumps(found.to_dict()))["frames"] == found.frames
    return found, shown(found)


def test_oc20_s2ef(shared_data) -> None:
    found, text = page(shared_data, "oc20/s2ef_ref.lmdb")
    facts = dict(found.facts)
    assert facts["tags"] == "subsurface 164, surface 120 atoms"
    assert facts["fixed"] == "164 atoms in 8 frames"
    assert facts["systems"] == "2 (sid), each with 4 frames (fid)"
    assert "adsorption energies" in text and "no atom is tagged as adsorbate" in text


def test_oc20_is2re(shared_data) -> None:
    found, _ = page(shared_data, "oc20/is2re_ref.lmdb")
    rows = {entry.quantity: entry for entry in found.fields}
    assert rows["relaxed_energy"].frames == 2
    dataset = open_dataset(shared_data / "data/oc20/is2re_ref.lmdb")
    moved = []
    for i in range(2):
        atoms = dataset.get(i).to_atoms()
        between = dataset.get(i).relaxed_pos.numpy() - atoms.positions
        images = [between + np.array(shift) @ atoms.cell.array for shift in np.ndindex(3, 3, 3) for shift in [np.array(shift) - 1]]
        moved.append(np.min([np.linalg.norm(image, axis=1) for image in images], axis=0))
    np.testing.assert_allclose(rows["relaxation (distance)"].mean, np.concatenate(moved).mean(), rtol=1e-9)
    assert dict(found.facts)["systems"] == "2 (sid), each with 1 frame"


def test_a_store_says_where_it_comes_from(shared_data, tmp_path) -> None:
    assert main(["data", "convert", str(shared_data / "data/oc20/s2ef_ref.lmdb"), str(tmp_path / "store")]) == 0
    found = describe(open_dataset(tmp_path / "store"))
    facts = dict(found.facts)
    assert facts["store"].startswith("8 rows in 1 shard, ") and facts["made from"].startswith(
        "s2ef_ref.lmdb (561,152 bytes, sha256 69bddc7e0730…)"
    )
    upstream = describe(open_dataset(shared_data / "data/oc20/s2ef_ref.lmdb"))
    assert (found.fields, found.elements, found.note) == (upstream.fields, upstream.elements, upstream.note)
    assert dict(upstream.facts).items() <= facts.items()


def test_adsorbates(shared_data) -> None:
    found, _ = page(shared_data, "fairchem/tutorials_data_toy_c3h8_relax.extxyz")
    assert dict(found.facts)["adsorbates"] == "in 101 of 101 frames"


def test_omat24_subsets(shared_data, tmp_path) -> None:
    for name in ("aimd-from-PBE-1000-npt", "rattled-300"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.0000.aselmdb").write_bytes((shared_data / "data/oc20/omat_like_ref.aselmdb").read_bytes())
    found = describe(open_dataset([tmp_path / "aimd-from-PBE-1000-npt", tmp_path / "rattled-300"]))
    assert dict(found.facts)["subsets"] == "aimd-from-PBE-1000-npt 4, rattled-300 4"
    assert found.duplicates == 4
    rows = {entry.quantity: entry for entry in found.fields}
    stress = np.concatenate([open_dataset(tmp_path / "rattled-300").get(i).stress.numpy() for i in range(4)])
    pressure = np.trace(stress, axis1=1, axis2=2) / 3
    assert rows["stress, isotropic"].mean == pytest.approx(pressure.mean())
    rest = np.linalg.norm(stress - pressure[:, None, None] * np.eye(3), axis=(1, 2))
    assert rows["|stress, anisotropic|"].maximum == pytest.approx(rest.max())


def test_tox21(shared_data) -> None:
    found, text = page(shared_data, "molecules/tox21_7831_chembench.csv.gz")
    (group,) = found.groups
    assert (group.field, group.level, group.rows, len(group.labels)) == ("tox21", "system", 7831, 12)
    assert sum(label.present for label in group.labels) == 77_946
    active = {label.name: label.classes for label in group.labels}["NR-AR"]
    assert active == {"0": 6956, "1": 309}
    assert found.unusable == 8 and len(found.problems) == 5
    assert found.problems[0].startswith("row 1322: 'NC(=O)NC1N=C(O[AlH3](O)O)NC1=O' is not a valid SMILES")
    assert "and 3 more" in text and "17.1 % missing" in text
    assert dict(found.facts)["molecules"] == "7,823 different by canonical SMILES"


def test_zinc_is_sampled(shared_data, monkeypatch) -> None:
    monkeypatch.setattr(info_tables, "SAMPLED", 1_000)
    found, text = page(shared_data, "molecules/zinc_jtvae_29445_rdkit_labels.csv.gz")
    assert (found.frames, found.looked_at, found.labelled) == (29_445, 1_000, 29_445)
    assert "checked 1,000 of 29,445 rows; --all checks every row" in text
    assert found.groups[0].labels[0].present == 29_445


def test_atom_labels(shared_data) -> None:
    found, text = page(shared_data, "molecules/graphium_fake_multilevel.parquet")
    nodes = next(group for group in found.groups if group.level == "atom")
    assert nodes.rows == found.atoms
    assert 0 < nodes.labels[0].present < nodes.rows
    assert "labels of every one" in text


def test_qm9(shared_data) -> None:
    found, text = page(shared_data, "molecules/qm9_10k_3d_mulliken.npz", index=":500")
    assert found.frames == 500
    units = {label.name: label.unit for label in found.groups[0].labels}
    assert units["alpha"] == "bohr^3" and "bohr³" in text
    assert {entry.field for entry in found.fields} >= {"charges", "gap"}


def test_abx3(shared_data) -> None:
    dataset = open_dataset(shared_data / "data/abx3/lcmgm_mp_perovskites.extxyz.xz", index="::4")
    found = describe(dataset)
    facts, text = dict(found.facts), shown(found)
    formulas = dataset.keys("reduced_formula")
    repeated = len(formulas) - len(set(formulas))
    assert repeated > 50
    assert facts["formulas"].startswith(
        f"{len(set(formulas)):,} different, reduced; {repeated} frames repeat one: split by reduced_formula"
    )
    patterns = ["ABC3" if stoic == "ABX3" else "ABC2D6" for stoic in dataset.keys("stoic")]
    assert facts["stoichiometry"] == ", ".join(f"{name} {patterns.count(name)}" for name in sorted(set(patterns), key=patterns.count)[::-1])
    assert f"cubic {dataset.keys('crystal_system').count('cubic')}, " in text
    assert any("hull_distance" in warning for warning in found.warnings)


def test_abc3(shared_data, monkeypatch) -> None:
    monkeypatch.setattr(info_tables, "LIMITS", {"FormulaRows": 500})
    found, text = page(shared_data, "abx3/abc3_data_mp.csv.xz")
    rows = {entry.quantity: entry for entry in found.fields}
    assert (rows["formation_energy"].frames, rows["formation_energy"].missing) == (4554, 3)
    assert rows["formation_energy"].first_missing
    crystal = next(group for group in found.groups if group.field == "crystal_system")
    assert sum(crystal.labels[0].classes.values()) == 4557 and "cubic" in crystal.labels[0].classes
    assert "none: compositions" in text
    assert "different, reduced" in dict(found.facts)["formulas"]


def test_descriptors(shared_data) -> None:
    found, text = page(shared_data, "abx3/perovskite_ML_combine_1453.csv.xz")
    (group,) = found.groups
    assert not group.label and len(group.labels) == 58
    assert "1 of the 58 inputs look like results of the calculation that gave the labels (Ehull)" in text


def test_perov(shared_data) -> None:
    found, text = page(shared_data, "perov_5/val.csv.xz")
    assert (found.frames, found.looked_at, found.labelled) == (3_787, 1_000, 3_787)
    assert {entry.quantity: entry.frames for entry in found.fields}["gap"] == 3_787
    assert "cif" not in {key.name for key in found.keys}
    assert "# generated" not in text


def test_pairs_of_molecules(shared_data) -> None:
    found, text = page(shared_data, "des/DES_init_update.csv.xz", index=":40")
    assert found.groups[0].labels[0].unit == "K"
    assert "✓ no suspicious values" in text


def sparse(tmp_path, rows=60, columns=1_328):
    rng = np.random.default_rng(0)
    names = [f"assayID-{k}" for k in range(columns)]
    lines = [",".join(["SMILES", *names])]
    for i in range(rows):
        cells = np.where(rng.random(columns) < 0.02 + 0.5 * (np.arange(columns) == 7), rng.integers(0, 2, columns).astype(str), "")
        lines.append(",".join(["C" * (1 + i // 2), *cells]))
    (tmp_path / "pcba.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "pcba.csv"


def test_many_columns_are_summed_up(tmp_path) -> None:
    found = describe(open_dataset(sparse(tmp_path)))
    text = shown(found)
    assert len(found.groups[0].labels) == 1_328
    assert "1,328 labels of 60 rows" in text and "the fullest and the emptiest" in text
    assert text.index("assayID-7 ") < text.index("assayID-", text.index("assayID-7 ") + 9)
    assert text.count("assayID-") == 10
    assert found.duplicates == 30 and "30 duplicates of earlier structures" in text
    assert found.first_duplicate[0].endswith("frame 0") and found.first_duplicate[1].endswith("frame 1")


def test_large_tables_are_read_in_part(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(info_tables, "VALUES", 2_000)
    (tmp_path / "t.csv").write_text("smiles,y,z\n" + "".join(f"{'C' * (i % 9 + 1)},{i},{i}\n" for i in range(3_000)))
    found = describe(open_dataset(tmp_path / "t.csv", labels={"g": ["y"]}))
    assert found.labelled <= 3_000
    every = describe(open_dataset(tmp_path / "t.csv", labels={"g": ["y"]}), None)
    assert every.labelled == every.looked_at == 3_000


def test_rows_with_bad_labels_are_listed(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("smiles,y\nC,1\nCC,inf\n,3\nC1,4\nCCC,5\n")
    found = describe(open_dataset(tmp_path / "t.csv", labels={"g": ["y"]}))
    assert found.unusable == 3
    assert [problem.partition(":")[0] for problem in found.problems] == ["row 1", "row 2", "row 3"]
    text = shown(found)
    assert "3 rows cannot be used" in text and "✓" not in text


def test_nothing_can_be_used(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("smiles,y\nC1,1\n")
    with pytest.raises(InputError, match="row 0|frame 0"):
        describe(open_dataset(tmp_path / "t.csv", labels={"g": ["y"]}))


class Damaged(Dataset):
    name = "damaged"
    sizes_ = (1, 2, 3)

    def __len__(self):
        return 4

    def get(self, i):
        if i == 2:
            raise InputError("is broken", file="x.lmdb", frame=2)
        if i == 9:
            raise InputError("the file is gone", file="x.lmdb")
        return from_atoms(ase.build.bulk("Cu", a=3.6 + 0.1 * i))

    def keys(self, name):
        return ["x"] * 4

    def place(self, i):
        return "x.lmdb", i

    @property
    def problems(self):
        return [Problem("x.lmdb", 7, "left out before")]


def test_damaged_rows_do_not_hide_the_others() -> None:
    found = describe(Damaged())
    assert found.problems == ["row 7: left out before", "row 2: is broken"]
    assert sum(found.pbc.values()) == 3

    class Gone(Damaged):
        def get(self, i):
            return super().get(9)

    with pytest.raises(InputError, match="the file is gone"):
        describe(Gone())


def test_only_some_frames() -> None:
    assert chosen(5, None) == chosen(5, 9) == [0, 1, 2, 3, 4]
    assert chosen(101, 3) == [0, 50, 100]
    found = describe(Damaged(), 2)
    assert (found.frames, found.looked_at) == (4, 2)
    assert "--all looks at every one" in shown(found)


def test_all_from_the_command_line(capsys, tmp_path, monkeypatch) -> None:
    from matfound.data import info

    ase.io.write(tmp_path / "x.extxyz", [ase.Atoms("H", [[0, 0, 0.1 * i]]) for i in range(9)])
    monkeypatch.setattr(info, "LIMIT", 3)
    assert main(["data", "info", str(tmp_path / "x.extxyz"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["looked_at"] == 3
    assert main(["data", "info", str(tmp_path / "x.extxyz"), "--json", "--all"]) == 0
    assert json.loads(capsys.readouterr().out)["looked_at"] == 9


def test_first_missing_over_chunks(monkeypatch, tmp_path) -> None:
    """A label that begins late, ends early, or has gaps: the first frame without it is named."""
    from matfound.data import info_survey

    monkeypatch.setattr(info_survey, "_FRAMES", 4)
    frames = []
    for i in range(12):
        atoms = ase.Atoms("H", [[0, 0, 0.1 * i]])
        atoms.info["gap"] = 1.0 + i
        if i < 5:
            atoms.info["energy"] = -1.0 * i
        if i > 8:
            atoms.info["formation_energy_per_atom"] = 1.0 * i
        frames.append(atoms)
    ase.io.write(tmp_path / "x.extxyz", frames)
    found = describe(open_dataset(tmp_path / "x.extxyz", allow_missing=True))
    rows = {entry.quantity: (entry.frames, entry.missing, entry.first_missing.rpartition(" ")[2]) for entry in found.fields}
    assert rows["gap"] == (12, 0, "")
    assert rows["energy"] == (5, 7, "5")
    assert rows["formation_energy"] == (3, 9, "0")
