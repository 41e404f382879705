"""`matfound data leakage A B` and `matfound data split SRC`: what two sets share, and sets that share less."""

import argparse
from typing import TYPE_CHECKING, Any

from matfound.cli.options import add_reading, reading
from matfound.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from matfound.data.dataset import Dataset
    from matfound.data.leakage import Leakage

_LEAKAGE = """\
Found are: the same structure (atoms in any order, moved by lattice vectors, another origin; molecules and crystals also rotated; within
--tolerance), the same molecule (canonical SMILES, without stereochemistry), the same system (sid, material_id, ...) and the same reduced
formula. Not found are: the same crystal in another choice of cell or as a supercell, mirror images, tautomers.

examples:
  matfound data leakage train.extxyz test.extxyz --fail
  matfound data leakage lcmgm.extxyz.xz --split split.json     the parts of one dataset, pair by pair
"""
_SPLIT = """\
examples:
  matfound data split my.extxyz --out split.json                               at random, 80/10/10
  matfound data split lcmgm.extxyz.xz --out split.json --by reduced_formula    no formula in two parts
  matfound data split zinc.csv --out split.json --by scaffold                  no Bemis-Murcko scaffold in two parts
  matfound data split s2ef/ --out split.json --by sid --row                    by upstream's rows: shorter for millions of frames
  matfound data split my.extxyz --out split.json --stratify config_type --fractions train=0.9,val=0.1
"""


