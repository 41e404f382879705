"""Shuffled batches from a store beside what others read: OC20's LMDB of pickles, an ASE database, molecules as objects in memory.

    python benchmarks/data_loading.py --out data_loading.json

The same rows in every form, made here: structures of OC20's size (48 to 104 atoms, float32 positions and forces, tags, fixed atoms), and
molecules from SMILES. Each reader fills shuffled batches of 64 through torch's DataLoader, in this process and in two workers, for a few
seconds after a first pass over all rows (in which a store checks its blocks); readers take turns, and the median of the rounds counts.

- store: matfound's own loader, which makes a finished batch of each list of rows.
- lmdb: one pickled torch-geometric `Data` a row, joined by torch-geometric's `Batch.from_data_list`: how OC20's own LMDBs are read. Without
  edges, which would make them larger still.
- aselmdb: rows through ASE's own backend (`ase-db-backends`), to the same tensors, joined in the same way.
- objects: for molecules, one `Data` object each in memory with the same tensors, joined in the same way.

Then the index of a store of five million such structures, in a process of its own: time to open it, to know the sizes of all structures and
to draw one epoch's batches under an atom budget, and the resident memory after each. Its shards are real ones but for the values of atoms,
which are holes in the files: nothing of them is read.
"""

import argparse
import io
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase
import ase.db
import h5py
import lmdb
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from torch.utils.data import DataLoader, Dataset

from matfound import __version__
from matfound.data.convert import convert
from matfound.data.dataset import Frame
from matfound.data.frames import Frames, make_loader
from matfound.data.store import Store
from matfound.data.store_format import Manifest
from matfound.data.store_write import ShardBuilder
from matfound.fields import FIELDS
from matfound.structures.atomic_data import AtomicData

BATCH = 64
PIECES = ["C", "CC", "O", "N", "C(=O)", "c1ccc(cc1)", "C(F)", "CS", "C(C)(C)", "C=C", "C#C"]


# ------------------------------------------------------------------------------------------------------------ the rows


def structures(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Slabs with an adsorbate, as OC20 keeps them; numbers without a meaning."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(rows):
        natoms = int(rng.integers(48, 105))
        tags = np.sort(rng.integers(0, 3, natoms))
        made.append({
            "atomic_numbers": rng.integers(1, 84, natoms).astype(np.uint8),
            "pos": rng.uniform(0, 20, (natoms, 3)).astype(np.float32),
            "cell": (np.diag([9.0, 9.5, 30.0]) + rng.normal(size=(3, 3))).astype(np.float32)[None],
            "forces": rng.normal(size=(natoms, 3)).astype(np.float32),
            "tags": tags,
            "fixed": (tags == 0).astype(np.int32),
            "energy": float(rng.normal()),
            "sid": row // 200,
            "fid": row % 200,
        })  # fmt: skip
    return made


def smiles(rows: int, seed: int = 0) -> list[str]:
    """Chains of common pieces with 4 to 11 links."""
    rng = np.random.default_rng(seed)
    return ["C" + "".join(rng.choice(PIECES, rng.integers(3, 10))) + "C" for _ in range(rows)]


def write_lmdb(file: Path, rows: list[dict[str, Any]]) -> None:
    """As fairchem's preprocessing writes them."""
    with lmdb.open(str(file), subdir=False, map_size=2**36, meminit=False, map_async=True) as env:
        with env.begin(write=True) as transaction:
            for number, row in enumerate(rows):
                transaction.put(str(number).encode(), pickle.dumps(pyg(row), protocol=-1))
            transaction.put(b"length", pickle.dumps(len(rows), protocol=-1))


def write_aselmdb(file: Path, rows: list[dict[str, Any]]) -> None:
    """As OMat24's files are written."""
    with ase.db.connect(file, type="aselmdb", append=False) as database:
        for row in rows:
            atoms = ase.Atoms(row["atomic_numbers"], positions=row["pos"], cell=row["cell"][0], pbc=True, tags=row["tags"])
            atoms.set_constraint(FixAtoms(mask=row["fixed"] == 1))
            atoms.calc = SinglePointCalculator(atoms, energy=row["energy"], forces=row["forces"])
            database.write(atoms, data={"sid": row["sid"], "fid": row["fid"]})


def pyg(row: dict[str, Any]) -> Any:
    """A torch-geometric `Data` of a row."""
    from torch_geometric.data import Data

    tensors = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in row.items()}
    return Data(natoms=len(row["pos"]), **tensors)


