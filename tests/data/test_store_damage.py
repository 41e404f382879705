"""Whatever happens to a store's files, it is refused in one line that names the file and what to do."""

import contextlib
import json
import random
import shutil

import numpy as np
import pytest
import torch

from matfound.data.convert import convert
from matfound.data.open import open_dataset
from matfound.data.store import Store
from matfound.data.store_format import TYPES, _checksum
from matfound.data.store_verify import verify
from matfound.errors import InputError


@pytest.fixture
def store(tmp_path, text):
    file = tmp_path / "cu.extxyz"
    file.write_text(text * 8)
    convert(file, tmp_path / "store", rows_per_shard=50)
    return tmp_path / "store"


def _open(folder, read):
    opened = Store(folder)
    if read:
        opened.batch(range(len(opened)))
        for i in range(len(opened)):
            opened.frame(i)
            opened.place(i)


def refused(folder, *words, read=True):
    with pytest.raises(InputError) as error:
        _open(folder, read)
    message = str(error.value)
    assert "\n" not in message and message.count("(") >= 1
    for word in words:
        assert word in message, message
    return message


def edit(folder, change):
    """A header that was written on purpose: its checksum is right."""
    content = json.loads((folder / "store.json").read_text())
    change(content)
    content["checksum"] = _checksum(content)
    (folder / "store.json").write_text(json.dumps(content))


def test_an_intact_store(store):
    found = verify(store)
    assert (found.rows, found.shards, found.left_out, found.faults) == (96, 2, 0, [])
    assert found.bytes == sum(file.stat().st_size for file in store.glob("*.h5"))


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_shard(store, keep):
    file = store / "shard-00001.h5"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    refused(store, str(file), "the shard is cut off", f"expected {len(content):,}", read=False)
    with pytest.raises(InputError, match="cut off"):
        verify(store)
    file.write_bytes(content + b"x")
    refused(store, str(file), "longer than the store says", read=False)


def test_truncated_after_it_was_opened(store):
    """Reading through the map of a file that was cut would kill the process."""
    opened = Store(store)
    file = store / "shard-00001.h5"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(InputError, match="the shard is cut off"):
        opened.get(95)


def test_missing_shard(store):
    (store / "shard-00000.h5").unlink()
    refused(store, "shard-00000.h5: the shard is missing", "convert the source again", read=False)


def test_removed_after_it_was_opened(store):
    opened = Store(store)
    (store / "shard-00001.h5").unlink()
    with pytest.raises(InputError, match=r"shard-00001.h5: cannot be opened: No such file"):
        opened.get(95)


def test_wrong_shard(store, tmp_path, text):
    """One of another store, or another one of this store, of the same size."""
    other = tmp_path / "other.extxyz"
    other.write_text((text * 8).replace("cu-0", "cu-X"))
    convert(other, tmp_path / "others", rows_per_shard=50)
    original = (store / "shard-00000.h5").read_bytes()
    foreign = (tmp_path / "others" / "shard-00000.h5").read_bytes()
    foreign = foreign[: len(original)].ljust(len(original), b"\0")
    (store / "shard-00000.h5").write_bytes(foreign)
    refused(store, "shard-00000.h5", "header of the shard is damaged, or it is a shard of another store")
    assert "header" in verify(store).faults[0].problem

    (store / "shard-00000.h5").write_bytes(original)

    entry = json.loads((tmp_path / "others" / "store.json").read_text())["shards"][0]
    edit(store, lambda content: content["shards"].__setitem__(0, entry))
    shutil.copy(tmp_path / "others" / "shard-00000.h5", store)
    refused(store, "shard-00000.h5", "this shard belongs to another store, or elsewhere in this one")


def test_every_flipped_byte_is_found(store):
    """In data that is read: at its first touch. Anywhere: by verify."""
    rng = random.Random(0)
    opened = Store(store)
    header = opened._shards.header(0)
    file = store / "shard-00000.h5"
    content = file.read_bytes()
    intact = opened.batch(range(96))
    data = [extent for extent in header.extents if extent.length]
    for trial in range(40):
        extent = data[trial % len(data)]
        place = extent.at + rng.randrange(extent.length * TYPES[extent.type].itemsize)
        flip(file, content, place, rng)
        message = refused(store, str(file), extent.path, "is damaged", "its bytes do not have their checksum", "convert the source again")
        assert "row" in message
        faults = verify(store).faults
        assert [fault.file for fault in faults] == [str(file)] and extent.path in faults[0].problem
    for _ in range(40):
        place = rng.randrange(len(content))
        flip(file, content, place, rng)
        assert {fault.file for fault in verify(store).faults} == {str(file)}
        with contextlib.suppress(InputError):  # where it is not data, what is read is right
            assert torch.equal(Store(store).batch(range(96)).pos, intact.pos)
    file.write_bytes(content)
    assert not verify(store).faults


