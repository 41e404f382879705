"""One shard after another: the work of a conversion, here or in processes of its own."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

from matfound.data.dataset import Dataset, Problem
from matfound.data.labels import LabelKinds, labels
from matfound.data.store_format import ShardEntry
from matfound.data.store_write import ShardBuilder
from matfound.errors import InputError
from matfound.fields import FIELDS, Field, declare

#: Rows between two reports of progress.
_TICK = 64
#: Seconds between two looks at the workers.
_POLL = 0.1


class Done(NamedTuple):
    """A finished shard (None where none of its rows could be used), what it has, and what was left out.

    `labels` says of each file which labels its rows have: file, labels, lattice or not, how many rows, the first of them.
    """

    entry: ShardEntry | None
    columns: list[tuple[str, str, str]]
    problems: list[Problem]
    labels: list[tuple[str, list[str], bool, int, int]]


@dataclasses.dataclass
class Job:
    """What every worker knows.

    Args:
        dataset: the source.
        out: folder of the store.
        plan: identifies the conversion.
        rows_per_shard: rows of the source that a shard stands for.
        names: files of the source to their names in the store; others keep only their last part.
        strict: refuse at the first row that cannot be used.
        keep_names: the source is a store: its names of files are what they should be.
        notes_missing: find labels that only some rows of a file have.
    """

    dataset: Dataset
    out: str
    plan: str
    rows_per_shard: int
    names: dict[str, str]
    strict: bool
    keep_names: bool = False
    notes_missing: bool = False
    declared: list[Field] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.declared = list({**FIELDS, **{field.name: field for field in self.dataset.declared}}.values())

    @property
    def shards(self) -> int:
        """How many there will be."""
        return -(-len(self.dataset) // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """Rows of the source that a shard stands for."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, len(self.dataset)))

    def name(self, file: object) -> str:
        """What a file of the source is called in the store."""
        text = str(file)
        return self.names.get(text, text if self.keep_names else os.path.basename(text))

    def path(self, shard: int) -> Path:
        """A shard's file."""
        return Path(self.out) / f"shard-{shard:05d}.h5"

    def note(self, shard: int) -> Path:
        """What stands beside a finished shard until all are."""
        return Path(self.out) / f"shard-{shard:05d}.json"

    def finished(self, shard: int) -> Done | None:
        """What is known of a shard that an earlier run finished, if it is still there."""
        try:
            content = json.loads(self.note(shard).read_text(encoding="utf-8"))
            done = _from_note(content)
            whole = content["plan"] == self.plan and (done.entry is None or self.path(shard).stat().st_size == done.entry.bytes)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return done if whole else None

    def make(self, shard: int, tick: Callable[[int], None]) -> Done:
        """Read, write and note one shard.

        Args:
            shard: its number.
            tick: called with the rows that were read since the last call.

        Raises:
            InputError: a row cannot be used and `strict` refuses that, or more than one row is wrong.
            OSError: it cannot be written.
        """
        builder, problems = ShardBuilder(self.dataset.key_map), []
        files: dict[str, LabelKinds] = {}
        rows = self.rows(shard)
        for count, (i, found) in enumerate(self.dataset.scan(rows.start, rows.stop), 1):
            file, row = self.dataset.place(i)
            try:
                if isinstance(found, InputError):
                    raise found
                builder.add(found, self.name(file), row)
                if self.notes_missing:
                    files.setdefault(self.name(file), LabelKinds()).add(labels(found.data), bool(found.data.pbc.any()), row)
            except InputError as error:
                if self.strict:
                    raise refusal(error.at(file, row)) from None
                place = (self.name(file if error.file is None else error.file), row if error.frame is None else error.frame)
                problems.append(Problem(*place, error.problem))
            if count % _TICK == 0:
                tick(_TICK)
        tick(len(rows) % _TICK)
        self.dataset.release(rows.stop - 1)
        entry = None
        if builder.rows:
            content, entry = builder.image(self.plan, shard)
            entry = entry._replace(file=self.path(shard).name)
            write_file(self.path(shard), content)
        kinds = [(file, kind, count) for file, known in files.items() for kind, count in known.kinds.items()]
        done = Done(entry, builder.contents(), problems, [(file, sorted(kind[0]), kind[1], *count) for file, kind, count in kinds])
        write_file(self.note(shard), json.dumps({"plan": self.plan, **_to_note(done)}).encode())
        return done