def add_parser(verbs: Any) -> None:
    """Add `leakage` and `split` to the verbs of `data`."""
    leakage = verbs.add_parser(
        "leakage",
        help="structures that are in both of two sets",
        description="Print which structures, molecules, systems and formulas two sets share, with the first examples.",
        epilog=_LEAKAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    leakage.add_argument("path", nargs="+", metavar="PATH", help="A and B; or one, with --split")
    leakage.add_argument("--split", metavar="FILE", help="compare the parts of this split of one dataset, pair by pair")
    leakage.add_argument("--split-key", default="id", metavar="KEY", help="what the split calls frames by (default: id)")
    leakage.add_argument("--tolerance", type=float, metavar="Å", help="largest difference of positions (default: 0.001 Å)")
    leakage.add_argument("--examples", type=int, default=3, metavar="N", help="pairs to name of each kind (default: 3)")
    leakage.add_argument("--fail", action="store_true", help="exit with code 1 where a structure or a molecule is in both")
    leakage.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_reading(leakage)

    split = verbs.add_parser(
        "split",
        help="write a split file",
        description="Divide a dataset and write which frames are in which part.",
        epilog=_SPLIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    split.add_argument("path", nargs="+", metavar="SRC", help="anything that `data info` reads")
    split.add_argument("--out", required=True, metavar="FILE", help="the split file, .json")
    how = split.add_mutually_exclusive_group()
    how.add_argument(
        "--by", metavar="KEY", help="keep frames together that share this: formula, reduced_formula, scaffold, or a key of the file"
    )
    how.add_argument("--stratify", metavar="KEY", help="give every part the same share of the frames of each value of this key")
    split.add_argument("--fractions", default="train=0.8,val=0.1,test=0.1", metavar="PART=SHARE,…", help="default: %(default)s")
    split.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    split.add_argument("--name", default="", help="of the dataset in the file (default: the reader's)")
    split.add_argument("--row", action="store_true", help="name frames by upstream's rows instead of their ids")
    add_reading(split)


def run(args: argparse.Namespace) -> int:
    """Run `data leakage` or `data split`; the exit code.

    Raises:
        InputError: a path that cannot be read, an option that is not understood, or a split that does not fit.
    """
    return _leakage(args) if args.data_verb == "leakage" else _split(args)


def _leakage(args: argparse.Namespace) -> int:
    from matfound.data.leakage import TOLERANCE, compare

    if args.tolerance is not None and args.tolerance <= 0:
        raise InputError(f"--tolerance must be larger than 0, received {args.tolerance:g}")
    tolerance = TOLERANCE if args.tolerance is None else args.tolerance
    sides = _sides(args)
    found = [compare(a, b, tolerance=tolerance, examples=max(args.examples, 0)) for k, a in enumerate(sides) for b in sides[k + 1 :]]
    if args.json:
        import json

        print(json.dumps([entry.to_dict() for entry in found] if args.split else found[0].to_dict(), indent=1, ensure_ascii=False))
    else:
        _print(found)
    leaks = sum(entry.exact > 0 for entry in found)
    return 1 if args.fail and leaks else 0


def _sides(args: argparse.Namespace) -> list[Any]:
    from matfound.data.leakage import Side
    from matfound.data.splits import load_split, select

    options = reading(args) | {"allow_missing": True}
    if args.split is None:
        if len(args.path) != 2:
            raise InputError(f"leakage compares two sets, received {len(args.path)}", remedy="name two, or one with --split FILE")
        names = args.path if _last(args.path[0]) == _last(args.path[1]) else [_last(path) for path in args.path]
        return [Side(_open([path], options), name=name) for path, name in zip(args.path, names, strict=True)]
    dataset = _open(args.path, options)
    content = load_split(args.split)
    if dataset.name not in content and len(content) == 1:
        dataset.name = next(iter(content)) or dataset.name
    parts = select(content, dataset, file=args.split, key=args.split_key)
    return [Side(dataset, frames, part) for part, frames in parts.items() if frames]


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _open(paths: list[str], options: dict[str, Any]) -> "Dataset":
    from matfound.data.open import open_dataset

    return open_dataset(paths[0] if len(paths) == 1 else paths, **options)


_WORDS = {"structure": "same structure", "molecule": "same molecule", "formula": "same reduced formula"}


def _print(found: "list[Leakage]") -> None:
    from rich.text import Text

    from matfound.cli.verbs import console

    terminal = console()
    with terminal.capture() as captured:
        for entry in found:
            terminal.print(Text(f" {entry.a} ({entry.frames_a:,}) and {entry.b} ({entry.frames_b:,}) ", style="bold reverse"))
            terminal.print(_table(entry))
            for shared in entry.shared:
                for first, second, name in shared.examples if shared.kind != "formula" or not entry.exact else ():
                    terminal.print(Text(f"  {_kind(shared)}: {first} of {entry.a}, {second} of {entry.b}" + (f": {name}" if name else "")))
            if entry.skipped:
                terminal.print(Text(f"! {entry.skipped:,} frames cannot be used and were not compared", style="yellow"))
            if entry.exact:
                frames = "1 frame" if entry.exact == 1 else f"{entry.exact:,} frames"
                terminal.print(Text(f"! {frames} of {entry.b} {'is' if entry.exact == 1 else 'are'} in {entry.a}, too", style="yellow"))
            elif any(shared.kind in ("structure", "molecule") for shared in entry.shared):
                terminal.print(Text("✓ no structure and no molecule is in both", style="green"))
            terminal.print("")
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def _kind(shared: Any) -> str:
    return f"same {shared.key}" if shared.key else _WORDS[shared.kind]


def _table(entry: "Leakage") -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, right in (("in both", False), (f"of {entry.a}", True), ("share", True), (f"of {entry.b}", True), ("share", True)):
        table.add_column(name, justify="right" if right else "left", no_wrap=right)
    for shared in entry.shared:
        cells = [f"{count:,} of {of:,}" for count, of in ((shared.in_a, shared.of_a), (shared.in_b, shared.of_b))]
        shares = [f"{100 * count / max(of, 1):.1f} %" for count, of in ((shared.in_a, shared.of_a), (shared.in_b, shared.of_b))]
        table.add_row(_kind(shared), cells[0], shares[0], cells[1], shares[1])
    return table


def _fractions(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for pair in text.split(","):
        part, _, share = (word.strip() for word in pair.partition("="))
        try:
            found[part] = float(share)
        except ValueError:
            raise InputError(f"--fractions '{text}': '{pair}' is no share of a part", remedy="write train=0.8,val=0.1,test=0.1") from None
        if not part:
            raise InputError(f"--fractions '{text}': '{pair}' names no part", remedy="write train=0.8,val=0.1,test=0.1")
    return found


def _split(args: argparse.Namespace) -> int:
    from matfound.data import splits

    if not args.out.endswith(".json"):
        raise InputError("a split file is JSON", remedy="name it .json", file=args.out)
    fractions = _fractions(args.fractions)
    dataset = _open(args.path, _skipping(args.path, reading(args) | {"allow_missing": True}))
    key = args.by or args.stratify
    if key is None:
        split = splits.random_split(len(dataset), fractions, args.seed)
    else:
        method = splits.split_by_key if args.by else splits.stratified_split
        split = method(splits.key_values(dataset, key), fractions, args.seed)
    name = args.name or dataset.name
    stored = splits.rows(split, dataset) if args.row else _by_id(split, dataset)
    try:
        splits.save_split({name: stored}, args.out)
    except OSError as error:
        raise InputError(f"cannot write the split: {error.strerror}", file=args.out) from error
    total = max(len(dataset), 1)
    counts = ", ".join(f"{part} {len(frames):,} ({100 * len(frames) / total:.1f} %)" for part, frames in split.items())
    print(f"{name}: {counts} of {len(dataset):,} frames{f' by {key}' if key else ''}, written to {args.out}")
    if dataset.problems:
        first = dataset.problems[0]
        print(f"{len(dataset.problems):,} rows cannot be used and are in no part; the first: {first.file}: row {first.row}: {first.reason}")
    return 0


def _by_id(split: dict[str, list[int]], dataset: "Dataset") -> dict[str, list[str]]:
    from matfound.data.splits import named

    stored = named(split, dataset)
    ids = [frame for frames in stored.values() for frame in frames]
    if len(set(ids)) < len(ids):
        raise InputError("several frames have the same id", remedy="name frames by their rows: --row", file=dataset.place(0)[0])
    return stored


def _skipping(paths: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Tables leave rows out that cannot be used, and say so."""
    from matfound.data.open import kind_of_path

    return options | {"on_error": "skip"} if all(kind_of_path(path) == "table" for path in paths) else options
