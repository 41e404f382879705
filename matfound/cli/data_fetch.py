"""`matfound data fetch NAME --split S`: get a split of a dataset from where upstream serves it."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from matfound.errors import InputError

if TYPE_CHECKING:
    from matfound.data.download import Plan

#: Bytes from which on the user is asked.
ASK = 1_000_000_000
_EXAMPLES = """\
examples:
  matfound data fetch                                     what can be fetched, with sizes
  matfound data fetch oc20 --split val-id --dry-run       what would be fetched, from where, to where
  matfound data fetch oc20 --split train-200k --out /data
  matfound data info oc20/train-200k                      what was fetched, by its name
"""


def add_parser(verbs: Any) -> None:
    """Add `fetch` to the verbs of `data`."""
    fetch = verbs.add_parser(
        "fetch",
        help="get a dataset from where upstream serves it",
        description="Get a split of a dataset from where upstream serves it: checked, unpacked and found again by its name. An "
        "interrupted download goes on where it stopped. Without NAME, print what can be fetched.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fetch.add_argument("name", nargs="?", metavar="NAME", help="a dataset of the catalog")
    fetch.add_argument("--split", default="", metavar="S", help="which part of it")
    fetch.add_argument("--out", metavar="DIR", help="where to, instead of the user's cache folder ($MATFOUND_CACHE): DIR/NAME/S")
    fetch.add_argument("--yes", action="store_true", help="do not ask before more than 1 GB")
    fetch.add_argument("--dry-run", action="store_true", help="print what would be done, and fetch nothing")


def run(args: argparse.Namespace) -> int:
    """Run `data fetch`; the exit code.

    Raises:
        InputError: no such dataset or split, nobody to ask, or as `matfound.data.download.fetch`.
    """
    from matfound import catalog
    from matfound.data import download

    if args.name is None or not args.split:
        names = [args.name] if args.name else catalog.names("datasets")
        if args.name and len(catalog.dataset(args.name).downloads) <= 1:
            args.split = next(iter(catalog.dataset(args.name).downloads), "")
        elif not args.name and (args.split or args.dry_run or args.out):
            raise InputError("no dataset was named", remedy="matfound data fetch NAME --split S")
        else:
            print(_listing(names))
            if args.name:
                raise InputError(f"dataset '{args.name}' has several splits", remedy="choose one with --split")
            return 0
    plan = download.plan(args.name, args.split, args.out)
    print(_describe(plan))
    if args.dry_run:
        return 0
    if not plan.done and (plan.bytes is None or plan.bytes > ASK) and not args.yes and not _agreed(plan):
        print("nothing was fetched")
        return 1
    with _Bar() as bar:
        folder = download.fetch(plan, bar)
    print(f"{plan.dataset}/{plan.split} is in {folder}; its name works as a path: matfound data info {plan.dataset}/{plan.split}")
    return 0


def size(count: int | None) -> str:
    """Bytes in words: 344 MB."""
    if count is None:
        return "size unknown"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def _listing(names: list[str]) -> str:
    from matfound import catalog

    rows = [("dataset/split", "size", "frames", "licence", "")]
    for name in names:
        card = catalog.dataset(name)
        for split, download in card.downloads.items():
            parts = [part.bytes for part in download.parts]
            total = download.bytes if None in parts else sum(part or 0 for part in parts)
            frames = f"{download.frames:,}" if download.frames else ""
            rows.append((f"{name}/{split}", size(total), frames, card.licence, download.note))
    if len(rows) == 1:
        return "nothing can be fetched: " + ", ".join(names)
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row in rows:
        first, *rest = (
            cell.rjust(width) if i in (1, 2) else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        lines.append("  ".join([first, *rest, row[4]]).rstrip())
    return "\n".join(lines)


def _describe(plan: "Plan") -> str:
    lines = [f"{plan.dataset}/{plan.split}: {size(plan.bytes)}, {len(plan.card.parts)} file{'s' * (len(plan.card.parts) > 1)}"]
    for part in plan.card.parts:
        check = f"md5 {part.md5}" if part.md5 else f"sha256 {part.sha256}" if part.sha256 else "no checksum is published"
        lines.append(f"  {part.url}  ({size(part.bytes) + ', ' if part.bytes else ''}{check})")
    lines.append(f"licence: {plan.licence}")
    if plan.card.frames:
        lines.append(f"frames: {plan.card.frames:,}")
    if plan.card.note:
        lines.append(f"note: {plan.card.note}")
    lines.append(f"to: {plan.folder}" + (" (unpacked)" if plan.card.unpack else ""))
    if plan.done:
        lines.append("it is there already: nothing will be fetched")
    elif plan.have:
        lines.append(f"{size(plan.have)} are there from an earlier attempt, which goes on")
    return "\n".join(lines)


def _agreed(plan: "Plan") -> bool:
    if not sys.stdin.isatty():
        raise InputError(f"{size(plan.bytes)} are to be fetched, and nobody can be asked", remedy="say --yes")
    return input(f"fetch {size(plan.bytes)}? [y/N] ").strip().lower() in ("y", "yes")


class _Bar:
    """A bar for each file, on the terminal's stderr."""

    def __enter__(self) -> "_Bar":
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._progress.start()
        return self

    def __call__(self, name: str, done: int, total: int | None) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done, total=total)

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()