# --------------------------------------------------------------------------------------------------------- the readers


class Rows(Dataset[Any]):
    """Row by row, as the others read."""

    def __init__(self, size: int, read: Callable[[int], Any]) -> None:
        self.size, self.read = size, read

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> Any:
        return self.read(row)


class Lmdb:
    """A row of an LMDB of pickles; opened once in a process."""

    def __init__(self, file: Path) -> None:
        self.file, self.opened = file, (0, None)

    def __call__(self, row: int) -> Any:
        if self.opened[0] != os.getpid():
            options = {"subdir": False, "readonly": True, "lock": False, "readahead": True, "meminit": False, "max_readers": 1}
            self.opened = (os.getpid(), lmdb.open(str(self.file), **options))
        with self.opened[1].begin() as transaction:
            return pickle.loads(transaction.get(str(row).encode()))

    def close(self) -> None:
        """Before workers are forked, which could not open what their parent has open."""
        if self.opened[1] is not None:
            self.opened[1].close()
        self.opened = (0, None)


class AseLmdb:
    """A row of an ASE database, converted as fairchem does it; opened once in a process."""

    def __init__(self, file: Path) -> None:
        self.file, self.opened = file, (0, None)

    def __call__(self, row: int) -> Any:
        from torch_geometric.data import Data

        if self.opened[0] != os.getpid():
            self.opened = (os.getpid(), ase.db.connect(self.file, type="aselmdb", readonly=True, use_lock_file=False))
        atoms = self.opened[1]._get_row(row + 1).toatoms()
        return Data(
            atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.uint8),
            pos=torch.tensor(atoms.positions, dtype=torch.float32),
            cell=torch.tensor(atoms.cell.array, dtype=torch.float32)[None],
            tags=torch.tensor(atoms.get_tags()),
            forces=torch.tensor(atoms.get_forces(apply_constraint=False), dtype=torch.float32),
            energy=atoms.get_potential_energy(),
            natoms=len(atoms),
        )

    def close(self) -> None:
        """As that of `Lmdb`."""
        if self.opened[1] is not None:
            self.opened[1]._env.close()
        self.opened = (0, None)


def joined(samples: list[Any]) -> Any:
    """torch-geometric's batch."""
    from torch_geometric.data import Batch

    return Batch.from_data_list(samples)


