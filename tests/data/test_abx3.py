import hashlib
import io

import numpy as np
import pandas as pd
import pytest
from ase.io.cif import parse_cif

from matfound import fields
from matfound.data import abx3
from matfound.data.dataset import taken
from matfound.data.files import FileDataset
from matfound.data.tables import open_table
from matfound.errors import InputError
from matfound.structures.atomic_data import collate


@pytest.fixture
def data(shared_data):
    return shared_data / "data"


#: What scikit-learn 1.7's train_test_split(range(n), test_size=0.3, random_state=9) gives: rows and sha256 of the sorted test set.
SKLEARN = {2: (1, 1, "7c9fa136d4413fa6"), 10: (7, 3, "05610b4d7eca03dc"), 11: (7, 4, "2f86ef17a9557396"),
           4557: (3189, 1368, "483122ac56156fb0"), 16323: (11426, 4897, "67c02452e15fd30e")}  # fmt: skip


@pytest.mark.parametrize("n", SKLEARN)
def test_the_papers_split_is_that_of_scikit_learn(n):
    split = abx3.paper_split(n)
    code = hashlib.sha256(np.array(split["test"], dtype="<i8").tobytes()).hexdigest()[:16]
    assert (len(split["train"]), len(split["test"]), code) == SKLEARN[n]
    assert sorted(split["train"] + split["test"]) == list(range(n))


def test_splits_of_too_little():
    with pytest.raises(InputError, match="1 rows cannot be split"):
        abx3.paper_split(1)


def test_grouped_split(data):
    formulas = open_table(data / "abx3" / "abc3_data_mp.csv.xz").keys("formula")
    split = abx3.grouped_split(formulas)
    assert not {formulas[i] for i in split["train"]} & {formulas[i] for i in split["test"]}
    assert len(split["train"]) + len(split["test"]) == 4557
    assert len(split["test"]) == pytest.approx(0.3 * 4557, abs=10)
    paper = abx3.paper_split(4557)
    assert len({formulas[i] for i in paper["train"]} & {formulas[i] for i in paper["test"]}) > 400, "the paper's split does not group"


def test_materials_project_table(data):
    file = data / "abx3" / "abc3_data_mp.csv.xz"
    expected = pd.read_csv(file)
    dataset = open_table(file)
    assert len(dataset) == len(expected) == 4557
    rows = list(range(0, 4557, 6))
    frames = [dataset.frame(i) for i in rows]
    columns = {"formation_energy": "formation_energy (eV/atom)", "hull_distance": "energy_above_hull (eV/atom)", "gap": "band_gap (eV)"}
    for field, column in columns.items():
        values = np.array([frame.data[field].item() for frame in frames])
        assert np.array_equal(values, expected[column].to_numpy()[rows], equal_nan=True)
    systems = [abx3.CRYSTAL_SYSTEMS[frame.data.crystal_system.item()] for frame in frames]
    assert all(name.startswith(short.strip("_")) for name, short in zip(systems, expected.crystal_system[rows], strict=True))
    trigonal = int(expected.index[expected.crystal_system == "trig"][0])
    triclinic = int(expected.index[expected.crystal_system == "tri"][0])
    assert [dataset.get(i).crystal_system.item() for i in (trigonal, triclinic)] == [4, 0]
    frame = frames[0]
    assert sorted(frame.data.numbers.tolist()) == [8, 8, 8, 13, 89]
    assert "pos" not in frame.data
    assert not frame.data.pbc.any()
    assert frame.info == {name: value for name, value in expected.iloc[0].to_dict().items() if not pd.isna(value)}
    assert set(columns.values()) <= taken(frame, dataset.key_map)
    assert "hull distance" in dataset.note


def test_perovskite_ml(data):
    file = data / "abx3" / "perovskite_ML_combine_1453.csv.xz"
    expected = pd.read_csv(file)
    dataset = open_table(file, features="descriptors")
    described = [name for name in expected if name not in ("formula", "Ef", "Eg")]
    field = fields.FIELDS["descriptors"]
    assert field.columns == tuple(described)
    assert not field.label, "an input"
    assert "Ehull" in described
    batch = dataset.batch(range(100))
    assert batch.descriptors.numpy().tobytes() == expected[described][:100].to_numpy().tobytes()
    assert batch.formation_energy.tolist() == expected.Ef[:100].tolist()
    assert batch.gap.tolist() == expected.Eg[:100].tolist()


def oqmd(rows=20, features=61, cs=("cubic", "trigonal", "orthorhombic", "tetragonal")):
    rng = np.random.default_rng(0)
    table = {
        "name": [["BaTiO3", "CsPbI3", "Ca1 Ti1 O3", "LaSiAs3"][i % 4] for i in range(rows)],
        "entry_id": range(rows), "icsd_id": [np.nan] * rows, "sg": ["Pm-3m"] * rows, "cs": [cs[i % 4] for i in range(rows)],
        "cs1": [i % 4 for i in range(rows)],
    }  # fmt: skip
    table |= {f"f{k}": rng.standard_normal(rows) for k in range(features - 1)} | {"count": rng.integers(0, 9, rows)}
    return pd.DataFrame(table | {"Ef": rng.standard_normal(rows), "Eg": rng.random(rows), "comment": "x"})


