"""Which reader a path needs."""

import importlib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matfound import catalog
from matfound.data.dataset import Dataset
from matfound.errors import InputError, nearest

#: Kind of data to the reader: module and name; called with paths, `name` and the options.
READERS = {
    "files": ("matfound.data.files", "FileDataset"),
    "oc20": ("matfound.data.oc20", "OC20Archives"),
    "lmdb": ("matfound.data.oc20_lmdb", "OC20Lmdb"),
    "aselmdb": ("matfound.data.omat24", "AseLmdbDataset"),
    "table": ("matfound.data.tables", "open_table"),
    "qm9": ("matfound.data.qm9", "QM9"),
    "store": ("matfound.data.store", "Store"),
}
#: The header of a store (`matfound data convert`).
STORE = "store.json"
#: What stands in its place while a conversion has not been finished.
CONVERSION = "conversion.json"
#: Endings of files to their kind; everything else is a file that ASE may know.
_ENDINGS = {
    ".aselmdb": "aselmdb",
    ".lmdb": "lmdb",
    ".txt": "oc20",
    ".txt.xz": "oc20",
    **{f".{end}{packed}": "table" for end in ("csv", "tsv") for packed in ("", ".xz", ".gz", ".bz2")},
    ".parquet": "table",
    ".npz": "qm9",
}
_WORDS = {"oc20": "OC20 archives (N.extxyz with N.txt)", "aselmdb": ".aselmdb files", "lmdb": ".lmdb files"}


def open_dataset(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    name: str = "",
    **options: Any,
) -> Dataset:
    """Open what a path is: files of structures, OC20 archives or LMDBs, `.aselmdb`, a table of molecules, a store, a set of the catalog.

    Args:
        paths: a file or folder, a name from the catalog ("minidft", "minidft-crystals", "oc20/val-id" once it was fetched), "qm9" for the
            installed package qm9pack, or several files.
        name: name of the dataset; the reader's own otherwise.
        options: of the reader: `keys`, `allow_missing`, `index`, …

    Raises:
        InputError: nothing is there, a folder holds nothing that is understood, more than one kind of data, or an option that the reader
            of this kind of data does not have.
    """
    given = [os.fspath(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if len(given) == 1:
        if given[0] in ("qm9", "qm9pack") and not Path(given[0]).exists():
            return _reader("qm9", given, {"name": name, **options} if name else options)
        if (members := _from_catalog(given[0])) is not None:
            return _reader("files", [os.fspath(path) for path in members], {"name": name or given[0], **options})
        if (found := fetched(given[0])) is not None:
            return _reader(found[0], [os.fspath(path) for path in found[1]], {"name": name or given[0], **options})
        if not any(mark in given[0] for mark in "*?[") and "://" not in given[0]:
            given = [os.fspath(catalog.resolve(given[0]))]
    kinds = {kind_of_path(path) for path in given}
    if len(kinds) > 1:
        raise InputError(f"{', '.join(given)}: more than one kind of data", remedy="open each by itself")
    return _reader(kinds.pop() if kinds else "files", given, {"name": name, **options} if name else options)


def _reader(kind: str, paths: list[str], options: dict[str, Any]) -> Dataset:
    module, name = READERS[kind]
    reader = getattr(importlib.import_module(module), name)
    known = inspect.signature(reader).parameters
    for option, value in options.items():
        if option not in known and value:
            raise InputError(f"'{option}' means nothing for this kind of data ({kind})", remedy=nearest(option, known), file=paths[0])
    opened: Dataset = reader(paths, **{option: value for option, value in options.items() if option in known})
    return opened


def _from_catalog(name: str) -> list[Path] | None:
    """Files of a set or a dataset of the catalog; None where the name is a path, or a split that must be fetched."""
    if "/" in name or Path(name).exists():
        card = Path(name) / "manifest.yaml"
        if not card.is_file():
            return None
        return [Path(name) / file.path for file in catalog.read(card, catalog.DatasetCard).files]
    if name in catalog.names("datasets"):
        card = catalog.find("datasets", name)
        read = catalog.read(card, catalog.DatasetCard)
        if not read.files:
            splits = ", ".join(f"{name}/{split}" for split in read.downloads)
            raise InputError(f"dataset '{name}' is not part of matfound", remedy=f"fetch a split and name it: {splits}")
        return [card.parent / file.path for file in read.files]
    return catalog.training_sets().get(name)


def fetched(name: str) -> tuple[str, list[Path]] | None:
    """Kind and paths of a split that was fetched, by its name: "oc20/val-id", "oc20/is2re/all/train"; None where the name is a path.

    Raises:
        InputError: no such split, or it has not been fetched.
    """
    dataset, _, rest = name.partition("/")
    if not rest or Path(name).exists() or dataset not in catalog.names("datasets") or not catalog.dataset(dataset).downloads:
        return None
    from matfound.data import download

    split, _, below = rest.partition("/")
    return download.find(dataset, split, below)


def kind_of_path(path: str) -> str:
    """Which reader of `READERS` a path, or a pattern of files, needs.

    Raises:
        InputError: a folder that holds nothing that is understood, or more than one kind of data.
    """
    if "://" in path:  # only stores are read from elsewhere
        return "store"
    if not Path(path).is_dir():
        name = path.rstrip("/").rpartition("/")[2]
        return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), "files")
    inside = sorted(entry.name for entry in Path(path).iterdir())
    if STORE in inside or CONVERSION in inside:
        return "store"
    stems = {name.partition(".extxyz")[0] for name in inside if name.endswith((".extxyz", ".extxyz.xz"))}
    kinds = {kind for name in inside for ending, kind in _ENDINGS.items() if name.endswith(ending) and kind in ("aselmdb", "lmdb")}
    if any(f"{stem}.txt{suffix}" in inside for stem in stems for suffix in ("", ".xz")):
        kinds.add("oc20")
    if len(kinds) > 1:
        found = " and ".join(_WORDS[kind] for kind in sorted(kinds, key=list(READERS).index))
        raise InputError(f"the folder has {found}", remedy="name the files that you mean", file=path)
    if kinds:
        return kinds.pop()
    if "metadata.json" in inside:  # ASE's BundleTrajectory is a folder
        return "files"
    problem = "a folder, but neither a store nor one of OC20 archives (N.extxyz.xz with N.txt.xz), .lmdb or .aselmdb files"
    raise InputError(problem, remedy=_example(Path(path), inside), file=path)


def _example(folder: Path, inside: list[str]) -> str:
    for name in inside:
        below = folder / name
        if below.is_dir() and any(entry.name.endswith((".extxyz", ".extxyz.xz", ".aselmdb", ".lmdb", ".h5")) for entry in below.iterdir()):
            return f"did you mean {below}?"
    found = next((name for name in inside if _looks_like_structures(name)), None)
    return f"name the files that you mean, e.g. {folder / found}" if found else "name a file of structures"


def _looks_like_structures(name: str) -> bool:
    endings = ("extxyz", "xyz", "traj", "db", "cif", "json", "xml", "vasp", "pdb", "sdf")
    return any(name.endswith((f".{end}", f".{end}.xz", f".{end}.gz", f".{end}.bz2")) for end in endings) or name in (
        "POSCAR",
        "CONTCAR",
    )