def order(rows: int, seed: int) -> Iterator[list[int]]:
    """Shuffled batches without end."""
    shuffled = np.random.default_rng(seed)
    while True:
        yield from (chunk.tolist() for chunk in np.array_split(shuffled.permutation(rows), max(1, rows // BATCH)))


def speed(data: Rows | Store, workers: int, seconds: float, seed: int) -> float:
    """Samples a second, after a first pass."""
    rows, batches = len(data), order(len(data), seed)
    loader: DataLoader[Any]
    if isinstance(data, Store):
        loader = make_loader(Frames([data], [np.arange(rows)], [0], {}), batches, "train", num_workers=workers)
    else:
        loader = DataLoader(data, batch_sampler=batches, collate_fn=joined, num_workers=workers)
    stream = iter(loader)
    for _ in range(max(1, rows // BATCH)):
        next(stream)
    seen, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        next(stream)
        seen += 1
    del stream
    if close := getattr(getattr(data, "read", None), "close", None):
        close()
    return seen * rows / max(1, rows // BATCH) / spent


def compare(readers: dict[str, Rows | Store], seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of the rounds, with 0 and with 2 workers."""
    found: dict[str, dict[str, float]] = {name: {} for name in readers}
    for workers in (0, 2):
        rates: dict[str, list[float]] = {name: [] for name in readers}
        for seed in range(rounds):
            for name, reader in readers.items():
                rates[name].append(speed(reader, workers, seconds, seed))
        for name, values in rates.items():
            found[name][f"workers_{workers}"] = statistics.median(values)
    return found


def size_of(path: Path) -> int:
    """Bytes on disk."""
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


# ----------------------------------------------------------------------------------------------------- a very long store


def atomic_data(row: dict[str, Any]) -> AtomicData:
    """A row as matfound has it."""
    data = AtomicData(numbers=torch.from_numpy(row["atomic_numbers"]).long(), pos=torch.from_numpy(row["pos"]).double())
    data.cell, data.pbc = torch.from_numpy(row["cell"]).double(), torch.ones(1, 3, dtype=torch.bool)
    data.tags, data.fixed = torch.from_numpy(row["tags"]), torch.from_numpy(row["fixed"]).long()
    data.energy, data.forces = torch.tensor([row["energy"]], dtype=torch.float64), torch.from_numpy(row["forces"]).double()
    data.id = f"{row['sid']}_{row['fid']}"
    return data


def write_long(folder: Path, rows: int, per_shard: int = 16_384) -> int:
    """A store of `rows` rows whose values of atoms are holes in the files; its size, holes included."""
    folder.mkdir()
    shards, columns = [], {}
    for number, start in enumerate(range(0, rows, per_shard)):
        if number == 0 or rows - start < per_shard:
            builder = ShardBuilder()
            for row, content in enumerate(structures(min(per_shard, rows - start))):
                builder.add(Frame(atomic_data(content), {"sid": content["sid"], "fid": content["fid"]}, {}), "synthetic.lmdb", row)
            columns |= dict.fromkeys(builder.contents())
        image, entry = builder.image("synthetic", number)
        shards.append(entry._replace(file=f"shard-{number:05}.h5"))
        write_with_holes(folder / shards[-1].file, image)
    known = {name for section, name, _ in columns if section == "fields"}
    fields = [field for name, field in FIELDS.items() if name in known]
    info = {name: [kind] for section, name, kind in columns if section == "info"}
    manifest = Manifest("synthetic", "", "synthetic", fields, info, {}, shards, {}, [], __version__)
    (folder / "store.json").write_text(manifest.to_text(), encoding="utf-8")
    return manifest.bytes


def write_with_holes(file: Path, image: bytes) -> None:
    """A shard without the values of its atoms, which take their place in it but none on the disk."""
    with h5py.File(io.BytesIO(image), "r") as shard:
        values = [shard[f"fields/{name}/values"] for name in ("numbers", "pos", "forces", "tags", "fixed")]
        holes = sorted((array.id.get_offset(), array.id.get_storage_size()) for array in values)
    with file.open("wb") as stream:
        at = 0
        for start, length in [*holes, (len(image), 0)]:
            stream.seek(at)
            stream.write(image[at:start])
            at = start + length
        stream.truncate(len(image))


LONG = """
import json, os, sys, time
import numpy as np
from matfound.data.samplers import BudgetBatchSampler
from matfound.data.store import Store

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

found = {"resident_before_MiB": resident()}
start = time.perf_counter()
store = Store(sys.argv[1])
rows = len(store)
found |= {"rows": rows, "open_s": time.perf_counter() - start, "resident_open_MiB": resident()}
start = time.perf_counter()
sizes = store.sizes()
found |= {"sizes_s": time.perf_counter() - start, "resident_sizes_MiB": resident()}
start = time.perf_counter()
sampler = BudgetBatchSampler(sizes, max_atoms=5000, shuffle=True, seed=1)
first = next(iter(sampler))
found |= {"epoch_s": time.perf_counter() - start, "batches": len(sampler), "resident_epoch_MiB": resident()}
print(json.dumps(found))
"""


def long_store(folder: Path, rows: int) -> dict[str, Any]:
    """What the index of a long store costs a process."""
    size = write_long(folder, rows)
    printed = subprocess.run([sys.executable, "-c", LONG, str(folder)], stdout=subprocess.PIPE, text=True, check=True).stdout
    return {"bytes": size, **json.loads(printed.splitlines()[-1])}


# ------------------------------------------------------------------------------------------------------------- the run


def structures_beside(folder: Path, rows: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Store, LMDB and ASE database."""
    made = structures(rows)
    write_lmdb(folder / "rows.lmdb", made)
    write_aselmdb(folder / "rows.aselmdb", made)
    convert([folder / "rows.lmdb"], folder / "store")
    files = {"store": folder / "store", "lmdb": folder / "rows.lmdb", "aselmdb": folder / "rows.aselmdb"}
    readers: dict[str, Rows | Store] = {
        "store": Store(files["store"]),
        "lmdb": Rows(rows, Lmdb(files["lmdb"])),
        "aselmdb": Rows(rows, AseLmdb(files["aselmdb"])),
    }
    found = compare(readers, seconds, rounds)
    return {name: {**found[name], "bytes_per_row": size_of(files[name]) / rows} for name in readers}


def molecules_beside(folder: Path, rows: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Store of a table of SMILES, and the same molecules as objects in memory."""
    table = folder / "molecules.csv"
    rng = np.random.default_rng(1)
    lines = [f"{text},{value!r}" for text, value in zip(smiles(rows), rng.normal(size=rows).tolist(), strict=True)]
    table.write_text("\n".join(["smiles,label", *lines]) + "\n", encoding="utf-8")
    convert([table], folder / "molecules", conformers=0)
    store = Store(folder / "molecules")
    objects = [store.get(i).to_pyg() for i in range(len(store))]
    found = compare({"store": store, "objects": Rows(len(objects), objects.__getitem__)}, seconds, rounds)
    found["store"]["bytes_per_row"] = size_of(folder / "molecules") / len(store)
    return found


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    """A table."""
    print(f"{title:24s} {'0 workers':>12s} {'2 workers':>12s} {'bytes/row':>10s} {'store is x times as fast':>26s}")
    for name, row in found.items():
        ratios = "" if name == "store" else "  ".join(f"{found['store'][key] / row[key]:.1f}" for key in ("workers_0", "workers_2"))
        size = f"{row['bytes_per_row']:10.0f}" if "bytes_per_row" in row else f"{'':10s}"
        print(f"{name:24s} {row['workers_0']:12.0f} {row['workers_2']:12.0f} {size} {ratios:>26s}")
    print(flush=True)


def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3200, help="of structures and of molecules (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each reader in each round (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--long", type=int, default=5_000_000, metavar="ROWS", help="of the long store; 0 leaves it out")
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"matfound": __version__, "torch": torch.__version__, "rows": args.rows, "batch": BATCH}
    with tempfile.TemporaryDirectory() as folder:
        result["structures"] = structures_beside(Path(folder), args.rows, args.seconds, args.rounds)
        show("structures, samples/s", result["structures"])
        result["molecules"] = molecules_beside(Path(folder), args.rows, args.seconds, args.rounds)
        show("molecules, samples/s", result["molecules"])
        if args.long:
            result["long"] = found = long_store(Path(folder) / "long", args.long)
            print(f"a store of {found['rows']:,} structures ({found['bytes'] / 1e9:.1f} GB):")
            for what, key in (("opened", "open"), ("sizes of all", "sizes"), (f"an epoch's {found['batches']:,} batches", "epoch")):
                print(f"  {what:28s} {found[f'{key}_s']:6.2f} s, then {found[f'resident_{key}_MiB']:4.0f} MiB resident")
            print(f"  of which {found['resident_before_MiB']:.0f} MiB are imports")
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
