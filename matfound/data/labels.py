"""Which labels the frames of a file have: one that only some of them have is usually an accident."""

from typing import NamedTuple

from matfound.errors import InputError
from matfound.fields import FIELDS
from matfound.structures.atomic_data import AtomicData


class Missing(NamedTuple):
    """A label that only some frames of a file have: the first frame that lacks it, and how many of how many have it."""

    label: str
    file: str
    row: int
    having: int
    of: int

    def error(self) -> InputError:
        """What to say where that is not meant."""
        return inconsistent(self.label, self.file, self.row, f"{self.having} of {self.of} frames of the file have it")


class LabelKinds:
    """Which labels the frames of a file have."""

    def __init__(self) -> None:
        #: Labels, and whether there is a lattice: how many frames are so, and the first of them.
        self.kinds: dict[tuple[frozenset[str], bool], tuple[int, int]] = {}

    def add(self, names: frozenset[str], periodic: bool, row: int, frames: int = 1) -> None:
        """Count frames, the first of which is `row`."""
        count, first = self.kinds.get((names, periodic), (0, row))
        self.kinds[names, periodic] = count + frames, min(first, row)

    def missing(self, file: str) -> list[Missing]:
        """Labels that only some frames have."""
        some = frozenset[str]().union(*(names for names, _ in self.kinds))
        total = sum(count for count, _ in self.kinds.values())
        first: dict[str, int] = {}
        for (names, periodic), (_, row) in self.kinds.items():
            for label in missing_labels(names, periodic, some):
                first[label] = min(first.get(label, row), row)
        having = {label: sum(count for (names, _), (count, _) in self.kinds.items() if label in names) for label in first}
        return [Missing(label, file, first[label], having[label], total) for label in sorted(first)]


def labels(data: AtomicData) -> frozenset[str]:
    """Names of the labels that a structure has."""
    return frozenset(name for name in data.keys() if (field := FIELDS.get(name)) is not None and field.label)


def missing_labels(names: frozenset[str], periodic: bool, expected: frozenset[str]) -> frozenset[str]:
    """The expected labels that a structure with these lacks and could have: without a lattice there is no stress."""
    lacking = expected - names
    return lacking if periodic else lacking - {"stress"}


def inconsistent(label: str, file: str, row: int, others: str) -> InputError:
    """What to say of a label that a frame lacks."""
    return InputError(
        f"label '{label}' is missing, but {others}",
        remedy="repair the frame, or say that it is meant: allow_missing: true (--allow-missing on the command line)",
        file=file,
        frame=row,
    )
