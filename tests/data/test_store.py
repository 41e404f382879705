import copy
import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matfound import fields
from matfound.data.convert import convert, convert_origin
from matfound.data.convert_sources import Origin
from matfound.data.dataset import Dataset, Frame
from matfound.data.open import open_dataset
from matfound.data.store import Store
from matfound.data.store_format import BLOCK, decoder, encode, from_json, narrow, to_json
from matfound.errors import InputError
from matfound.fields import FIELDS, Field
from matfound.structures.atomic_data import AtomicData, collate

OPTIONAL = [name for name, field in FIELDS.items() if not field.required and field.level != "edge"]
BONDS = ["bond_index", "bond_type"]


class Listed(Dataset):
    """Frames in memory."""

    name, note = "listed", "made up"

    def __init__(self, frames: list[Frame], files: int = 2) -> None:
        self.all, self.files = frames, files

    def __len__(self) -> int:
        return len(self.all)

    def get(self, i: int) -> AtomicData:
        return copy.copy(self.all[i].data)

    def frame(self, i: int) -> Frame:
        return self.all[i]

    def keys(self, name: str) -> list[str]:
        return [str(frame.info[name]) for frame in self.all]

    def place(self, i: int) -> tuple[str, int]:
        return f"part{i % self.files}.xyz", 10 * (i % len(self))


def stored(folder, frames, **options) -> Store:
    convert_origin(
        Origin(Listed([Frame(f, {}, {}) if isinstance(f, AtomicData) else f for f in frames]), "files", [], {}), folder, **options
    )
    return Store(folder)


def structure(natoms=3, seed=0, **more) -> AtomicData:
    rng = np.random.default_rng(seed)
    data = AtomicData(numbers=torch.tensor(rng.integers(1, 90, natoms)), pos=torch.tensor(rng.uniform(0, 4, (natoms, 3))))
    data.cell, data.pbc = torch.tensor(np.diag(rng.uniform(3, 6, 3)))[None], torch.full((1, 3), True)
    for name, value in more.items():
        data[name] = value
    return data


def some_value(field: Field, natoms: int, nbonds: int, rng: np.random.Generator, exact32: bool) -> torch.Tensor | str:
    if field.dtype == "str":
        return f"frame {rng.integers(10**9)} å"
    rows = {"atom": natoms, "bond": nbonds, "system": 1}[field.level]
    lead = (2, rows) if field.cat_dim == 1 else (rows,)
    if field.index:
        return torch.tensor(rng.integers(0, max(natoms, 1), lead))
    if field.dtype == "int64":
        return torch.tensor(rng.integers(-9, int(rng.choice([9, 300, 2**40])), lead))
    values = rng.normal(size=(*lead, *field.shape))
    values[rng.random(values.shape) < 0.1] = np.nan
    return torch.tensor(values.astype(np.float32).astype(np.float64) if exact32 else values)


def cook(plan: list[dict]) -> list[AtomicData]:
    made = []
    for each in plan:
        rng, natoms = np.random.default_rng(each["seed"]), each["natoms"]
        data = structure(natoms, each["seed"])
        nbonds = int(rng.integers(0, 5)) if natoms else 0
        for name in OPTIONAL:
            if not each["bonds"] if name in BONDS else name in each["absent"]:
                data.__dict__.pop(name, None)
            elif name != "pos":
                data[name] = some_value(FIELDS[name], natoms, nbonds, rng, each["exact32"])
        made.append(data)
    return made


def assert_equal(data: AtomicData, reference: AtomicData) -> None:
    """Bit for bit, NaN included."""
    assert set(data.keys()) == set(reference.keys())
    for name in reference.keys():
        assert type(data[name]) is type(reference[name]), name
        if isinstance(reference[name], torch.Tensor):
            assert (data[name].dtype, data[name].shape) == (reference[name].dtype, reference[name].shape), name
            assert data[name].is_contiguous()
            assert data[name].numpy().tobytes() == reference[name].contiguous().numpy().tobytes(), name
        else:
            assert data[name] == reference[name], name