def refusal(error: InputError) -> InputError:
    """What strictness says of a row."""
    remedy = "repair or remove the row, or convert without --strict: then it is left out and listed"
    return InputError(error.problem, remedy=remedy, file=error.file, frame=error.frame)


def _to_note(done: Done) -> dict[str, Any]:
    entry = None if done.entry is None else done.entry._asdict()
    return {"entry": entry, "columns": done.columns, "problems": done.problems, "labels": done.labels}


def _from_note(content: dict[str, Any]) -> Done:
    entry = content["entry"]
    found = None if entry is None else ShardEntry(**{**entry, "header": tuple(entry["header"])})
    columns = [(str(a), str(b), str(c)) for a, b, c in content["columns"]]
    return Done(found, columns, [Problem(*item) for item in content["problems"]], [tuple(item) for item in content["labels"]])


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all, whatever happens meanwhile."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------------------------------------------- workers


def run(job: Job, todo: Sequence[int], workers: int, advance: Callable[[int], None]) -> Iterator[tuple[int, Done]]:
    """Make shards.

    Args:
        job: what to do.
        todo: numbers of the shards.
        workers: processes; 1 does it here.
        advance: called with the rows that were read since the last call.

    Raises:
        InputError, OSError: of the first worker that has one; the others are stopped.
    """
    if workers <= 1 or len(todo) <= 1:
        for shard in todo:
            yield shard, job.make(shard, advance)
        return
    with _Workers(job, todo, min(workers, len(todo))) as processes:
        yield from processes.results(advance)


class _Workers:
    """Processes that are each handed the next shard when they are done with one.

    They are started anew (spawned): torch's threads and open databases do not survive a fork. Nothing is locked, so that one that is killed
    at any moment holds up nobody: whoever waits, waits on pipes, which close with their process.
    """

    def __init__(self, job: Job, todo: Sequence[int], count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._todo = list(todo)
        self._left = len(todo)
        self._rows = context.RawArray("q", count)  # each process counts in a place of its own
        self._seen = 0
        self._processes = []
        self._pipes: list[Connection] = []
        for place in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(job, self._rows, place, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join()
            process.close()
            pipe.close()

    def results(self, advance: Callable[[int], None]) -> Iterator[tuple[int, Done]]:
        """Finished shards, as they come."""
        for pipe in self._pipes:
            self._hand_out(pipe)
        while self._left:
            for ready in wait(self._pipes, _POLL):
                pipe = cast(Connection, ready)
                try:
                    shard, result = pipe.recv()
                except (EOFError, OSError):  # the latter in the middle of a message
                    raise self._lost() from None
                if isinstance(result, BaseException):
                    raise result
                self._left -= 1
                self._hand_out(pipe)
                yield shard, Done(*result)
            rows = sum(self._rows)
            advance(rows - self._seen)
            self._seen = rows

    def _hand_out(self, pipe: Connection) -> None:
        if self._todo:
            try:
                pipe.send(self._todo.pop(0))
            except OSError:
                raise self._lost() from None

    def _lost(self) -> InputError:
        codes = []
        for process in self._processes:
            process.join(1)
            codes.append(process.exitcode)
        killed = next((code for code in codes if code), None)
        why = f"by signal {-killed} ({signal.Signals(-killed).name})" if killed is not None and killed < 0 else f"with code {killed}"
        remedy = "run the same command again: finished shards are kept; fewer --workers need less memory"
        return InputError(f"a worker ended {why}", remedy=remedy)


def _work(job: Job, rows: Any, place: int, pipe: Connection) -> None:
    """What a process does. Nothing that it raises gets lost."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    for field in job.declared:
        declare(field, from_data=True)

    def tick(count: int) -> None:
        rows[place] += count

    while True:
        shard = pipe.recv()
        try:
            pipe.send((shard, tuple(job.make(shard, tick))))
        except (InputError, OSError) as error:
            pipe.send((shard, error))
        except Exception as error:  # noqa: BLE001 - what happened must reach the parent
            pipe.send((shard, RuntimeError(f"shard {shard}: {type(error).__name__}: {error}")))


def _end_with(parent: Any) -> None:
    """A worker without its parent has nobody to work for."""
    parent.join()
    os._exit(1)
