"""Any source to a store: `matfound data convert SRC OUT`.

Shard k stands for rows k·R to (k + 1)·R of the source, so that it has the same bytes whoever writes it and whenever. A shard gets its name
when it is complete and on the disk, and so does `store.json`, last of all. Until then the folder has `conversion.json`, and a run that
ends early is gone on with by running it again.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from matfound import __version__
from matfound.data.convert_sources import Origin, fingerprints, open_origin
from matfound.data.convert_work import Done, Job, refusal, run, write_file
from matfound.data.dataset import Dataset, Frame, Problem, SourceDataset
from matfound.data.labels import LabelKinds, Missing
from matfound.data.open import CONVERSION, STORE
from matfound.data.store_format import SCHEMA_VERSION, Manifest, digest, read_manifest
from matfound.data.store_write import ShardBuilder
from matfound.errors import InputError
from matfound.fields import FIELDS

#: A shard has at most about so many bytes, and ...
SHARD_BYTES = 1 << 26
#: ... at most so many rows, so that little is lost when a conversion is interrupted.
SHARD_ROWS = 1 << 14
#: Sources with fewer rows than 16 such shards get smaller ones, for the sake of several workers, but none smaller than this.
FEWEST_ROWS, FEWEST_ROWS_SLOW, SHARDS = 1024, 128, 16
#: Rows at the beginning of a source that the size of a row is estimated from.
_SAMPLE = 64
_OURS = re.compile(r"(shard-\d+\.(h5|json)|conversion\.json|store\.json)(\.\d+\.partial)?|shard-\d+\.(h5|json)|conversion\.json")
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion did.

    Args:
        out: the store.
        rows_in: rows of the source, those included that its reader left out.
        rows: in the store.
        atoms: in the store.
        bytes: of the shards.
        shards: how many.
        kept: how many of them an earlier run had finished.
        problems: rows that were left out.
        missing: labels that only some rows of a file have; training with them wants `allow_missing`.
        seconds: of this run.
    """

    out: Path
    rows_in: int
    rows: int
    atoms: int
    bytes: int
    shards: int
    kept: int
    problems: list[Problem]
    missing: list[Missing]
    seconds: float