recipe = st.fixed_dictionaries({
    "seed": st.integers(0, 2**32 - 1), "natoms": st.integers(0, 4), "bonds": st.booleans(), "exact32": st.booleans(),
    "absent": st.one_of(st.just(set()), st.just(set(OPTIONAL)), st.sets(st.sampled_from(OPTIONAL))),
})  # fmt: skip


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(recipe, min_size=1, max_size=7),
    st.integers(1, 7),
    st.lists(st.lists(st.integers(0, 10**6), min_size=1, max_size=8), min_size=1, max_size=4),
)
def test_batches_are_what_collate_makes(tmp_path_factory, plan, rows_per_shard, batches):
    """Any fields, present or not, over any shards: every structure comes back, and a batch is the batch of its structures."""
    made = cook(plan)
    store = stored(tmp_path_factory.mktemp("store") / "s", made, rows_per_shard=rows_per_shard)
    assert store.sizes().tolist() == [data.num_nodes for data in made]
    for wanted in batches:
        indices = [i % len(made) for i in wanted]
        assert_equal(store.batch(indices), collate([made[i] for i in indices]))
        assert_equal(store.batch(np.array(indices)), collate([store.get(i) for i in indices]))
    for i, data in enumerate(made):
        assert_equal(store.get(i), data)
        assert store.natoms(i) == data.num_nodes


def test_rows(tmp_path):
    store = stored(tmp_path / "s", [structure(i, seed=i) for i in (1, 2, 3, 4, 5)], rows_per_shard=2)
    assert len(store) == 5 and store.name == "listed" and store.note == "made up" and list(store.problems) == []
    assert store.place(3) == ("part1.xyz", 30)
    assert store.keys("file_frame") == [f"part{i % 2}.xyz#{10 * i}" for i in range(5)]
    assert store.keys("file")[:2] == ["part0.xyz", "part1.xyz"]
    assert store.get(-1).num_nodes == 5
    for wrong in (5, -6):
        with pytest.raises(IndexError, match=f"row {wrong} of a store of 5 rows"):
            store.get(wrong)
    with pytest.raises(InputError, match="at least one structure"):
        store.batch([])


@pytest.mark.parametrize("index", [":2", "-2:", "::2", "3", "::-1", "-1", "3:0:-2"])
def test_index(tmp_path, index):
    made = [structure(i, seed=i, id=f"r{i}") for i in (1, 2, 3, 4, 5)]
    stored(tmp_path / "s", made, rows_per_shard=2)
    bounds = [int(part) if part else None for part in index.split(":")]
    expected = list(range(5))[slice(*bounds)] if ":" in index else [range(5)[int(index)]]
    store = Store(tmp_path / "s", index=index)
    assert store.sizes().tolist() == [i + 1 for i in expected]
    assert store.keys("id") == [f"r{i + 1}" for i in expected]
    assert [store.get(i).num_nodes for i in range(len(store))] == [i + 1 for i in expected]
    assert store.batch(range(len(store))).id == [f"r{i + 1}" for i in expected]


def test_index_of_nothing(tmp_path):
    stored(tmp_path / "s", [structure()])
    with pytest.raises(InputError, match="no rows"):
        Store(tmp_path / "s", index="7:")


def test_several_stores(tmp_path):
    a = [structure(2, seed=1, energy=torch.tensor([1.5], dtype=torch.float64)), structure(3, seed=2)]
    b = [structure(4, seed=3, tags=torch.tensor([1, 2, 3, 4]))]
    stored(tmp_path / "a", a, rows_per_shard=1)
    stored(tmp_path / "b", b)
    both = Store([tmp_path / "a", tmp_path / "b"], name="both")
    assert both.name == "both" and both.sizes().tolist() == [2, 3, 4] and len(both.manifests) == 2
    assert_equal(both.batch([2, 0, 1]), collate([b[0], a[0], a[1]]))


