"""`matfound data info PATH`: what is in a file, before anything is trained on it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matfound.cli.options import add_reading, reading

if TYPE_CHECKING:
    from matfound.data.dataset import Dataset
    from matfound.data.info import Description

_EXAMPLES = """\
examples:
  matfound data info minidft                              a dataset of the catalog
  matfound data info my.extxyz.xz --key energy=REF_energy --unit energy=kcal/mol
  matfound data info run/*.traj --key virial=virial       several files as one
  matfound data info s2ef_train_200K/                     OC20 archives: N.extxyz.xz with N.txt.xz
  matfound data info is2re/data.lmdb                      OC20 LMDBs
  matfound data info rattled-300-subsampled/              OMat24: .aselmdb files
  matfound data info Tox21-7k-12-labels.csv.gz            molecules: CSV, TSV or Parquet
"""


def add_parser(verbs: Any) -> None:
    """Add `info` to the verbs of `data`."""
    info = verbs.add_parser(
        "info",
        help="print what is in a file",
        description="Print what is in a file: frames, elements, sizes, labels with units and ranges, missing labels, duplicates, oddities.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    info.add_argument(
        "path",
        nargs="+",
        metavar="PATH",
        help="files of structures or molecules, a folder of OC20 or OMat24 files, a store, or a catalog name",
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of tables")
    info.add_argument("--all", action="store_true", help="look at every structure, however many there are")
    add_reading(info)


def run(args: argparse.Namespace) -> int:
    """Run `data info`; the exit code.

    Raises:
        InputError: the path cannot be read, or an option is not understood; or, after the page, a label that only some frames of a file
            have, unless `--allow-missing` says that it is meant.
    """
    import gc

    collecting = gc.isenabled() and not args.all
    if collecting:
        gc.disable()  # many small objects, none of them in cycles: looking for such takes a tenth of the time
    try:
        return _run(args)
    finally:
        if collecting:
            gc.enable()


def _run(args: argparse.Namespace) -> int:
    from matfound.data.info import LIMIT, chosen, describe

    limit = None if args.all else LIMIT
    datasets = _datasets(args.path, reading(args) | {"allow_missing": True})
    descriptions = [describe(dataset, limit) for dataset in datasets]
    if args.json:
        import json

        content = [description.to_dict() for description in descriptions]
        print(json.dumps(content[0] if len(content) == 1 else content, indent=1, ensure_ascii=False))
    else:
        _print(descriptions)
    if not args.allow_missing:
        # The page is out; a file that training would refuse is an error all the same.
        for dataset, found in zip(datasets, descriptions, strict=True):
            if any(entry.missing for entry in found.fields) or found.unusable > len(dataset.problems):
                dataset.check_labels(chosen(len(dataset), limit))
    return 0


def _print(descriptions: "list[Description]") -> None:
    from matfound.cli.verbs import console
    from matfound.data.info_text import render

    terminal = console()
    with terminal.capture() as captured:
        for description in descriptions:
            terminal.print(render(description), "", sep="\n")
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _datasets(paths: list[str], options: dict[str, Any]) -> "list[Dataset]":
    """What was named: a dataset of the catalog is shown as its sets, each of one level of theory."""
    from matfound import catalog
    from matfound.data.open import open_dataset

    if len(paths) == 1 and not Path(paths[0]).exists() and paths[0] in catalog.names("datasets"):
        sets = catalog.dataset(paths[0]).datasets
        if not sets:  # fetched, or in a package
            return [open_dataset(paths[0], **options)]
        return [open_dataset(name, **options) for name in sets]
    return [open_dataset(paths[0] if len(paths) == 1 else paths, **options)]