def convert(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    name: str = "",
    workers: int = 1,
    strict: bool = False,
    merge: bool = False,
    rows_per_shard: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Summary:
    """Write a store of what `matfound.data.open.open_dataset` opens.

    The result does not depend on the number of workers, nor on how often the conversion was interrupted and run again. At most one shard
    per worker is in memory, beside what the reader itself needs. With more than one worker, call this from a script under
    `if __name__ == "__main__":`, since each worker imports it.

    Args:
        paths: the source, as for `open_dataset`.
        out: folder of the store: new, empty, or of an earlier run of the same conversion.
        name: of the data set; by default the reader's.
        workers: processes.
        strict: refuse a source with rows that cannot be used, instead of leaving them out and listing them.
        merge: join several tables of molecules: the same molecule becomes one row (`matfound.data.merge`).
        rows_per_shard: rows of the source that a shard stands for; by default after their size.
        progress: called with what is being done ("checking", in bytes, or "converting", in rows), how much of it is done, and of how much.
        options: of the reader: `keys`, `allow_missing`, `index`, … Molecules in tables get positions by RDKit, with the seed
            `conformers` (default 0); None keeps them as graphs. Without `allow_missing`, a label that only some rows of a file have is
            converted too, but the store says so, and is opened only with `allow_missing`.

    Raises:
        InputError: the source cannot be opened, has no row that can be used, or (`strict`) one that cannot; no row has a key that a label
            is to be read from; `out` is something else; the disk is full.
    """
    given = [os.fspath(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    origin = open_origin(given, name, options, merge=merge)
    return convert_origin(origin, out, workers=workers, strict=strict, rows_per_shard=rows_per_shard, progress=progress)


def convert_origin(
    origin: Origin,
    out: str | os.PathLike[str],
    *,
    workers: int = 1,
    strict: bool = False,
    rows_per_shard: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """`convert` of a source that is open. Arguments and errors as there."""
    began, folder, dataset = time.monotonic(), Path(out), origin.dataset
    if strict and dataset.problems:
        raise refusal(_error(dataset.problems[0]))
    said = bool(origin.options.get("allow_missing"))
    _check_keys(dataset, 0 if said else _SAMPLE)
    names = origin.names()
    sources = fingerprints(names, None if progress is None else lambda done, total: progress("checking", done, total))
    slow = origin.options.get("conformers") is not None
    plan: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "matfound": __version__, "name": dataset.name, "reader": type(dataset).__name__,
        "options": origin.portable_options(), "sources": [source._asdict() for source in sources], "rows": len(dataset),
        "rows_per_shard": rows_per_shard or choose_rows(origin, slow=slow),
    }  # fmt: skip
    job = Job(dataset, str(folder), digest(plan), plan["rows_per_shard"], names, strict=strict, keep_names=origin.kind == "store")
    job.notes_missing = dataset.refuses_missing and not said
    if _begin(folder, plan):
        return _finished(folder, job, began)
    with _locked(folder / CONVERSION):
        return _run(folder, job, plan, workers, progress, began)


def choose_rows(origin: Origin, *, slow: bool = False) -> int:
    """Rows per shard, from the source alone: by the bytes of its first rows.

    Args:
        origin: the source.
        slow: a row takes long, so that many small shards are better.
    """
    dataset, builder = origin.dataset, ShardBuilder(origin.dataset.key_map)
    total = len(dataset)
    for _, found in dataset.scan(0, min(_SAMPLE, total)):
        if isinstance(found, Frame):
            with contextlib.suppress(InputError):
                builder.add(found, "", 0)
    by_size = SHARD_BYTES // max(1, builder.nbytes // max(1, builder.rows))
    fewest = FEWEST_ROWS_SLOW if slow else FEWEST_ROWS
    return int(max(1, min(by_size, SHARD_ROWS, max(fewest, -(-total // SHARDS)))))


def _check_keys(dataset: Dataset, rows: int) -> None:
    """Refuse keys of labels that none of the first rows has, before everything is read.

    Raises:
        InputError: names the key, and the nearest.
    """
    if isinstance(dataset, SourceDataset) and dataset.key_map and dataset.refuses_missing and rows:
        frames = [found for _, found in dataset.scan(0, min(rows, len(dataset))) if isinstance(found, Frame)]
        if frames:
            dataset.check_mapped(frames)


def _begin(folder: Path, plan: dict[str, Any]) -> bool:
    """Prepare the folder; whether everything is there already.

    Raises:
        InputError: it is, or holds, something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError("is a file, and a store is a folder", remedy="choose another name", file=folder)
    if (folder / STORE).is_file():
        if read_manifest(folder).plan == digest(plan):
            return True
        raise InputError("there is already another store here", remedy="choose another folder, or remove this one", file=folder)
    if (folder / CONVERSION).is_file():
        _compare(folder, plan)
        return False
    foreign = sorted(entry.name for entry in folder.iterdir() if not _OURS.fullmatch(entry.name)) if folder.is_dir() else []
    if foreign:
        raise InputError(f"the folder is not empty: it has {foreign[0]}", remedy="choose a new folder", file=folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CONVERSION, (json.dumps(plan, indent=1, ensure_ascii=False) + "\n").encode())
    return False


def _compare(folder: Path, plan: dict[str, Any]) -> None:
    """Refuse to go on with another conversion."""
    try:
        known = json.loads((folder / CONVERSION).read_text(encoding="utf-8"))
    except ValueError:
        known = {}
    differing = [key for key in plan if known.get(key) != json.loads(json.dumps(plan[key]))] if isinstance(known, dict) else list(plan)
    if differing:
        words = {"sources": "other source files", "rows": "another number of rows", "matfound": "another version of matfound"}
        what = ", ".join(words.get(key, f"another {key}".replace("_", " ")) for key in differing)
        raise InputError(
            f"an unfinished conversion of something else is here ({what})",
            remedy="finish it with the command that began it, remove the folder, or choose another",
            file=folder,
        )


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[IO[bytes]]:
    """Nobody else writes into this folder meanwhile."""
    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError("another process is converting into this folder", remedy="wait for it", file=file.parent) from None
        yield stream


def _run(folder: Path, job: Job, plan: dict[str, Any], workers: int, progress: Progress | None, began: float) -> Summary:
    for entry in folder.glob("*.partial"):
        entry.unlink(missing_ok=True)
    done = {shard: found for shard in range(job.shards) if (found := job.finished(shard)) is not None}
    kept, total = len(done), len(job.dataset)
    count = sum(len(job.rows(shard)) for shard in done)

    def advance(rows: int) -> None:
        nonlocal count
        count += rows
        if progress is not None:
            progress("converting", count, total)

    try:
        advance(0)
        _refuse_problems(job, done)
        todo = [shard for shard in range(job.shards) if shard not in done]
        done |= run(job, todo, workers, advance)
        problems = [*job.dataset.problems, *(problem for shard in sorted(done) for problem in done[shard].problems)]
        if all(finished.entry is None for finished in done.values()):
            first = problems[0] if problems else Problem("", 0, "no rows")
            raise InputError(f"no row could be used; the first: {first.reason}", file=first.file, frame=first.row)
        manifest = _manifest(job, plan, done)
        write_file(folder / STORE, manifest.to_text().encode())
    except InputError:
        _discard(folder)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"the disk is full; {len(done)} of {job.shards} shards are written and kept",
            remedy="free space and run the same command again: it goes on",
            file=folder,
        ) from error
    _clean(folder, job)
    return _summary(folder, manifest, job, kept, began)


def _refuse_problems(job: Job, done: dict[int, Done]) -> None:
    """What an earlier run left out is not strict enough for this one."""
    problem = next((problem for shard in sorted(done) for problem in done[shard].problems), None)
    if job.strict and problem is not None:
        raise refusal(_error(problem))


def _error(problem: Problem) -> InputError:
    return InputError(problem.reason, file=problem.file, frame=problem.row)


def _manifest(job: Job, plan: dict[str, Any], done: dict[int, Done]) -> Manifest:
    columns = sorted({column for finished in done.values() for column in finished.columns})
    beside: dict[str, dict[str, list[str]]] = {"info": {}, "arrays": {}}
    for section, name, kind in columns:
        if section in beside:
            beside[section].setdefault(name, []).append(kind)
    known = {name for section, name, _ in columns if section == "fields"}
    fields = {**FIELDS, **{field.name: field for field in job.dataset.declared}}
    left_out = [Problem(job.name(problem.file), problem.row, problem.reason) for problem in job.dataset.problems]
    return Manifest(
        name=job.dataset.name,
        note=job.dataset.note,
        plan=job.plan,
        fields=[field for field in fields.values() if field.name in known],
        info=beside["info"],
        arrays=beside["arrays"],
        shards=[entry for shard in sorted(done) if (entry := done[shard].entry) is not None],
        provenance={key: plan[key] for key in ("reader", "options", "sources", "rows", "rows_per_shard")},
        problems=left_out + [problem for shard in sorted(done) for problem in done[shard].problems],
        missing=_missing(done),
        matfound=__version__,
    )


def _missing(done: dict[int, Done]) -> list[Missing]:
    files: dict[str, LabelKinds] = {}
    for shard in sorted(done):
        for file, names, periodic, frames, first in done[shard].labels:
            files.setdefault(file, LabelKinds()).add(frozenset(names), periodic, first, frames)
    return [missing for file in sorted(files) for missing in files[file].missing(file)]


def _discard(folder: Path) -> None:
    """Nothing of a refused conversion stays."""
    for entry in folder.iterdir():
        if _OURS.fullmatch(entry.name):
            entry.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _clean(folder: Path, job: Job) -> None:
    """Remove what only an unfinished conversion needs."""
    for shard in range(job.shards):
        job.note(shard).unlink(missing_ok=True)
    (folder / CONVERSION).unlink(missing_ok=True)


def _finished(folder: Path, job: Job, began: float) -> Summary:
    """An earlier run did everything, but may have been stopped before it tidied up."""
    _clean(folder, job)
    for entry in folder.glob("*.partial"):
        entry.unlink(missing_ok=True)
    manifest = read_manifest(folder)
    return _summary(folder, manifest, job, len(manifest.shards), began)


def _summary(folder: Path, manifest: Manifest, job: Job, kept: int, began: float) -> Summary:
    skipped = len(job.dataset.problems)
    return Summary(
        folder, len(job.dataset) + skipped, manifest.rows, manifest.atoms, manifest.bytes, len(manifest.shards), kept, manifest.problems,
        manifest.missing, time.monotonic() - began,
    )  # fmt: skip