def test_info_and_arrays(tmp_path):
    values = [
        {"n": 1, "x": 1.5, "flag": True, "text": "å", "mixed": 1, "vector": np.array([1.0, 2.0]), "ragged": np.arange(3), "none": None},
        {"n": -5, "x": np.float64(0.1), "flag": np.bool_(False), "text": "", "mixed": 1.0, "vector": np.array([3.0, 4.0]),
         "ragged": np.arange(5), "only": {"a": [1, {"b": np.arange(2)}], "c": None}},
        {"n": 2**40, "x": float("nan"), "flag": True, "text": "x" * 99, "mixed": "one", "vector": np.array([5.0, np.nan]),
         "ragged": np.zeros((2, 0), np.int64), "big": 10**30, "tuple": (1, 2), "complex": 1 + 2j, "bytes": b"\x00\xff"},
        {"small": np.float32(0.1), "byte": np.uint8(3), "f4": np.ones((2, 2), np.float32), "words": np.array(["a", "bc"])},
    ]  # fmt: skip
    arrays = [
        {"charge/x": np.arange(3.0), "three": np.ones((3, 3), np.float32)},
        {"charge/x": np.arange(2.0)},
        {"kind": np.array(["C_3"]), "flags": np.array([True])},
        {"three": np.ones((4, 3)), "..": np.arange(4)},
    ]
    made = [Frame(structure(n), info, array) for n, info, array in zip((3, 2, 1, 4), values, arrays, strict=True)]
    for rows in (1, 2, 4):
        store = stored(tmp_path / f"s{rows}", made, rows_per_shard=rows)
        for i, frame in enumerate(made):
            found = store.frame(i)
            expected = {name: value for name, value in frame.info.items() if value is not None}
            assert set(found.info) == set(expected)
            for name, value in expected.items():
                same(found.info[name], value, name)
            assert set(found.arrays) == set(frame.arrays)
            for name, value in frame.arrays.items():
                same(found.arrays[name], value, name)
        with pytest.raises(InputError, match=r"part1.xyz: frame 30: the key 'n' is missing"):
            store.keys("n")
        with pytest.raises(InputError, match=r"no row has the key 'vektor' \(did you mean 'vector'\?\)"):
            store.keys("vektor")
    first = Store(tmp_path / "s1", index=":3")
    assert [first.frame(i).info["mixed"] for i in range(3)] == [1, 1.0, "one"]
    header = Store(tmp_path / "s4").manifests[0]
    assert header.info["mixed"] == ["float64", "int64", "text"] and header.info["only"] == ["json"]


def same(found, value, name):
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, np.ndarray):
        assert found.dtype == value.dtype and found.shape == value.shape, name
        np.testing.assert_array_equal(found, value)
    elif isinstance(value, dict):
        assert repr(found) == repr(value)
    else:
        expected = value.item() if isinstance(value, np.bool_ | np.float64) else value
        assert type(found) is type(expected) and (found == expected or found != found), name


def test_keys(tmp_path):
    made = [structure(2, seed=i, id=f"r{i}", config_type="bulk", energy=torch.tensor([i / 2.0])) for i in range(4)]
    made[0].numbers, made[1].numbers = torch.tensor([1, 8]), torch.tensor([26, 26])
    made[2].numbers = made[3].numbers = torch.tensor([8, 1])
    frames = [Frame(data, {"group": f"g{i % 2}", "flag": i > 1, "x": i / 4}, {}) for i, data in enumerate(made)]
    store = stored(tmp_path / "s", frames, rows_per_shard=3)
    assert store.keys("id") == store.keys("frame_id") == ["r0", "r1", "r2", "r3"]
    assert store.keys("group") == ["g0", "g1", "g0", "g1"]
    assert store.keys("flag") == ["False", "False", "True", "True"] and store.keys("x") == ["0.0", "0.25", "0.5", "0.75"]
    assert store.keys("formula") == ["HO", "Fe2", "HO", "HO"] and store.keys("reduced_formula")[1] == "Fe"
    assert store.keys("config_type") == ["bulk"] * 4 and store.keys("energy") == ["0.0", "0.5", "1.0", "1.5"]
    frames = [Frame(frame.data, {"formula": "mine"}, {}) for frame in frames]
    assert stored(tmp_path / "t", frames).keys("formula") == ["mine"] * 4


