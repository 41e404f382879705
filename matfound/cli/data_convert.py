"""`matfound data convert SRC… OUT`, `verify STORE` and `cat PATH`: stores of data."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from matfound.cli.options import add_index, add_reading, positive, reading
from matfound.errors import InputError

if TYPE_CHECKING:
    from matfound.data.convert import Summary

_CONVERT = """\
examples:
  matfound data convert s2ef_train_200K/ oc20-200k/ --workers 8      OC20 archives or LMDBs
  matfound data convert rattled-300-subsampled/ rattled/             OMat24: .aselmdb files
  matfound data convert my.extxyz.xz my-store/ --key energy=REF_energy
  matfound data convert zinc.csv.gz zinc/ --conformers 7             molecules: positions from RDKit, with this seed
  matfound data convert pcqm4m.parquet l1000.parquet both/ --merge   tables of molecules as one
A conversion that was interrupted goes on when the same command is run again."""
_NO_CONFORMERS = -1


def add_parser(verbs: Any) -> None:
    """Add `convert`, `verify` and `cat` to the verbs of `data`."""
    convert = verbs.add_parser(
        "convert",
        help="write a store: fast, exact, checked",
        description="Write a store: HDF5 files from which training reads whole batches, with checksums, units and provenance.",
        epilog=_CONVERT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("source", nargs="+", metavar="SRC", help="anything that `matfound data info` reads, stores too")
    convert.add_argument("out", metavar="OUT", help="folder of the store: new, or of an interrupted run of the same command")
    convert.add_argument("--name", default="", help="of the data set (default: the reader's)")
    convert.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (default 1); the store is the same")
    convert.add_argument("--strict", action="store_true", help="refuse a source with rows that cannot be used, instead of listing them")
    molecules = convert.add_argument_group("molecules from tables")
    seeds = molecules.add_mutually_exclusive_group()
    seeds.add_argument("--conformers", type=_seed, default=None, metavar="SEED", help="seed of the positions from RDKit (default 0)")
    seeds.add_argument(
        "--no-conformers", dest="conformers", action="store_const", const=_NO_CONFORMERS, help="keep molecules as graphs, without positions"
    )
    molecules.add_argument("--merge", action="store_true", help="the same molecule in several tables becomes one row with all labels")
    convert.add_argument("--shard-rows", type=positive, metavar="N", help="rows of the source per file (default: after their size)")
    convert.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="a further option of the reader, in YAML: total_energy=true, 'labels={solubility: [logS]}' (repeatable)",
    )  # fmt: skip
    add_reading(convert)

    verify = verbs.add_parser(
        "verify",
        help="check every byte of a store",
        description="Check a store: sha256 and block checksums of every shard, offsets, presence, numbers that must be finite.",
    )
    verify.add_argument("store", nargs="+", metavar="STORE", help="folder that `matfound data convert` wrote, or its URL")

    cat = verbs.add_parser(
        "cat",
        help="print rows as extended XYZ",
        description="Print rows as extended XYZ with all digits, or as lines of JSON where they have no positions.",
    )
    cat.add_argument("path", nargs="+", metavar="PATH", help="a store, or anything that `matfound data info` reads")
    cat.add_argument("--limit", type=positive, metavar="N", help="at most so many")
    add_index(cat)


def run(args: argparse.Namespace) -> int:
    """Run one of the verbs; the exit code.

    Raises:
        InputError: as `matfound.data.convert.convert`, `matfound.data.store_verify.verify` and the readers.
    """
    actions: dict[str, Callable[[argparse.Namespace], int]] = {"convert": _convert, "verify": _verify, "cat": _cat}
    return actions[args.data_verb](args)


def _seed(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, received '{text}'")
    return int(text)


# -------------------------------------------------------------------------------------------------------------------------- convert


def _convert(args: argparse.Namespace) -> int:
    from matfound.data.convert import convert

    with _bar() as progress:
        summary = convert(
            args.source,
            args.out,
            name=args.name,
            workers=args.workers,
            strict=args.strict,
            merge=args.merge,
            rows_per_shard=args.shard_rows,
            progress=progress,
            **_options(args),
        )
    _print(summary)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the reader."""
    import yaml

    options = reading(args)
    if args.conformers is not None:
        options["conformers"] = None if args.conformers == _NO_CONFORMERS else args.conformers
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--option {text}: expected NAME=VALUE", remedy="e.g. --option total_energy=true")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--option {text}: not YAML: {' '.join(str(error).split())}", remedy="quote the value") from None
    return options


