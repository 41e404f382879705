"""Fetching the splits that upstream serves, and finding them again.

A split lies in `FOLDER/DATASET/SPLIT/` with a receipt (`fetched.json`), which is written last: a folder without one is never used. What
is not finished is in `FOLDER/DATASET/.SPLIT.partial/`, where the next attempt goes on, in the middle of a file if the server can do that.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matfound import catalog
from matfound.catalog import DownloadCard, DownloadPart
from matfound.data.unpack import stem, unpack
from matfound.errors import InputError, nearest

RECEIPT = "fetched.json"
#: Called with the name of a file, the bytes that are there and those that there will be (None: unknown).
Progress = Callable[[str, int, int | None], None]
#: Attempts without a single byte, one after the other, before a connection is given up; and seconds to wait after the first.
ATTEMPTS, WAIT = 5, 1.0
#: A connection that is cut loses what came of the last piece.
_PIECE = 1 << 16
_TIMEOUT = 60
#: Reader to the endings of its files; those of a reader of folders, and of one that takes the files themselves.
_FOLDERS = {"oc20": (".extxyz.xz", ".extxyz"), "lmdb": (".lmdb",), "aselmdb": (".aselmdb",), "store": ("store.json",)}
_FILES = {
    "files": (".extxyz", ".xyz", ".extxyz.xz", ".extxyz.gz", ".xyz.xz", ".traj", ".db", ".cif"),
    "table": (".csv", ".csv.gz", ".csv.xz", ".tsv", ".parquet"),
    "qm9": (".npz",),
}


class Plan(NamedTuple):
    """What a fetch will do."""

    dataset: str
    split: str
    licence: str
    card: DownloadCard
    #: Where the split will lie.
    folder: Path
    #: Bytes of all files together, about; None where upstream does not say.
    bytes: int | None
    #: Bytes that an earlier attempt left.
    have: int
    #: Whether it has been fetched already.
    done: bool


def cache_folder() -> Path:
    """Where splits are fetched to: datasets/ in $MATFOUND_CACHE, else in the user's cache folder."""
    if given := os.environ.get("MATFOUND_CACHE"):
        return Path(given) / "datasets"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "matfound" / "datasets"


def plan(name: str, split: str, out: str | os.PathLike[str] | None = None) -> Plan:
    """What fetching a split will do; nothing is done.

    Raises:
        InputError: no such dataset, or no such split of it (the nearest is suggested).
    """
    card = catalog.dataset(name)
    if not card.downloads:
        raise InputError(f"dataset '{name}' comes with matfound: there is nothing to fetch", remedy=f"matfound data info {name}")
    if split not in card.downloads:
        problem = f"dataset '{name}' has no split '{split}' to fetch" if split else f"dataset '{name}' has several splits to fetch"
        raise InputError(problem, remedy=nearest(split, card.downloads) if split else "give one with --split: " + ", ".join(card.downloads))
    download = card.downloads[split]
    folder = (cache_folder() if out is None else Path(out).expanduser().resolve()) / name / split
    total = _total(download)
    have = sum(file.stat().st_size for file in _work(folder).rglob("*") if file.is_file()) if _work(folder).is_dir() else 0
    return Plan(name, split, card.licence, download, folder, total, have, _receipt(folder, download) is not None)


def _total(card: DownloadCard) -> int | None:
    sizes = [part.bytes for part in card.parts if part.bytes is not None]
    return sum(sizes) if len(sizes) == len(card.parts) else card.bytes