def test_what_became_a_field_is_stored_once(tmp_path, frames):
    import ase.io

    from matfound.structures.keys import key_map

    file = tmp_path / "cu.extxyz"
    for atoms in frames:
        atoms.info["total"] = atoms.calc.results["energy"] * 2
    ase.io.write(file, frames)
    convert(str(file), tmp_path / "s")
    found = Store(tmp_path / "s").frame(0)
    assert set(found.info) == {"group", "total"} and not found.arrays and found.data.id == "cu-0"
    keys = key_map({"energy": {"key": "total", "unit": "kcal/mol"}})
    convert(str(file), tmp_path / "t", keys=keys)
    other, reference = Store(tmp_path / "t").frame(0), open_dataset(file, keys=keys).frame(0)
    assert other.info["total"] == frames[0].info["total"] and other.data.energy == reference.data.energy != other.info["total"]
    provenance = Store(tmp_path / "t").manifests[0].provenance
    assert provenance["options"]["keys"]["energy"]["unit"] == "kcal/mol" and provenance["sources"][0]["name"] == "cu.extxyz"
    assert str(tmp_path) not in (tmp_path / "t" / "store.json").read_text()


def test_groups_and_declared_fields_come_with_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "FIELDS", FIELDS)
    saved = dict(FIELDS)
    try:
        fields.group("my_assays", ["a", "b", "c"], dtype="int64", from_data=True)
        made = [structure(2, my_assays=torch.tensor([[1, -1, 0]])), structure(3), structure(1, my_assays=torch.tensor([[-1, -1, -1]]))]
        stored(tmp_path / "s", made)
        del FIELDS["my_assays"]
        store = Store(tmp_path / "s")
        assert FIELDS["my_assays"].columns == ("a", "b", "c") and FIELDS["my_assays"].group
        assert_equal(store.batch([0, 1, 2]), collate(made))
        assert "my_assays" not in store.get(1) and store.get(2).my_assays.tolist() == [[-1, -1, -1]]
        del FIELDS["my_assays"]
        fields.declare(Field("my_assays", "atom", "int64", (3,), label=True))
        with pytest.raises(InputError, match=r"store.json: field 'my_assays' is already declared differently"):
            Store(tmp_path / "s")
    finally:
        FIELDS.clear()
        FIELDS.update(saved)


def test_groups_of_other_widths(tmp_path):
    """Two data sets may have other columns under one name; each store keeps its own, but they cannot be one data set."""
    saved = dict(FIELDS)
    try:
        widths = {"a": ("x", "y"), "b": ("x", "y", "z")}
        for name, columns in widths.items():
            fields.group("some_labels", columns, from_data=True)
            stored(tmp_path / name, [structure(2, some_labels=torch.full((1, len(columns)), 0.5).double())])
        for name, columns in widths.items():
            store = Store(tmp_path / name)
            assert store.batch([0]).some_labels.shape == (1, len(columns)) and store.manifests[0].fields[-1].columns == columns
        with pytest.raises(InputError, match="'some_labels' has other columns than in .*: 3, there 2"):
            Store([tmp_path / "a", tmp_path / "b"])
    finally:
        FIELDS.clear()
        FIELDS.update(saved)


