"""The bytes of many shards as one range of addresses.

With all shards in one range, one computation of indices gathers a batch from all of them. Nothing is read when the range is reserved; a
shard is mapped when it is first needed, after which no file descriptor stays open. Shards behind a URL are not mapped: their blocks are
fetched into the same range.
"""

import ctypes
import mmap
import os
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from matfound.data.store_format import REBUILD
from matfound.errors import InputError

_PAGE = mmap.PAGESIZE
#: Linux: mmap(2).
_PRIVATE, _SHARED, _FIXED, _ANONYMOUS, _NORESERVE = mmap.MAP_PRIVATE, mmap.MAP_SHARED, 0x10, mmap.MAP_ANONYMOUS, 0x4000
_NONE = 0
_FAILED = ctypes.c_void_p(-1).value
_DONTNEED = 4
#: Bytes of a store behind a URL that stay in memory.
KEPT_BYTES = 2**30


class Place(NamedTuple):
    """A file of shards: its path (in its file system) and size."""

    path: str
    bytes: int


def _libc() -> Any:
    """The C library: Python's own mmap cannot place a file at an address."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


class _Memory:
    """Addresses as numpy wants to hear of them."""

    def __init__(self, address: int, size: int) -> None:
        self.__array_interface__ = {"data": (address, True), "shape": (size,), "typestr": "|u1", "version": 3}


class Space(ABC):
    """Shards, one behind another.

    Args:
        places: the files.
        blocks: how many checksums each has.

    Attributes:
        starts: first address of each shard in `bytes`, (shards,).
        bytes: everything, uint8.
        first_block: number of the first block of each shard, counted over all, (shards,).
        lasting: whether a block that was checked stays so.
    """

    lasting = False

    def __init__(self, places: Sequence[Place], blocks: Sequence[int]) -> None:
        self.places = list(places)
        pages = [-(-place.bytes // _PAGE) * _PAGE for place in places]
        self.starts = np.cumsum([0, *pages[:-1]], dtype=np.int64)
        self.first_block = np.cumsum([0, *blocks[:-1]], dtype=np.int64)
        self._libc = _libc()
        total = max(sum(pages), _PAGE)
        self._address = self._map(None, total, _NONE, _PRIVATE | _ANONYMOUS | _NORESERVE, -1)
        self._total = total
        weakref.finalize(self, self._libc.munmap, self._address, total)
        self.bytes = np.asarray(_Memory(self._address, total))
        self._views: dict[int, np.ndarray] = {}
        self._mapped = np.zeros(len(self.places), bool)
        #: First byte, length and crc32 of each block; filled in as shards are mapped.
        self._at = np.zeros(sum(blocks), np.int64)
        self._length = np.zeros(sum(blocks), np.int32)
        self._crc = np.zeros(sum(blocks), np.uint32)
        self.verified = self._bitmap(sum(blocks))

    @abstractmethod
    def _bitmap(self, blocks: int) -> np.ndarray:
        """Which blocks are here and were checked, uint8."""

    @abstractmethod
    def open(self, shard: int) -> None:
        """Make the addresses of a shard usable.

        Raises:
            InputError: the file is missing or has another size than the store says.
        """

    def make_room(self) -> None:
        """Drop what takes too much memory. Default: nothing does."""
        return

    @abstractmethod
    def bring(self, blocks: np.ndarray) -> None:
        """Put the content of blocks where it belongs."""

    @abstractmethod
    def read(self, shard: int, at: int, length: int) -> bytes:
        """Some bytes of a shard that no block has: its header, its checksums."""

    def _map(self, address: int | None, length: int, protection: int, flags: int, descriptor: int) -> int:
        found = self._libc.mmap(address, length, protection, flags, descriptor, 0)
        if found in (None, _FAILED):
            number = ctypes.get_errno()
            problem = f"cannot map {length:,} bytes of a store: {os.strerror(number)}"
            raise InputError(problem, remedy="raise the limit of addresses (ulimit -v unlimited)")
        return int(found)

    def view(self, dtype: np.dtype) -> np.ndarray:
        """All bytes as numbers of a type."""
        if dtype.num not in self._views:
            self._views[dtype.num] = self.bytes.view(dtype)
        return self._views[dtype.num]

    def describe(self, shard: int, at: np.ndarray, length: np.ndarray, crc: np.ndarray) -> None:
        """Blocks of a shard: their first bytes in it, lengths and checksums."""
        rows = slice(self.first_block[shard], self.first_block[shard] + len(at))
        self._at[rows], self._length[rows], self._crc[rows] = at + self.starts[shard], length, crc

    def check(self, first: np.ndarray, last: np.ndarray) -> np.ndarray | None:
        """See that these ranges of blocks are here and intact.

        Returns:
            Numbers of blocks that are damaged, or None.
        """
        self.make_room()
        span = int((last - first).max(initial=0))
        if span <= 1:
            if self.verified[first].all() and self.verified[last].all():
                return None
            blocks = np.unique(np.concatenate([first, last]))
        else:
            blocks = np.unique(np.minimum(first[:, None] + np.arange(span + 1), last[:, None]))
        blocks = blocks[self.verified[blocks] == 0]
        if not len(blocks):
            return None
        self.bring(blocks)
        damaged = [block for block in blocks.tolist() if not self._intact(block)]
        if damaged:
            return np.array(damaged)
        self.verified[blocks] = 1
        return None

    def _intact(self, block: int) -> bool:
        at = int(self._at[block])
        return zlib.crc32(self.bytes[at : at + int(self._length[block])].data) == int(self._crc[block])


class MappedSpace(Space):
    """Files of this machine, mapped."""

    lasting = True

    def _bitmap(self, blocks: int) -> np.ndarray:
        # Shared with forked workers: what one has checked, none has to check again.
        return np.frombuffer(mmap.mmap(-1, max(blocks, 1)), np.uint8)[:blocks]

    def open(self, shard: int) -> None:
        if self._mapped[shard]:
            return
        place = self.places[shard]
        try:
            descriptor = os.open(place.path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"cannot be opened: {error.strerror}", remedy="the store is not complete", file=place.path) from None
        try:
            check_size(place, os.fstat(descriptor).st_size)
            if place.bytes:
                self._map(self._address + int(self.starts[shard]), place.bytes, mmap.PROT_READ, _SHARED | _FIXED, descriptor)
        finally:
            os.close(descriptor)
        self._mapped[shard] = True

    def bring(self, blocks: np.ndarray) -> None:
        """They are mapped."""

    def read(self, shard: int, at: int, length: int) -> bytes:
        start = int(self.starts[shard]) + at
        return self.bytes[start : start + length].tobytes()


class RemoteSpace(Space):
    """Files behind a URL. Blocks are fetched, and all are dropped together when they are more than `KEPT_BYTES`.

    Args:
        places: the files, as the file system calls them.
        blocks: how many checksums each has.
        filesystem: of fsspec.
    """

    def __init__(self, places: Sequence[Place], blocks: Sequence[int], filesystem: Any) -> None:
        super().__init__(places, blocks)
        self.pid = os.getpid()
        self._files = filesystem
        self._kept = 0

    def _bitmap(self, blocks: int) -> np.ndarray:
        return np.zeros(blocks, np.uint8)

    def open(self, shard: int) -> None:
        if self._mapped[shard]:
            return
        address, length = self._address + int(self.starts[shard]), self.places[shard].bytes
        self._map(address, length, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE | _ANONYMOUS | _NORESERVE | _FIXED, -1)
        self._mapped[shard] = True

    def make_room(self) -> None:
        if self._kept > KEPT_BYTES:
            self.verified[:] = 0
            self._libc.madvise(self._address, self._total, _DONTNEED)
            self._kept = 0

    def bring(self, blocks: np.ndarray) -> None:
        shards = np.searchsorted(self.starts, self._at[blocks], side="right") - 1
        starts = (self._at[blocks] - self.starts[shards]).tolist()
        ends = [start + int(length) for start, length in zip(starts, self._length[blocks], strict=True)]
        for block, content in zip(blocks, self._fetch([self.places[shard] for shard in shards], starts, ends), strict=True):
            ctypes.memmove(self._address + int(self._at[block]), content, len(content))
            self._kept += len(content)

    def read(self, shard: int, at: int, length: int) -> bytes:
        return self._fetch([self.places[shard]], [at], [at + length])[0]

    def _fetch(self, places: list[Place], starts: list[int], ends: list[int]) -> list[bytes]:
        try:
            found: list[bytes] = self._files.cat_ranges([place.path for place in places], starts, ends, on_error="raise")
        except (OSError, ValueError) as error:
            raise InputError(f"cannot be fetched: {str(error) or type(error).__name__}", remedy="try again", file=places[0].path) from None
        for place, start, end, content in zip(places, starts, ends, found, strict=True):
            if len(content) != end - start:
                check_size(place, start + len(content))
        return found


def check_size(place: Place, actual: int) -> None:
    """Compare a file's size with what the store says.

    Raises:
        InputError: they differ.
    """
    if actual != place.bytes:
        what = "is cut off" if actual < place.bytes else "is longer than the store says"
        raise InputError(
            f"the shard {what}: {actual:,} bytes, expected {place.bytes:,}", remedy=f"restore it, or {REBUILD}", file=place.path
        )
