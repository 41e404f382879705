"""The report: self-contained, escaped, whole or not there."""

import base64
import errno
import os
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from matfound.report.files import replacing, write_text
from matfound.report.html import Report


class Checker(HTMLParser):
    """Every tag is closed; collects what would need the network."""

    VOID = ("meta", "img", "br", "hr", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(report):
    checker = Checker()
    page = report.render()
    checker.feed(page)
    assert checker.open == []
    return page, checker


def figure():
    made = Figure(figsize=(2, 1))
    made.subplots().plot([0, 1])
    return made


def test_everything_in_one_file():
    report = Report("Title", "subtitle").heading("One").text("first\n\nsecond").heading("Two", 3).heading("Three").heading("One")
    report.table([{"a": 1, "b": "x"}], "Rows.").figure(figure(), "Lines.").code("x: 1", "Configuration").figure(figure())
    page, checker = parsed(report)
    assert all(link.startswith(("data:image/png;base64,", "#s")) for link in checker.links)
    assert "script" not in checker.tags
    assert "http" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert checker.tags.count("details") == 1
    assert checker.tags.count("p") == 3
    assert "Table 1." in checker.text
    assert "Figure 2." in checker.text
    anchors = [link for link in checker.links if link.startswith("#")]
    assert len(anchors) == 3, "links to the sections, not to the subsection"
    assert all(f'id="{anchor[1:]}"' in page for anchor in anchors)
    image = next(link for link in checker.links if link.startswith("data:"))
    assert base64.b64decode(image.partition(",")[2]).startswith(b"\x89PNG")


def test_everything_is_escaped():
    nasty = "<script>alert(\"1\") & '2'</script>"
    report = Report(nasty, nasty).heading(nasty).heading(nasty, 3).heading(nasty).text(nasty).code(nasty, nasty)
    report.table([{nasty: nasty}], nasty).figure(figure(), nasty, nasty)
    page, checker = parsed(report)
    assert "script" not in checker.tags
    assert checker.text.count(nasty) > 8
    assert "<script" not in page


def test_odd_characters():
    page, _ = parsed(Report("Å³ \x00 \udc80 日本").text("a\tb\nc"))
    page.encode("utf-8")
    assert "Å³" in page
    assert "\x00" not in page


def test_numbers_align():
    rows = [{"name": "a", "value": 0.0123456, "n": 12345}, {"name": "b", "value": -123.456, "n": 2}, {"name": "c", "value": None, "n": 3}]
    page, _ = parsed(Report("t").table(rows))
    cells = re.findall(r'<td class="n">([^<]*)</td>', page)
    assert cells == ["0.0123", "12,345", "−123" + "\u2008" + "\u2007" * 4, "2", "–", "3"]
    assert '<th class="n">value</th>' in page
    assert "<th>name</th>" in page
    assert "tabular-nums" in page


def test_no_rows():
    page, _ = parsed(Report("t").table([], "Nothing here."))
    assert "No rows." in page
    assert "<table" not in page


def test_levels():
    with pytest.raises(ValueError, match="level must be 2 or 3"):
        Report("t").heading("x", 1)


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    Report("first").write(path)
    assert "first" in path.read_text(encoding="utf-8")
    Report("second").write(path)
    old = path.read_bytes()

    def full(self, text, **options):
        self.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left") as info:
        Report("third").write(path)
    assert info.value.filename == str(path)
    assert info.value.errno == errno.ENOSPC
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_replacing_tells_whose_error_it_is(tmp_path):
    target = tmp_path / "a.txt"

    def spoil(action):
        with replacing(target) as temporary:
            temporary.write_text("x")
            action(temporary)

    def refuse(temporary):
        raise PermissionError(errno.EACCES, "Permission denied", str(temporary))

    with pytest.raises(FileNotFoundError) as info:
        spoil(lambda _: (tmp_path / "input.txt").read_text())
    assert info.value.filename == str(tmp_path / "input.txt")
    with pytest.raises(PermissionError) as info:
        spoil(refuse)
    assert info.value.filename == str(target)
    with pytest.raises(ZeroDivisionError):
        spoil(lambda _: 1 / 0)
    assert list(tmp_path.iterdir()) == []
    write_text(target, "fine")
    assert target.read_text() == "fine"
    folder = tmp_path / "folder"
    (folder / "in").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        write_text(folder, "x")
    assert (folder / "in").is_dir()