def test_types_are_narrow_and_lossless(tmp_path):
    h5py = pytest.importorskip("h5py")
    made = [structure(300, seed=1, tags=torch.full((300,), 2), energy=torch.tensor([0.1], dtype=torch.float64))]
    made[0].pos = made[0].pos.float().double()
    store = stored(tmp_path / "s", made)
    with h5py.File(tmp_path / "s" / "shard-00000.h5") as file:
        types = {name: file[f"fields/{name}/values"].dtype.str for name in ("numbers", "tags", "pos", "energy", "cell", "pbc")}
        assert types == {"numbers": "|u1", "tags": "|u1", "pos": "<f4", "energy": "<f8", "cell": "<f8", "pbc": "|u1"}
        values = file["fields/pos/values"]
        assert values.chunks is None and values.compression is None and file["fields/pos"].attrs["unit"].decode() == "Å"
        np.testing.assert_array_equal(values[:], made[0].pos)
        assert file["fields/pos/offsets"] == file["rows/offsets"]
    assert_equal(store.get(0), made[0])


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], "u1"),
        ([-1, 127], "i1"),
        ([-1, 200], "i2"),
        ([0, 65536], "u4"),
        ([-1, 2**31], "i8"),
        ([-(2**63), 2**63 - 1], "i8"),
        ([], "u1"),
    ],
)
def test_narrow_integers(values, dtype):
    found = narrow(np.array(values, np.int64))
    assert found.dtype == dtype and found.astype(np.int64).tolist() == values


@pytest.mark.parametrize(
    ("value", "dtype"), [(0.5, "f4"), (0.1, "f8"), (-0.0, "f4"), (float("nan"), "f4"), (float("inf"), "f4"), (1e300, "f8"), (1e-50, "f8")]
)
def test_narrow_floats(value, dtype):
    found = narrow(np.array([value]))
    assert found.dtype == dtype and found.astype(np.float64).tobytes() == np.array([value]).tobytes()
    odd = np.array([0x7FF8000000000001], np.int64).view(np.float64)  # a NaN with a message
    assert narrow(odd).astype(np.float64).tobytes() == odd.tobytes()


def test_values_that_a_store_cannot_keep():
    with pytest.raises(InputError, match="'x' has a value of type object, which a store cannot keep"):
        encode(object(), "x")
    with pytest.raises(InputError, match="'x' has a value of type ndarray"):
        encode({"a": np.array([object()])}, "x")
    loop = []
    loop.append(loop)
    with pytest.raises(InputError, match="'x' cannot be stored"):
        encode(loop, "x")
    assert from_json(to_json({"z": np.array([1 + 2j]), "s": np.int8(3)}, "x"))["z"].tolist() == [1 + 2j]
    assert decoder("text")("\udce4".encode("utf-8", "surrogatepass")) == "\udce4"  # a name that was no UTF-8


def test_bytes_are_the_same_every_time(tmp_path):
    made = [structure(i, seed=i, id=str(i)) for i in (1, 2, 3)]
    for name in "ab":
        stored(tmp_path / name, made, rows_per_shard=2)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def _sum(store: Store, pipe) -> None:
    pipe.send(float(store.batch(range(len(store))).pos.sum()))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes(tmp_path, start):
    made = [structure(i, seed=i) for i in (3, 4, 5)]
    store = stored(tmp_path / "s", made, rows_per_shard=2)
    if start == "fork":
        store.get(0)
    torch.set_num_threads(1)
    here, there = multiprocessing.Pipe()
    if start == "fork":
        pid = os.fork()
        if pid == 0:
            _sum(store, there)
            os._exit(0)
        os.waitpid(pid, 0)
    else:
        # A spawned test module cannot be imported by name; a pickled store is what matters.
        _sum(pickle.loads(pickle.dumps(store)), there)
    assert here.recv() == float(collate(made).pos.sum())
    assert pickle.loads(pickle.dumps(store)).get(1).num_nodes == 4