def _print(summary: "Summary") -> None:
    from matfound.cli.verbs import console
    from matfound.report.tables import terminal

    facts: dict[str, Any] = {
        "rows": summary.rows_in, "stored": summary.rows, "left out": len(summary.problems), "atoms": summary.atoms, "bytes": summary.bytes,
        "bytes per row": round(summary.bytes / summary.rows), "shards": summary.shards,
    }  # fmt: skip
    if summary.kept:
        facts["kept from before"] = summary.kept
    facts |= {"seconds": round(summary.seconds, 1)}
    if not summary.kept:
        facts["rows/s"] = round(summary.rows_in / max(summary.seconds, 1e-3))
    out = console()
    out.print(terminal([facts], str(summary.out)))
    for missing in summary.missing:
        out.print(
            f"[yellow]![/] '{missing.label}' is missing in {missing.of - missing.having:,} of {missing.of:,} rows of {missing.file}, the "
            f"first: row {missing.row}. They are kept as they are; the store is opened with allow_missing: true, unless it is "
            "converted with --allow-missing",
            soft_wrap=True, highlight=False,
        )  # fmt: skip
    if summary.problems:
        reasons: dict[str, int] = {}
        for problem in summary.problems:
            kind = _kind(problem.reason)
            reasons[kind] = reasons.get(kind, 0) + 1
        ranked = sorted(reasons.items(), key=lambda item: -item[1])[:10]
        out.print(terminal([{"left out": count, "because": reason} for reason, count in ranked]))
        shown = [{"file": problem.file, "row": str(problem.row), "reason": problem.reason} for problem in summary.problems[:10]]
        out.print(terminal(shown, f"rows left out: the first {len(shown)} of {len(summary.problems):,} (all: {summary.out}/store.json)"))


def _kind(reason: str) -> str:
    """A reason without what is different in every row."""
    import re

    return re.sub(r"'[^']*'", "'…'", re.sub(r"\d+(\.\d+)?", "N", reason))


@contextlib.contextmanager
def _bar() -> "Iterator[Callable[[str, int, int], None]]":
    """A bar on the terminal of errors, nothing elsewhere."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from matfound.cli.verbs import console

    terminal = console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=max(total, 1))


# ------------------------------------------------------------------------------------------------------------------- verify and cat


def _verify(args: argparse.Namespace) -> int:
    import time

    from matfound.cli.verbs import console
    from matfound.data.store_verify import verify

    code, out = 0, console()
    for store in args.store:
        began = time.monotonic()
        with _bar() as progress:
            found = verify(store, lambda done, total: progress("verifying", done, total))
        for fault in found.faults:
            out.print(f"[red]damaged[/] {fault.file}: {fault.problem}", soft_wrap=True, highlight=False)
            code = 1
        left = f", {found.left_out:,} rows of the source left out" if found.left_out else ""
        damaged = len({fault.file for fault in found.faults})
        word = f"[red]{damaged} of {_shards(found.shards)} damaged[/]" if damaged else "[green]fine[/]"
        out.print(
            f"{word} {store}: {found.rows:,} rows, {found.atoms:,} atoms, {found.bytes:,} bytes, {_shards(found.shards)}, "
            f"{time.monotonic() - began:.1f} s{left}",
            soft_wrap=True,
            highlight=False,
        )
    return code


def _shards(count: int) -> str:
    return f"{count:,} shard{'s' * (count != 1)}"


def _cat(args: argparse.Namespace) -> int:
    import sys

    from matfound.data.convert_sources import open_origin
    from matfound.data.extxyz_write import to_text

    options: dict[str, Any] = {"allow_missing": True} | ({"index": args.index} if args.index is not None else {})
    dataset = open_origin([os.fspath(path) for path in args.path], "", options).dataset
    stop = len(dataset) if args.limit is None else min(args.limit, len(dataset))
    for _, found in dataset.scan(0, stop):
        if isinstance(found, InputError):
            sys.stdout.flush()
            raise found
        sys.stdout.write(to_text(found))
    sys.stdout.flush()  # so that a reader that is gone is noticed here
    return 0