def _work(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.partial"


def _receipt(folder: Path, card: DownloadCard | None) -> dict[str, Any] | None:
    """The receipt of a folder, if it is one of the card as it is now."""
    try:
        content = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
        urls = [part["url"] for part in content["parts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if card is None or urls == [part.url for part in card.parts] else None


def fetch(wanted: Plan, progress: Progress | None = None) -> Path:
    """Download the files of a split, check and unpack them, and put them in their place; the folder where they are.

    What was fetched before is not fetched again. A file whose checksum is wrong is put aside as `NAME.wrong`.

    Raises:
        InputError: the server does not have a file, or another one than the card says; the connection is lost for good; a checksum is
            wrong; an archive is damaged or would write outside of its folder; no room on the disk.
    """
    if not wanted.done:
        work = _work(wanted.folder)
        if wanted.folder.is_dir() and any(wanted.folder.iterdir()):
            problem = "the folder has files, but not those that are to be fetched"
            raise InputError(problem, remedy="move it away, or give another --out", file=wanted.folder)
        try:
            work.mkdir(parents=True, exist_ok=True)
            parts = [_part(part, wanted, work, progress) for part in wanted.card.parts]
            receipt = {"dataset": wanted.dataset, "split": wanted.split, "licence": wanted.licence, "parts": parts}
            (work / "unpacked" / RECEIPT).write_text(json.dumps(receipt, indent=1), encoding="utf-8")
            os.replace(work / "unpacked", wanted.folder)  # an empty folder gives way, any other does not
            shutil.rmtree(work)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            remedy = "free space, or fetch to another disk with --out; what is there is kept, and the next attempt goes on from it"
            raise InputError("the disk is full", remedy=remedy, file=work) from error
    _register(wanted)
    return wanted.folder


def _part(part: DownloadPart, wanted: Plan, work: Path, progress: Progress | None) -> dict[str, Any]:
    """Fetch and unpack one file; its entry in the receipt. The entry stands beside what was unpacked once that is complete."""
    name = file_name(part.url)
    target = work / "unpacked" / (stem(name) if wanted.card.unpack else name)
    note = work / f"{name}.json"
    if target.exists() and note.is_file():
        entry: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return entry
    archive = download(part, work, progress, room=wanted.bytes if len(wanted.card.parts) == 1 else part.bytes)
    kind, checksum = ("md5", part.md5) if part.md5 else ("sha256", part.sha256 or _digest(archive))
    entry = {"url": part.url, "bytes": archive.stat().st_size, kind: checksum}
    note.write_text(json.dumps(entry), encoding="utf-8")
    target.parent.mkdir(exist_ok=True)
    if wanted.card.unpack:
        unpack(archive, target, wanted.card.unpack)
        archive.unlink()
    else:
        os.replace(archive, target)
    return entry


def file_name(url: str) -> str:
    """The name of a file on a server."""
    return Path(url.partition("?")[0].rstrip("/")).name or "file"


def download(part: DownloadPart, folder: Path, progress: Progress | None = None, room: int | None = None) -> Path:
    """One file, checked. `NAME.partial` is what has come so far. Errors as for `fetch`."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    name = file_name(part.url)
    known = f"md5:{part.md5}" if part.md5 else f"sha256:{part.sha256}" if part.sha256 else None
    if known is None and (folder / name).is_file():
        return folder / name
    if room is not None and not (folder / name).is_file():
        partial = folder / f"{name}.partial"
        missing = room - (partial.stat().st_size if partial.is_file() else 0)
        free = shutil.disk_usage(folder).free
        if free < missing:
            problem = f"{missing / 1e9:.1f} GB are to come, but the disk has room for {free / 1e9:.1f} GB"
            raise InputError(problem, remedy="free space, or fetch to another disk with --out", file=folder)
    return Path(pooch.retrieve(part.url, known, name, folder, downloader=_Downloader(part, progress)))


class _Downloader:
    """What pooch fetches with: goes on with a `.partial` file, and checks while it writes."""

    def __init__(self, part: DownloadPart, progress: Progress | None) -> None:
        self._part, self._progress = part, progress
        self._name = file_name(part.url)

    def __call__(self, url: str, output: str, pooch: Any) -> None:
        partial = Path(output).parent / f"{self._name}.partial"
        _Transfer(url, partial, self._part, self._progress).run()
        os.replace(partial, output)
        _validator(partial).unlink(missing_ok=True)


def _validator(partial: Path) -> Path:
    """Where the server's name for this version of the file is kept, so that two versions are never joined."""
    return partial.with_name(partial.name + ".version")


class _Transfer:
    def __init__(self, url: str, partial: Path, part: DownloadPart, progress: Progress | None) -> None:
        self._url, self._partial, self._part, self._progress = url, partial, part, progress
        self._hash = hashlib.new("md5" if part.md5 else "sha256", usedforsecurity=False)
        self._expected = part.md5 or part.sha256
        self._at = 0
        self._total = part.bytes

    def run(self) -> None:
        if self._partial.is_file():
            for piece in _pieces(self._partial):
                self._add(piece)
        left, wait, before = ATTEMPTS, WAIT, self._at
        while not self._attempt():
            left, wait = (ATTEMPTS, WAIT) if self._at > before else (left - 1, wait * 2)
            before = self._at
            if left == 0:
                remedy = f"try again: the {self._at} bytes that came are kept" if self._at else "check the network, and try again"
                raise InputError(f"the connection fails: {self._problem}", remedy=remedy, file=self._url)
            time.sleep(wait)
        if self._expected and self._hash.hexdigest() != self._expected:
            wrong = self._partial.with_suffix(".wrong")
            os.replace(self._partial, wrong)
            _validator(self._partial).unlink(missing_ok=True)
            problem = f"{self._hash.name} is {self._hash.hexdigest()}, expected {self._expected}: kept as {wrong}"
            raise InputError(problem, remedy="fetch again; if it is wrong again, upstream has changed the file", file=self._url)

    def _add(self, piece: bytes) -> None:
        self._hash.update(piece)
        self._at += len(piece)
        if self._progress:
            self._progress(self._partial.name.removesuffix(".partial"), self._at, self._total)

    def _attempt(self) -> bool:
        """Whether the file is complete now; what is wrong with the connection is in `_problem`."""
        import requests

        version = _validator(self._partial)
        headers = {"Accept-Encoding": "identity"}
        if self._at:
            headers["Range"] = f"bytes={self._at}-"
            if version.is_file():
                headers["If-Range"] = version.read_text(encoding="utf-8")
        try:
            with requests.get(self._url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
                if answer.status_code == 416 and self._at and answer.headers.get("Content-Range", "").endswith(f"/{self._at}"):
                    return True
                if answer.status_code == 416 or (answer.status_code == 200 and self._at):  # from the start, then
                    self._restart()
                    if answer.status_code == 416:
                        self._problem = "the server has less than was fetched already"
                        return False
                self._refuse(answer)
                return self._receive(answer)
        except requests.exceptions.ChunkedEncodingError:
            self._problem = f"it was cut off at {self._at} of {self._total} bytes"
            return False
        except (requests.ConnectionError, requests.Timeout) as error:
            self._problem = " ".join(str(error).split())[:120]
            return False
        except requests.RequestException as error:
            raise InputError(f"cannot be fetched: {error}", remedy="check the address and the network", file=self._url) from error

    def _restart(self) -> None:
        self._partial.unlink(missing_ok=True)
        self._hash = hashlib.new(self._hash.name, usedforsecurity=False)
        self._at = 0

    def _refuse(self, answer: Any) -> None:
        if answer.status_code >= 500 or answer.status_code in (408, 429):
            import requests

            raise requests.ConnectionError(f"the server answers {answer.status_code} {answer.reason}")
        if answer.status_code not in (200, 206):
            remedy = "the address may have changed: see the dataset's page, or fetch the file by hand"
            raise InputError(f"the server answers {answer.status_code} {answer.reason}", remedy=remedy, file=self._url)
        length = answer.headers.get("Content-Length", "")
        self._total = self._at + int(length) if length.isdigit() else self._part.bytes
        if self._part.bytes is not None and self._total != self._part.bytes:
            problem = f"the server has a file of {self._total} bytes, the card says {self._part.bytes}"
            raise InputError(problem, remedy="upstream has changed the file: see the dataset's page", file=self._url)

    def _receive(self, answer: Any) -> bool:
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if version and not version.startswith("W/"):
            _validator(self._partial).write_text(version, encoding="utf-8")
        with self._partial.open("ab") as stream:
            for piece in answer.iter_content(_PIECE):
                stream.write(piece)
                self._add(piece)
        self._problem = f"it ended after {self._at} of {self._total} bytes"
        return self._total is None or self._at >= self._total


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            yield piece


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _register(wanted: Plan) -> None:
    """Note where a split lies that was not fetched to the usual place."""
    usual = cache_folder() / wanted.dataset / wanted.split
    if wanted.folder != usual:
        note = usual.with_name(f"{wanted.split}.location")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(os.fspath(wanted.folder), encoding="utf-8")


def local(name: str, split: str) -> Path | None:
    """The folder that a split was fetched to; None if it was not.

    Raises:
        InputError: no such dataset.
    """
    card = catalog.dataset(name).downloads.get(split)
    if card is None:
        return None
    usual = cache_folder() / name / split
    candidates = [usual]
    note = usual.with_name(f"{split}.location")
    if note.is_file():
        candidates.append(Path(note.read_text(encoding="utf-8")))
    return next((folder for folder in candidates if _receipt(folder, card) is not None), None)


def find(name: str, split: str, below: str = "") -> tuple[str, list[Path]]:
    """What reads a fetched split (a kind of `matfound.data.open.READERS`), and the files or folders to give it.

    Args:
        name: the dataset.
        split: one of its downloads.
        below: a folder in it, where it has several that are sets of their own: "all/train".

    Raises:
        InputError: no such split, it has not been fetched, nothing in it is called that, or it has several sets and none was named.
    """
    wanted = plan(name, split)
    folder = local(name, split)
    if folder is None:
        raise InputError(f"'{name}/{split}' has not been fetched", remedy=f"matfound data fetch {name} --split {split}")
    reader = wanted.card.reader
    endings = _FOLDERS.get(reader) or _FILES[reader]
    files = sorted(path for path in folder.rglob("*") if path.name.endswith(endings) and path.is_file())
    found = sorted({path.parent for path in files}) if reader in _FOLDERS else files
    places = {path: path.relative_to(folder).as_posix() for path in found}
    chosen = [path for path in found if f"/{below.strip('/')}/" in f"/{places[path]}/"] if below else found
    if not chosen:
        raise InputError(f"nothing in '{name}/{split}' is called '{below}'", remedy=nearest(below, places.values()), file=folder)
    if reader in _FOLDERS and len(chosen) > len(wanted.card.parts):
        common = os.path.commonpath([places[path] for path in chosen])
        rests = [places[path].removeprefix(common).lstrip("/") for path in chosen]
        names = ", ".join(f"{name}/{split}/{rest}" for rest in rests[:8]) + (", …" if len(rests) > 8 else "")
        raise InputError(f"'{name}/{split}' has {len(chosen)} sets", remedy=f"name one: {names}")
    return reader, chosen