def test_many_shards_need_no_file_descriptors(tmp_path):
    store = stored(tmp_path / "s", [structure(1 + i % 3, seed=i) for i in range(40)], rows_per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    assert store.sizes().sum() == store.batch(range(40)).num_nodes
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert len(list((tmp_path / "s").glob("*.h5"))) == 40


def test_opening_reads_headers_only(tmp_path):
    """A shard of which nothing but its header is on the disk: sizes need the offsets, batches the data."""
    store = stored(tmp_path / "s", [structure(3000, seed=i) for i in range(8)])
    header = store._shards.header(0)
    pos = next(extent for extent in header.extents if extent.path == "fields/pos/values")
    file = tmp_path / "s" / "shard-00000.h5"
    content = bytearray(file.read_bytes())
    content[pos.at : pos.at + BLOCK] = bytes(BLOCK)
    file.write_bytes(content)
    broken = Store(tmp_path / "s")
    assert broken.sizes().tolist() == [3000] * 8
    with pytest.raises(InputError, match=r"shard-00000.h5: 'fields/pos/values' is damaged in row 0"):
        broken.get(0)
    assert_equal(broken.get(7), store.get(7))


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_urls(tmp_path, scheme, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    made = [structure(1 + i % 40, seed=i, id=f"r{i}") for i in range(300)]
    local = stored(tmp_path / "s", made, rows_per_shard=100)
    url = f"file://{tmp_path}/s"
    if scheme == "memory":
        url = f"memory://{tmp_path.name}/s"
        files = fsspec.filesystem("memory")
        for file in (tmp_path / "s").iterdir():
            files.pipe_file(f"/{tmp_path.name}/s/{file.name}", file.read_bytes())
    remote = Store(url)
    for wanted in ([0, 299, 150], range(300), [7]):
        assert_equal(remote.batch(list(wanted)), local.batch(list(wanted)))
    assert remote.sizes().tolist() == local.sizes().tolist() and remote.keys("id") == local.keys("id")
    monkeypatch.setattr("matfound.data.store_space.KEPT_BYTES", 1)  # every reading throws away what the last one fetched
    again = Store(url)
    for wanted in ([0, 299, 150], range(300), [7, 290]):
        assert_equal(again.batch(list(wanted)), local.batch(list(wanted)))
    assert_equal(pickle.loads(pickle.dumps(again)).get(3), made[3])
    with pytest.raises(InputError, match="no store: there is no store.json"):
        Store(f"{scheme}:///nowhere/at/all")
    with pytest.raises(InputError, match="stores of this machine and behind URLs"):
        Store([url, tmp_path / "s"])


def test_urls_are_checked(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    stored(tmp_path / "s", [structure(50, seed=i) for i in range(9)])
    files = fsspec.filesystem("memory")
    content = bytearray((tmp_path / "s" / "shard-00000.h5").read_bytes())
    pos = next(extent for extent in Store(tmp_path / "s")._shards.header(0).extents if extent.path == "fields/pos/values")
    content[pos.at + 5] ^= 4
    files.pipe_file("/damaged/store.json", (tmp_path / "s" / "store.json").read_bytes())
    files.pipe_file("/damaged/shard-00000.h5", bytes(content))
    with pytest.raises(InputError, match="'fields/pos/values' is damaged in row 3"):
        Store("memory://damaged").get(3)
    files.pipe_file("/damaged/shard-00000.h5", bytes(content[: pos.at + 10]))
    with pytest.raises(InputError, match="cannot be fetched|is cut off"):
        Store("memory://damaged").get(3)
    files.rm_file("/damaged/shard-00000.h5")
    with pytest.raises(InputError, match="cannot be fetched"):
        Store("memory://damaged").get(3)
    with pytest.raises(InputError, match="fsspec cannot open this URL"):
        Store("nothing-like-that://x")


def test_header_says_what_is_there(tmp_path):
    stored(tmp_path / "s", [structure(2, energy=torch.tensor([0.5]).double())])
    content = json.loads((tmp_path / "s" / "store.json").read_text())
    assert content["schema_version"] == 1 and content["rows"] == 1 and content["atoms"] == 2
    assert {field["name"]: field["unit"] for field in content["fields"]}["energy"] == "eV"
    assert set(content["provenance"]) == {"reader", "options", "sources", "rows", "rows_per_shard"}
