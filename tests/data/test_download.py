import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import yaml

from matfound import catalog
from matfound.data import download, unpack
from matfound.data.open import fetched, open_dataset
from matfound.errors import InputError

CONTENT = bytes(range(256)) * 4096  # 1 MB


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files`; `server.ranges`: whether it can go on in the middle; `server.cuts`: bytes after which it hangs up, in turn."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        content = server.files.get(self.path)
        if server.status:
            self.send_response(server.status.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if content is None:
            self.send_error(404)
            return
        start, wanted = 0, self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, server.etag)
        if wanted and server.ranges and same:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None
        self.wfile.write(content[start : None if cut is None else start + cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.files, found.ranges, found.cuts, found.asked, found.etag, found.status = {}, True, [], [], '"one"', []
    threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
    found.url = f"http://127.0.0.1:{found.server_address[1]}"
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.01)


@pytest.fixture
def toy(server, tmp_path, monkeypatch):
    """A catalog with one dataset, `toy`, whose downloads are what the test says; files are fetched to tmp_path/cache."""
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "root", lambda: tmp_path / "catalog")
    (tmp_path / "catalog/datasets/toy").mkdir(parents=True)

    def make(**downloads):
        card = {
            "name": "toy", "description": "x", "licence": "CC0", "origin": "x", "version": "1", "levels_of_theory": {"a": "PBE"},
            "leakage": "x", "known_weaknesses": ["x"], "downloads": downloads,
        }  # fmt: skip
        (tmp_path / "catalog/datasets/toy/manifest.yaml").write_text(yaml.safe_dump(card))

    return make


def part(server, name, content=None, **changes):
    if content is not None:
        server.files[f"/{name}"] = content
    return {"url": f"{server.url}/{name}", **changes}


def get(split="all", **options):
    return download.fetch(download.plan("toy", split, **options))


def tarred(members, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def left(folder):
    """Names of everything below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_file_is_fetched_checked_and_found_again(server, toy, tmp_path):
    md5 = hashlib.md5(CONTENT).hexdigest()
    toy(all={"parts": [part(server, "a.csv", CONTENT, md5=md5, bytes=len(CONTENT))], "reader": "table"})
    assert download.local("toy", "all") is None
    seen = []
    folder = download.fetch(download.plan("toy", "all"), lambda name, done, total: seen.append((name, done, total)))
    assert folder == tmp_path / "cache/datasets/toy/all" == download.local("toy", "all")
    assert (folder / "a.csv").read_bytes() == CONTENT
    assert seen[-1] == ("a.csv", len(CONTENT), len(CONTENT))
    receipt = json.loads((folder / "fetched.json").read_text())
    assert receipt["parts"] == [{"url": f"{server.url}/a.csv", "bytes": len(CONTENT), "md5": md5}]
    assert left(tmp_path / "cache") == ["datasets/toy/all/a.csv", "datasets/toy/all/fetched.json"]
    assert download.plan("toy", "all").done
    asked = len(server.asked)
    assert get() == folder
    assert len(server.asked) == asked, "nothing is fetched twice"


def test_without_a_checksum_its_own_is_noted(server, toy):
    toy(all={"parts": [part(server, "a.csv", CONTENT)], "reader": "table"})
    receipt = json.loads((get() / "fetched.json").read_text())
    assert receipt["parts"][0]["sha256"] == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_is_cut_goes_on(server, toy, ranges):
    toy(all={"parts": [part(server, "a.csv", CONTENT, sha256=hashlib.sha256(CONTENT).hexdigest())], "reader": "table"})
    server.ranges, server.cuts = ranges, [300_000, 200_000]
    assert (get() / "a.csv").read_bytes() == CONTENT
    wanted = [entry[1] for entry in server.asked]
    assert wanted[0] is None and len(wanted) == 3
    kept = [300_000 // 65536 * 65536]
    kept.append(kept[0] * ranges + 200_000 // 65536 * 65536)
    assert wanted[1:] == [f"bytes={count}-" for count in kept]


def test_a_later_attempt_goes_on_from_what_is_there(server, toy, tmp_path):
    toy(all={"parts": [part(server, "a.csv", CONTENT, sha256=hashlib.sha256(CONTENT).hexdigest())], "reader": "table"})
    server.cuts = [400_000] + [0] * download.ATTEMPTS
    with pytest.raises(InputError, match=r"a\.csv: the connection fails: .*try again: the 393216 bytes that came are kept"):
        get()
    assert download.plan("toy", "all").have >= 393_216
    assert download.local("toy", "all") is None
    server.cuts, server.asked = [], []
    assert (get() / "a.csv").read_bytes() == CONTENT
    assert server.asked == [("/a.csv", "bytes=393216-", '"one"')]


def test_two_versions_are_never_joined(server, toy):
    toy(all={"parts": [part(server, "a.csv", CONTENT)], "reader": "table"})
    server.cuts = [400_000] + [0] * download.ATTEMPTS
    with pytest.raises(InputError):
        get()
    server.cuts, server.etag = [], '"two"'
    server.files["/a.csv"] = CONTENT[::-1]
    assert (get() / "a.csv").read_bytes() == CONTENT[::-1]


def test_a_partial_file_that_is_complete_or_too_long(server, toy, tmp_path):
    toy(all={"parts": [part(server, "a.csv", CONTENT)], "reader": "table"})
    work = tmp_path / "cache/datasets/toy/.all.partial"
    for found in (CONTENT, CONTENT + b"more"):
        work.mkdir(parents=True)
        (work / "a.csv.partial").write_bytes(found)
        assert (get() / "a.csv").read_bytes() == CONTENT
        shutil.rmtree(tmp_path / "cache")


def test_a_wrong_checksum(server, toy, tmp_path):
    toy(all={"parts": [part(server, "a.csv", CONTENT, md5="0" * 32)], "reader": "table"})
    with pytest.raises(InputError, match=r"md5 is [0-9a-f]{32}, expected 0{32}: kept as .*a\.csv\.wrong .*upstream has changed the file"):
        get()
    assert download.local("toy", "all") is None
    assert left(tmp_path / "cache") == ["datasets/toy/.all.partial/a.csv.wrong"]
    toy(all={"parts": [part(server, "a.csv", md5=hashlib.md5(CONTENT).hexdigest())], "reader": "table"})
    assert (get() / "a.csv").read_bytes() == CONTENT


def test_the_server_has_something_else(server, toy):
    toy(all={"parts": [part(server, "a.csv", CONTENT, bytes=5)], "reader": "table"})
    with pytest.raises(InputError, match=r"the server has a file of 1048576 bytes, the card says 5 .*see the dataset's page"):
        get()
    toy(all={"parts": [part(server, "b.csv")], "reader": "table"})
    with pytest.raises(InputError, match=r"b\.csv: the server answers 404 Not Found .*the address may have changed"):
        get()
    server.status = [503, 429]
    toy(all={"parts": [part(server, "a.csv")], "reader": "table"})
    assert (get() / "a.csv").read_bytes() == CONTENT, "busy servers are asked again"
    server.files["/c.csv"] = CONTENT
    server.status = [503] * 9
    toy(c={"parts": [part(server, "c.csv")], "reader": "table"})
    with pytest.raises(InputError, match="the connection fails: the server answers 503"):
        get("c")


def test_nobody_answers(toy):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    toy(all={"parts": [{"url": f"http://127.0.0.1:{port}/a.csv"}], "reader": "table"})
    with pytest.raises(InputError, match="the connection fails: .*check the network"):
        get()


def test_no_room(server, toy, monkeypatch, tmp_path):
    toy(all={"parts": [part(server, "a.csv", CONTENT, bytes=len(CONTENT))], "reader": "table"})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(InputError, match=r"0\.0 GB are to come, but the disk has room for 0\.0 GB .*--out"):
        get()
    monkeypatch.undo()


def test_the_disk_fills_up(server, toy, monkeypatch, tmp_path):
    toy(all={"parts": [part(server, "a.tar", tarred({"x.aselmdb": CONTENT}))], "reader": "aselmdb", "unpack": "tar"})
    write = unpack._write

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unpack, "_write", full)
    with pytest.raises(InputError, match=r"the disk is full .*what is there is kept"):
        get()
    assert download.local("toy", "all") is None
    assert left(tmp_path / "cache") == ["datasets/toy/.all.partial/a.tar", "datasets/toy/.all.partial/a.tar.json"]
    monkeypatch.setattr(unpack, "_write", write)
    server.asked = []
    assert (get() / "a/x.aselmdb").read_bytes() == CONTENT
    assert server.asked == []


def test_several_parts_one_of_which_fails(server, toy, tmp_path):
    first, second = tarred({"one/x.aselmdb": b"1"}), tarred({"two/x.aselmdb": b"2"}, "w:gz")
    parts = [part(server, "one.tar", first), part(server, "two.tar.gz")]
    toy(all={"parts": parts, "reader": "aselmdb", "unpack": "tar"})
    with pytest.raises(InputError, match="404"):
        get()
    assert download.local("toy", "all") is None
    server.files["/two.tar.gz"] = second
    server.asked = []
    folder = get()
    assert [path for path, _, _ in server.asked] == ["/two.tar.gz"], "the first is not fetched again"
    assert left(folder) == ["fetched.json", "one/one/x.aselmdb", "two/two/x.aselmdb"]
    assert download.find("toy", "all") == ("aselmdb", [folder / "one/one", folder / "two/two"])
    assert download.find("toy", "all", "two") == ("aselmdb", [folder / "two/two"])
    with pytest.raises(InputError, match=r"nothing in 'toy/all' is called 'three'"):
        download.find("toy", "all", "three")


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("tar", "a.tar", tarred({"d/x.csv": b"1,2"})),
        ("tar", "a.tar.gz", tarred({"d/x.csv": b"1,2"}, "w:gz")),
        ("tar", "a.tar.xz", tarred({"d/x.csv": b"1,2"}, "w:xz")),
        ("gz", "a.csv.gz", gzip.compress(b"1,2")),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,  # the bytes hold the time they were packed: no name for two workers
)
def test_what_is_packed_is_unpacked(server, toy, kind, name, content):
    toy(all={"parts": [part(server, name, content)], "reader": "table", "unpack": kind})
    folder = get()
    assert left(folder) == (["a.csv", "fetched.json"] if kind == "gz" else ["a/d/x.csv", "fetched.json"])
    assert (folder / left(folder)[0]).read_bytes() == b"1,2"


def test_a_zip_file(server, toy):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("d")
        archive.writestr("d/x.csv", "1,2")
    toy(all={"parts": [part(server, "a.zip", buffer.getvalue())], "reader": "table", "unpack": "zip"})
    assert left(get()) == ["a/d/x.csv", "fetched.json"]


def link(name, target, kind=tarfile.SYMTYPE):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def zipped_link():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    return buffer.getvalue()


def zipped(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        ("tar", tarred({"ok": b"x", "../../evil": b"x"}), r"'\.\./\.\./evil' would be written outside"),
        ("tar", tarred({"ok": b"x", "/tmp/evil": b"x"}), "'/tmp/evil' would be written outside"),
        ("tar", tarred({"a/../../evil": b"x"}), "would be written outside"),
        ("tar", tarred({"link": link("link", "/etc")}), "'link' is a link or a device"),
        ("tar", tarred({"link": link("link", "ok", tarfile.LNKTYPE)}), "is a link or a device"),
        ("tar", tarred({"pipe": link("pipe", "", tarfile.FIFOTYPE)}), "is a link or a device"),
        ("tar", tarred({"ok": CONTENT})[:200_000], "the archive is damaged"),
        ("tar", tarred({"ok": CONTENT}, "w:gz")[:900], "the archive is damaged"),
        ("tar", b"no archive at all", "the archive is damaged"),
        ("zip", zipped("../evil"), "would be written outside"),
        ("zip", zipped("C:\\evil"), "would be written outside"),
        ("zip", zipped_link(), "'link' is a link"),
        ("zip", zipped("ok")[:30], "the archive is damaged"),
        ("gz", gzip.compress(CONTENT)[:500], "the archive is damaged"),
        ("gz", b"text", "the archive is damaged"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_bad_archives(server, toy, tmp_path, kind, content, words):
    toy(all={"parts": [part(server, "a.bin", content)], "reader": "table", "unpack": kind})
    with pytest.raises(InputError, match=rf"a\.bin: .*{words}"):
        get()
    assert download.local("toy", "all") is None
    assert left(tmp_path / "cache") == ["datasets/toy/.all.partial/a.bin", "datasets/toy/.all.partial/a.bin.json"]
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/evil").exists()


def test_another_place(server, toy, tmp_path):
    toy(all={"parts": [part(server, "a.csv", CONTENT)], "reader": "table"})
    folder = get(out=tmp_path / "elsewhere")
    assert folder == tmp_path / "elsewhere/toy/all" == download.local("toy", "all")
    shutil.rmtree(tmp_path / "elsewhere")
    assert download.local("toy", "all") is None
    (tmp_path / "full/toy/all").mkdir(parents=True)
    assert get(out=tmp_path / "full")
    (tmp_path / "mine/toy/all").mkdir(parents=True)
    (tmp_path / "mine/toy/all/notes").write_text("x")
    with pytest.raises(InputError, match="the folder has files, but not those that are to be fetched"):
        get(out=tmp_path / "mine")


def test_a_receipt_of_another_card_does_not_count(server, toy):
    toy(all={"parts": [part(server, "a.csv", CONTENT)], "reader": "table"})
    folder = get()
    toy(all={"parts": [part(server, "b.csv", CONTENT)], "reader": "table"})
    assert download.local("toy", "all") is None
    (folder / "fetched.json").write_text("{")
    assert download.local("toy", "all") is None


def test_unknown_names(server, toy):
    toy(one={"parts": [part(server, "a.csv")], "reader": "table"}, two={"parts": [part(server, "a.csv")], "reader": "table"})
    with pytest.raises(InputError, match="no dataset is named 'tay'"):
        download.plan("tay", "one")
    with pytest.raises(InputError, match=r"no split 'on' to fetch \(did you mean 'one'\?\)"):
        download.plan("toy", "on")
    with pytest.raises(InputError, match="give one with --split: one, two"):
        download.plan("toy", "")
    with pytest.raises(InputError, match=r"'toy/one' has not been fetched \(matfound data fetch toy --split one\)"):
        download.find("toy", "one")
    assert download.local("toy", "three") is None
    assert download.file_name("https://x.org/files/a.zip?download=1") == "a.zip"


def test_a_dataset_that_comes_with_matfound():
    with pytest.raises(InputError, match="there is nothing to fetch"):
        download.plan("minidft", "all")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(server, toy, tmp_path):
    toy(all={"parts": [part(server, "a.csv", CONTENT)], "reader": "table"})
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(PermissionError):
        get(out=tmp_path / "out")


# What was fetched opens by its name.


def test_real_archives_open_by_name(server, toy, shared_data):
    source = shared_data / "data/oc20"
    archive = tarred(
        {f"s2ef/s2ef/{name}": (source / name).read_bytes() for name in ("0.extxyz", "0.txt")} | {"s2ef/README.txt": b"read me"}
    )
    toy(val={"parts": [part(server, "s2ef.tar", archive)], "reader": "oc20", "unpack": "tar"})
    with pytest.raises(InputError, match=r"'toy/val' has not been fetched"):
        open_dataset("toy/val")
    get("val")
    dataset = open_dataset("toy/val")
    assert (dataset.name, len(dataset), dataset.get(1).id) == ("toy/val", 4, "1000100_60")
    assert open_dataset("toy/val", "mine", total_energy=True).name == "mine"
    with pytest.raises(InputError, match=r"dataset 'toy' is not part of matfound \(fetch a split and name it: toy/val\)"):
        open_dataset("toy")
    assert fetched("nothing/here") is None and fetched("toy") is None


def test_sets_in_one_archive_are_opened_one_by_one(server, toy, shared_data):
    raw = (shared_data / "data/oc20/is2re_ref.lmdb").read_bytes()
    archive = tarred({f"data/is2re/{name}/data.lmdb": raw for name in ("10k/train", "all/train", "all/val_id")}, "w:gz")
    toy(is2re={"parts": [part(server, "is2res.tar.gz", archive)], "reader": "lmdb", "unpack": "tar"})
    get("is2re")
    with pytest.raises(InputError, match=r"'toy/is2re' has 3 sets \(name one: toy/is2re/10k/train, "):
        open_dataset("toy/is2re")
    with pytest.raises(InputError, match="has 2 sets"):
        open_dataset("toy/is2re/all")
    dataset = open_dataset("toy/is2re/all/val_id")
    assert len(dataset) == 2
    assert dataset.place(0)[0].endswith("data/is2re/all/val_id/data.lmdb")


def test_aselmdb_parts_open_as_one(server, toy, shared_data):
    raw = (shared_data / "data/oc20/omat_like_ref.aselmdb").read_bytes()
    parts = [part(server, f"{name}.tar.gz", tarred({f"{name}/data.0000.aselmdb": raw}, "w:gz")) for name in ("rattled", "aimd")]
    toy(val={"parts": parts, "reader": "aselmdb", "unpack": "tar"})
    get("val")
    assert len(open_dataset("toy/val")) == 8
    assert open_dataset("toy/val/aimd").get(0).id == "aimd/data.0000.aselmdb:0"


def test_files_open_as_one(server, toy, text):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("mp-1.extxyz", text)
        archive.writestr("mp-2.extxyz", text)
    toy(all={"parts": [part(server, "mp.zip", buffer.getvalue())], "reader": "files", "unpack": "zip"})
    get()
    assert len(open_dataset("toy/all")) == 24