def test_the_users_oqmd_table(tmp_path):
    expected = oqmd()
    expected.loc[3, "f5"] = np.nan
    expected.to_csv(tmp_path / "oqmd_data.csv", index=False)
    dataset = open_table(tmp_path / "oqmd_data.csv")
    field = fields.FIELDS["features"]
    assert field.shape == (61,)
    assert field.columns == (*(f"f{k}" for k in range(60)), "count")
    data = dataset.get(3)
    assert data.numbers.tolist() == [57, 14, 33, 33, 33]
    assert np.array_equal(data.features.numpy()[0], expected.loc[3, list(field.columns)].to_numpy(float), equal_nan=True)
    assert data.formation_energy.item() == expected.Ef[3]
    assert data.gap.item() == expected.Eg[3]
    assert data.crystal_system.tolist() == [abx3.CRYSTAL_SYSTEMS.index("tetragonal")]
    info = dataset.frame(3).info
    assert info["name"] == "LaSiAs3"
    assert {"entry_id", "icsd_id", "sg", "cs", "cs1", "Ef", "Eg", "comment"} <= set(info)
    assert len(collate([dataset.get(i) for i in range(4)]).features) == 4
    assert "61 columns are the input 'features'" in dataset.note


def test_crystal_systems_that_are_none(tmp_path):
    oqmd(4, cs=("Cubic", "cubist", "mono", "tet")).to_csv(tmp_path / "t.csv", index=False)
    dataset = open_table(tmp_path / "t.csv")
    assert [dataset.get(i).crystal_system.item() for i in (0, 2, 3)] == [6, 1, 3]
    with pytest.raises(InputError, match="frame 1: 'cs' is 'cubist', expected one of triclinic"):
        dataset.get(1)
    fields.FIELDS.pop("features")
    oqmd(4, cs=(0, 3, 7, 2)).to_csv(tmp_path / "n.csv", index=False)
    numbered = open_table(tmp_path / "n.csv")
    assert numbered.get(1).crystal_system.item() == 3
    with pytest.raises(InputError, match="'cs' is 7, expected a class, 0 to 6"):
        numbered.get(2)


@pytest.mark.parametrize("formula", ["Ba0.5Sr0.5TiO3", "XyO3", "", "()", "Ba-Ti"])
def test_formulas_that_are_none(tmp_path, formula):
    (tmp_path / "t.csv").write_text(f'formula,Ef,Eg\n"{formula}",1,2\n"Ba(TiO3)2",1,2\n')
    dataset = open_table(tmp_path / "t.csv")
    assert dataset.get(1).numbers.tolist() == [56, 22, 8, 8, 8, 22, 8, 8, 8]
    with pytest.raises(InputError, match="t.csv: frame 0: 'formula' is"):
        dataset.get(0)


def test_perov_5(data):
    file = data / "perov_5" / "val.csv.xz"
    expected = pd.read_csv(file)
    dataset = open_table(file)
    assert len(dataset) == len(expected) == 3787
    for i in range(0, 3787, 60):
        frame = dataset.frame(i)
        block = next(iter(parse_cif(io.StringIO(expected.cif[i]))))
        atoms = block.get_unsymmetrized_structure()
        assert frame.data.numbers.tolist() == atoms.numbers.tolist()
        assert frame.data.pos.numpy().tobytes() == atoms.positions.tobytes()
        assert frame.data.cell.numpy()[0].tobytes() == atoms.cell.array.tobytes()
        assert frame.data.pbc.all()
        assert frame.data.formation_energy.item() == expected.heat_all[i]
        assert frame.data.gap.item() == expected.ind_gap[i]
        assert frame.info == expected.loc[i].to_dict()
    assert (expected.ind_gap <= expected.dir_gap).all(), "the indirect gap is the smaller one"


CIF = """data_x
_cell_length_a 4
_cell_length_b 4
_cell_length_c 4
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
{symmetry}
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
{sites}
"""


def cif_table(tmp_path, *texts):
    pd.DataFrame({"cif": texts}).to_csv(tmp_path / "t.csv", index=False)
    return open_table(tmp_path / "t.csv")


def test_other_cifs(tmp_path):
    sites = "Na1 Na 0 0 0 1\nCl1 Cl 0.5 0.5 0.5 1"
    symmetric = CIF.format(symmetry="_symmetry_space_group_name_H-M 'P m -3 m'\n_symmetry_Int_Tables_number 221", sites=sites)
    plain = CIF.format(symmetry="_symmetry_Int_Tables_number 1", sites="Na1 Na -0.25 0 0 1\nCl1 Cl 0.5 0.5 1.5 1")
    shared = CIF.format(symmetry="_symmetry_Int_Tables_number 1", sites=sites.replace("0.5 1", "0.5 0.5"))
    dataset = cif_table(tmp_path, symmetric, plain, shared, "no cif", symmetric + plain, "", CIF.format(symmetry="", sites="Q Q 0 0 0 1"))
    assert dataset.get(0).numbers.tolist() == [11, 17]
    assert dataset.get(1).pos.tolist() == [[-1, 0, 0], [2, 2, 6]], "not wrapped"
    for i, reason in {2: "occupancy", 3: "no CIF that can be used", 4: "2 structures", 5: "no CIF in the column", 6: "no CIF that"}.items():
        with pytest.raises(InputError, match=f"frame {i}: .*{reason}"):
            dataset.get(i)
    assert dataset.note == ""


def test_options_for_molecules_mean_nothing_for_crystals(data):
    with pytest.raises(InputError, match="'conformers' is for molecules, and this is a table of perov-5"):
        open_table(data / "perov_5" / "val.csv.xz", conformers=1)


def test_lcmgm_reads_beside_these_tables(data):
    """Its text 'crystal_system' is not taken for the class of the tables."""
    open_table(data / "abx3" / "abc3_data_mp.csv.xz")
    dataset = FileDataset(data / "abx3" / "lcmgm_mp_perovskites.extxyz.xz", keys={"gap": "band_gap"}, index=":5")
    data_ = dataset.get(0)
    assert data_.formation_energy.item() == 0.234286579
    assert data_.hull_distance.item() == 0.660889254
    assert data_.gap.item() == 0.0
    assert "crystal_system" not in data_
