"""OC20's structure-to-energy-and-forces archives as they are published: `N.extxyz.xz` with `N.txt.xz`.

Line i of the text file, `randomSID,frameFID,reference`, belongs to frame i. The energies in the structure file are total DFT energies;
total minus reference is the adsorption energy, which OC20's models and leaderboard use (Chanussot et al., ACS Catal. 11, 6059, 2021,
doi:10.1021/acscatal.0c04525).
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matfound import catalog
from matfound.data.dataset import Frame, SlicedSource, Source, SourceDataset, as_key_map
from matfound.data.extxyz import open_text
from matfound.data.extxyz_stream import StreamSource
from matfound.data.files import as_slice
from matfound.errors import InputError
from matfound.structures.keys import KeyMap


class Line(NamedTuple):
    """A line of an archive's text file: what belongs to one frame; the reference energy in eV."""

    sid: str
    fid: str
    reference: float

    @property
    def id(self) -> str:
        """The system and frame as the leaderboard writes them: "1000100_60" for random1000100,frame60."""
        return f"{self.sid.removeprefix('random')}_{self.fid.removeprefix('frame')}"


class ArchiveSource(Source):
    """One archive. Its text file is read at once; its structures stay in memory from when one is asked for until they are released.

    A scan keeps nothing in memory.
    """

    def __init__(self, structures: Path, references: Path, keys: KeyMap | None, total_energy: bool) -> None:
        self.file, self._references = str(structures), str(references)
        self._keys, self._total_energy = keys, total_energy
        self._lines = read_lines(references)
        self.size = len(self._lines)
        self._structures: StreamSource | None = None
        self._frames: list[Frame | InputError] | None = None

    def frame(self, i: int) -> Frame:
        if self._frames is None:
            self._frames = [found for _, found in self.scan(0, self.size)]
        found = self._frames[i]
        if isinstance(found, InputError):
            raise found
        return found

    def scan(self, start: int, stop: int) -> Iterator[tuple[int, Frame | InputError]]:
        if self._frames is not None:
            yield from enumerate(self._frames[start:stop], start)
            return
        if self._structures is None:
            self._structures = StreamSource(self.file, slice(None), self._keys)
        if self._structures.size != self.size:
            count = f"more than {self.size}" if self._structures.size > self.size else str(self._structures.size)
            raise InputError(
                f"{count} frames, but {self._references} has {self.size} lines",
                remedy="fetch both files again: line i belongs to frame i",
                file=self.file,
            )
        for i, found in self._structures.scan(start, stop):
            try:
                yield i, found if isinstance(found, InputError) else self._complete(found, i)
            except InputError as error:
                yield i, error

    def _complete(self, frame: Frame, i: int) -> Frame:
        """The frame with what its line in the text file says."""
        line = self._lines[i]
        frame.data.id = line.id
        if not self._total_energy:
            if "energy" not in frame.data:
                raise InputError("no energy to subtract the reference from", remedy="fetch the file again", file=self.file, frame=i)
            frame.data.energy = frame.data.energy - line.reference
        return frame._replace(info={**frame.info, "sid": line.sid, "fid": line.fid, "reference_energy": line.reference})

    def release(self) -> None:
        self._frames = None


def read_lines(path: Path) -> list[Line]:
    """The lines of an archive's text file.

    Raises:
        InputError: it cannot be read, is empty, or has a line that is something else.
    """
    lines = []
    try:
        with open_text(path) as stream:
            for number, text in enumerate(stream, start=1):
                if text.strip():
                    lines.append(_parse(text.strip(), path, number))
    except InputError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", remedy="fetch the file again", file=path) from error
    if not lines:
        raise InputError("the file is empty: no lines of 'randomSID,frameFID,energy'", remedy="fetch the file again", file=path)
    return lines


def _parse(text: str, path: Path, number: int) -> Line:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 3 and parts[0] and parts[1] and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", parts[2]):
        return Line(parts[0], parts[1], float(parts[2]))
    raise InputError(f"line {number} is {text[:60]!r}, expected 'randomSID,frameFID,energy'", remedy="fetch the file again", file=path)


def _pairs(path: Path) -> list[tuple[Path, Path]]:
    """The archives of a folder, in the order of their numbers, or the one that a file belongs to."""
    folder = path if path.is_dir() else path.parent
    found: dict[str, dict[str, Path]] = {}
    for entry in sorted(folder.iterdir()):
        match = re.fullmatch(r"(.+)\.(extxyz|txt)(\.xz)?", entry.name)
        if match and match[2] not in found.setdefault(match[1], {}):  # "0.txt" sorts before, and is read instead of, "0.txt.xz"
            found[match[1]][match[2]] = entry
    if not path.is_dir():
        stem = path.name.partition(".extxyz")[0] if ".extxyz" in path.name else path.name.partition(".txt")[0]
        found = {stem: found.get(stem, {})}
    archives = [stem for stem, files in found.items() if "extxyz" in files]
    if not archives:
        raise InputError("no archives: expected N.extxyz.xz with N.txt.xz", remedy="name the folder that has them", file=path)
    for stem, files in found.items():
        if "extxyz" in files and "txt" not in files:
            raise InputError(
                f"its text file {stem}.txt.xz (or .txt) is missing",
                remedy="fetch it: it has the ids and the references",
                file=files["extxyz"],
            )
        if "extxyz" not in files and stem.isdigit():
            raise InputError(f"its structures {stem}.extxyz.xz (or .extxyz) are missing", remedy="fetch them", file=files["txt"])
    order = sorted(archives, key=lambda stem: (not stem.isdigit(), int(stem) if stem.isdigit() else 0, stem))
    return [(found[stem]["extxyz"], found[stem]["txt"]) for stem in order]


class OC20Archives(SourceDataset):
    """OC20 S2EF folders. `fixed` and `tags` come with the structures; `id` is "SID_FID"; `sid` and `fid` are keys to split by.

    An archive stays in memory once it was read; for shuffled training on millions of frames that is more than a machine has.

    Args:
        path: folder or folders with the archives, or one archive's file.
        name: see `Dataset`.
        total_energy: keep the total energies instead of subtracting the reference energies.
        keys: as for `FileDataset`.
        allow_missing: as for `FileDataset`.
        index: as for `FileDataset`.

    Raises:
        InputError: no archives, one of a pair is missing or damaged, a line is not what it should be, or (when the archive is first
            read) the numbers of frames and lines differ: both files are named.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        name: str = "oc20",
        total_energy: bool = False,
        keys: Mapping[str, Any] | None = None,
        allow_missing: bool = False,
        index: str | None = None,
    ) -> None:
        mapped = as_key_map(keys)
        paths = [path] if isinstance(path, str | os.PathLike) else path
        pairs = [pair for entry in paths for pair in _pairs(catalog.resolve(entry))]
        wanted = as_slice(index)
        archives = [ArchiveSource(structures, references, mapped, total_energy) for structures, references in pairs]
        sources = archives if index is None else [SlicedSource(archive, wanted) for archive in archives]
        super().__init__(sources, name, mapped, allow_missing)
        self.note = "total DFT energies" if total_energy else "energies are adsorption energies: total minus the reference of the text file"
