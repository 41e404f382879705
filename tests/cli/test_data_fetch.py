import hashlib
import http.server
import threading

import pytest
import yaml

from matfound import catalog
from matfound.cli import data_fetch
from matfound.cli.main import main

CONTENT = b"x,y\n1,2\n"


@pytest.fixture
def address(tmp_path):
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.csv").write_bytes(CONTENT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "served"))

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def toy(address, tmp_path, monkeypatch):
    """A catalog of one dataset; its split `large` says that it has 2 GB."""
    monkeypatch.setenv("MATFOUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "root", lambda: tmp_path / "catalog")
    part = {"url": f"{address}/a.csv", "md5": hashlib.md5(CONTENT).hexdigest()}
    splits = {
        "small": {"parts": [{**part, "bytes": len(CONTENT)}], "reader": "table", "frames": 1234, "note": "for tests"},
        "large": {"parts": [{"url": f"{address}/a.csv"}], "bytes": 2_000_000_000, "reader": "table"},
        "unknown": {"parts": [{"url": f"{address}/a.csv"}], "reader": "table"},
    }

    def make(*names):
        card = {
            "name": "toy", "description": "x", "licence": "CC-BY-4.0", "origin": "x", "version": "1", "levels_of_theory": {"a": "PBE"},
            "leakage": "x", "known_weaknesses": ["x"], "downloads": {name: splits[name] for name in names},
        }  # fmt: skip
        (tmp_path / "catalog/datasets/toy").mkdir(parents=True, exist_ok=True)
        (tmp_path / "catalog/datasets/toy/manifest.yaml").write_text(yaml.safe_dump(card, sort_keys=False))

    make("small", "large", "unknown")
    return make


def fetch(*args):
    return main(["data", "fetch", *args])


def test_it_is_fetched(toy, tmp_path, capsys):
    assert fetch("toy", "--split", "small") == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "cache/datasets/toy/small"
    assert (folder / "a.csv").read_bytes() == CONTENT
    for words in ("toy/small: 8 B, 1 file", "licence: CC-BY-4.0", "frames: 1,234", "note: for tests", f"toy/small is in {folder}"):
        assert words in printed
    assert fetch("toy", "--split", "small") == 0
    assert "it is there already" in capsys.readouterr().out
    assert fetch("toy", "--split", "small", "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out/toy/small/a.csv").read_bytes() == CONTENT


def test_a_dry_run_fetches_nothing(toy, tmp_path, capsys, address):
    assert fetch("toy", "--split", "large", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert f"{address}/a.csv  (no checksum is published)" in printed
    assert "toy/large: 2 GB" in printed
    assert f"to: {tmp_path / 'cache/datasets/toy/large'}" in printed
    assert not (tmp_path / "cache").exists()


def test_what_was_begun_is_mentioned(toy, tmp_path, capsys):
    (tmp_path / "cache/datasets/toy/.large.partial").mkdir(parents=True)
    (tmp_path / "cache/datasets/toy/.large.partial/a.csv.partial").write_bytes(b"123")
    assert fetch("toy", "--split", "large", "--dry-run") == 0
    assert "3 B are there from an earlier attempt" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["large", "unknown"])
def test_gigabytes_are_asked_for(toy, tmp_path, capsys, monkeypatch, split):
    assert fetch("toy", "--split", split) == 1
    words = "2 GB" if split == "large" else "size unknown"
    assert f"matfound: error: {words} are to be fetched, and nobody can be asked (say --yes)" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, code in (("", 1), ("n", 1), ("y", 0)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10**12}))
        assert fetch("toy", "--split", split) == code
        assert ("nothing was fetched" in capsys.readouterr().out) == (code == 1)
    assert fetch("toy", "--split", split, "--yes", "--out", str(tmp_path / "b")) == 0


def test_the_list(toy, capsys):
    assert fetch() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["dataset/split", "size", "frames", "licence"]
    assert lines[1].split() == ["toy/small", "8", "B", "1,234", "CC-BY-4.0", "for", "tests"]
    assert "size unknown" in lines[3]
    assert fetch("toy") == 1
    printed = capsys.readouterr()
    assert "toy/large" in printed.out
    assert "matfound: error: dataset 'toy' has several splits (choose one with --split)" in printed.err
    assert fetch("--dry-run") == 1
    assert "no dataset was named" in capsys.readouterr().err


def test_one_split_needs_no_name(toy, tmp_path, capsys):
    toy("small")
    assert fetch("toy") == 0
    assert (tmp_path / "cache/datasets/toy/small/a.csv").is_file()


def test_mistakes(toy, capsys):
    assert fetch("tay", "--split", "small") == 1
    assert "no dataset is named 'tay' (did you mean 'toy'?)" in capsys.readouterr().err
    assert fetch("toy", "--split", "smal") == 1
    assert "did you mean 'small'?" in capsys.readouterr().err


def test_the_catalog_of_the_repository(capsys):
    assert fetch() == 0
    printed = capsys.readouterr().out
    for name in ("oc20/val-id", "oc20/is2re", "omat24/val", "salex/train", "mptrj/all"):
        assert name in printed
    assert fetch("minidft") == 1
    assert "comes with matfound: there is nothing to fetch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "words"), [(None, "size unknown"), (5, "5 B"), (344_000_000, "344 MB"), (1_521_713_089, "1.52 GB"), (1.1e15, "1.1e+03 TB")]
)
def test_sizes_in_words(count, words):
    assert data_fetch.size(None if count is None else int(count)) == words