def flip(file, content, place, rng):
    damaged = bytearray(content)
    damaged[place] ^= 1 << rng.randrange(8)
    file.write_bytes(damaged)


def test_the_rows_are_named(store):
    opened = Store(store)
    header = opened._shards.header(1)
    energy = next(extent for extent in header.extents if extent.path == "fields/energy/values")
    file = store / "shard-00001.h5"
    content = bytearray(file.read_bytes())
    content[energy.at + 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"shard-00001.h5: 'fields/energy/values' is damaged in rows 2, 5: "):
        Store(store).batch([0, 55, 52, 1])
    assert Store(store).batch([0, 1]).num_systems == 2  # what is not damaged can be read


def test_flipped_bytes_of_the_header(store):
    rng, file = random.Random(1), store / "store.json"
    content = file.read_bytes()
    for _ in range(60):
        flip(file, content, rng.randrange(len(content)), rng)
        if json_equal(file.read_bytes(), content):
            continue
        refused(store, str(file), read=False)
    file.write_bytes(content[:-20])
    refused(store, "the header is damaged", read=False)
    file.write_bytes(b"{}")
    refused(store, "not the header of a store", read=False)
    file.write_bytes(b"\xff\xfe")
    refused(store, "the header is damaged", read=False)


def json_equal(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_newer_version(store):
    edit(store, lambda content: content.update(schema_version=2))
    refused(store, "schema version 2, this matfound reads up to 1", "use a newer matfound", read=False)


def test_unfinished(store):
    (store / "store.json").rename(store / "conversion.json")
    for call in (Store, open_dataset, verify):
        with pytest.raises(InputError, match=r"the conversion was not finished \(run the same `matfound data convert` again"):
            call(store)


def test_no_store(tmp_path, text):
    with pytest.raises(InputError, match="it has no store.json"):
        Store(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        Store(tmp_path / "nothing")
    (tmp_path / "x.extxyz").write_text(text)
    with pytest.raises(InputError, match="a store is a folder"):
        Store(tmp_path / "x.extxyz")
    with pytest.raises(InputError, match="no stores were given"):
        Store([])


def test_the_header_may_be_named(store):
    assert len(Store(store / "store.json")) == 96


def tampered(store, path, change):
    """A shard that was rewritten on purpose: checksums fit, sense does not."""
    import hashlib
    import zlib

    from matfound.data.store_format import blocks_of, checksums, pack_header

    opened = Store(store)
    header, entry = opened._shards.header(0), opened.manifests[0].shards[0]
    file = store / "shard-00000.h5"
    content = bytearray(file.read_bytes())
    extent = next(extent for extent in header.extents if extent.path == path)
    dtype = TYPES[extent.type]
    values = np.frombuffer(bytes(content), dtype, extent.length, extent.at).copy()
    change(values)
    content[extent.at : extent.at + values.nbytes] = values.tobytes()
    at, length, _ = header.checksums
    sums = np.frombuffer(bytes(content[at : at + length]), np.uint32).copy()
    sums[extent.block : extent.block + blocks_of(extent)] = checksums(values)
    content[at : at + length] = sums.tobytes()
    text = pack_header(header._replace(checksums=(at, length, zlib.crc32(sums.tobytes()))))
    place = entry.header[0]
    content[place : place + entry.header[1]] = text[: entry.header[1]].ljust(entry.header[1])
    assert len(text) <= entry.header[1] or pytest.skip("a longer number")
    file.write_bytes(content)

    def adapt(found):
        shard = found["shards"][0]
        shard["sha256"] = hashlib.sha256(content).hexdigest()
        shard["header"][2] = zlib.crc32(bytes(content[place : place + entry.header[1]]))

    edit(store, adapt)
    return [fault.problem for fault in verify(store).faults]


def put(position, value):
    def change(values):
        values[position] = value

    return change


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        ("rows/offsets", put(3, 0), "numbers from 0 that never fall"),
        ("fields/numbers/values", put(5, 0), "atomic numbers outside 1 to 118"),
        ("fields/pos/values", put(7, np.nan), "numbers that are not finite"),
        ("fields/id/values", put(0, 0xFF), "'fields/id' of row 0 is no UTF-8 text"),
        ("fields/id/offsets", put(1, 200), "never fall"),
    ],
)
def test_verify_looks_for_sense(store, path, change, words):
    found = tampered(store, path, change)
    assert any(words in problem for problem in found), found
