"""Parquet tables, read batch by batch."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from matfound.data.table_files import Block, Kind, TableFile, check_names
from matfound.errors import InputError

#: Values and bytes of one batch, at most, and number of batches that are kept.
BATCH_VALUES, BATCH_BYTES, CACHED = 1 << 20, 1 << 24, 4


class ParquetFile(TableFile):
    """A Parquet file. Rows in order are read once; others cost reading their row group up to there, unless they were read lately.

    Arguments and errors as for `open_table_file`.
    """

    def __init__(self, file: str, numbers: Callable[[list[str]], Iterable[str]]) -> None:
        self.file = file
        self._handle: tuple[int, Any] | None = None
        self._batches: tuple[int, int, Iterator[Any]] | None = None  # row group, next row, batches
        self._cache: OrderedDict[int, Block] = OrderedDict()
        parquet = self._open()
        schema = parquet.schema_arrow
        self.columns = list(schema.names)
        check_names(self.columns, file)
        self._numbers = frozenset(numbers(self.columns))
        self._kinds: dict[str, Kind] = {name: _kind(schema.field(name).type) for name in self.columns}
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        sizes = [group.num_rows for group in groups]
        self._firsts = list(accumulate(sizes, initial=0))
        self.size = self._firsts.pop()
        row = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
        self._batch = max(1, min(BATCH_VALUES // max(1, len(self.columns)), int(BATCH_BYTES / max(1.0, row))))

    def kinds(self) -> Mapping[str, Kind]:
        return self._kinds

    def release(self) -> None:
        self._cache.clear()
        self._handle = self._batches = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_batches": None, "_cache": OrderedDict()}

    def _open(self) -> Any:
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = (os.getpid(), pq.ParquetFile(self.file, pre_buffer=False, buffer_size=1 << 20))
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(error) from error
        return self._handle[1]

    def _damaged(self, error: BaseException) -> InputError:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return InputError(f"cannot be read as Parquet: {reason[0]}", remedy="fetch the file again", file=self.file)

    def block(self, row: int) -> Block:
        group = bisect_right(self._firsts, row) - 1
        first = self._firsts[group]
        start = first + (row - first) // self._batch * self._batch
        if start in self._cache:
            self._cache.move_to_end(start)
            return self._cache[start]
        if self._batches is None or self._handle is None or self._handle[0] != os.getpid() or self._batches[0] != group:
            self._batches = None
        if self._batches is None or self._batches[1] > start:
            batches = self._open().iter_batches(batch_size=self._batch, row_groups=[group], use_threads=False)
            self._batches = (group, first, batches)
        try:
            _, at, batches = self._batches
            batch = next(batches)
            while at < start:
                at, batch = at + len(batch), next(batches)
        except (OSError, pa.ArrowException, StopIteration) as error:
            self._batches = None
            raise self._damaged(error).at(frame=row) from error
        self._batches = (group, at + len(batch), batches)
        columns = {name: column_values(batch.column(i), name in self._numbers) for i, name in enumerate(self.columns)}
        block = Block(start, start + len(batch), np.arange(start, start + len(batch)), columns, {})
        self._cache[start] = block
        if len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return block


def _kind(kind: pa.DataType) -> Kind:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int"
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "list"
    return "text"


def column_values(column: pa.Array, as_floats: bool = False) -> np.ndarray:
    """Values of a column, as `Block` has them: lists of numbers as arrays, with NaN for a missing one.

    Integers of which some are missing are objects, so that none changes; `as_floats` makes floats of them.
    """
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if number and (column.null_count == 0 or as_floats or pa.types.is_floating(column.type)):
        return np.asarray(column.to_numpy(zero_copy_only=False))
    values = np.empty(len(column), object)
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    numeric = is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
    if numeric:
        for i in range(len(column)):
            values[i] = np.asarray(column[i].values.to_numpy(zero_copy_only=False)) if column[i].is_valid else None
    else:
        values[:] = column.to_pylist()
    return values
