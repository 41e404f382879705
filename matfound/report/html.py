"""A report as one HTML file: no network, no scripts, light and dark, and it prints."""

import base64
import datetime as dt
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matfound import __version__
from matfound.report.files import write_text
from matfound.report.tables import NOTHING, columns, pad_decimals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_SPACE, PUNCTUATION_SPACE, MINUS = "\u2007", "\u2008", "\u2212"


class Report:
    """Headings, text, tables, figures and code, in the order in which they are added.

    Tables and figures are numbered; from three headings on, links to the sections come first. What is given is text and is
    escaped.

    Args:
        title: of the document.
        subtitle: one line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._parts: list[str] = []
        self._headings: list[tuple[int, str, str]] = []
        self._tables = self._figures = 0

    def heading(self, text: str, level: int = 2) -> "Report":
        """Start a section (level 2) or a subsection (3)."""
        if level not in (2, 3):
            raise ValueError(f"level must be 2 or 3, received {level}")
        anchor = f"s{len(self._headings) + 1}-" + (re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section")
        self._headings.append((level, text, anchor))
        self._parts.append(f'<h{level} id="{anchor}">{_text(text)}</h{level}>')
        return self

    def text(self, text: str) -> "Report":
        """Plain paragraphs, separated by blank lines."""
        paragraphs = [p for p in re.split(r"\n\s*\n", text.strip()) if p]
        self._parts.extend(f"<p>{_text(p)}</p>" for p in paragraphs)
        return self

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str = "", digits: int = 3) -> "Report":
        """A table; keys are the column names. Numbers get `digits` significant digits and align on the decimal point."""
        self._tables += 1
        label = _caption("Table", self._tables, caption)
        if not rows:
            self._parts.append(f'<figure class="table"><figcaption>{label}</figcaption><p class="none">No rows.</p></figure>')
            return self
        shown = columns(rows, digits)
        head = "".join(f"<th{_numeric(c.numeric)}>{_text(c.name)}</th>" for c in shown)
        cells = [_numbers(c.cells) if c.numeric else [_text(cell) for cell in c.cells] for c in shown]
        body = "".join(
            "<tr>" + "".join(f"<td{_numeric(c.numeric)}>{cells[j][i]}</td>" for j, c in enumerate(shown)) + "</tr>\n"
            for i in range(len(rows))
        )
        self._parts.append(
            f'<figure class="table"><figcaption>{label}</figcaption><div class="scroll"><table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div></figure>"
        )
        return self

    def figure(self, figure: "Figure", caption: str = "", alt: str = "") -> "Report":
        """A matplotlib figure, embedded as PNG at twice its size in points."""
        self._figures += 1
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=192, facecolor="white", metadata={"Software": None})
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        width = round(figure.get_size_inches()[0] * 96)
        self._parts.append(
            f'<figure class="picture"><img src="data:image/png;base64,{data}" width="{width}" alt="{_text(alt or caption)}">'
            f"<figcaption>{_caption('Figure', self._figures, caption)}</figcaption></figure>"
        )
        return self

    def code(self, text: str, caption: str = "", unfolded: bool = False) -> "Report":
        """Verbatim text that unfolds on a click (and is unfolded in print)."""
        state = " open" if unfolded else ""
        self._parts.append(f"<details{state}><summary>{_text(caption or 'Code')}</summary><pre>{_text(text)}</pre></details>")
        return self

    def render(self) -> str:
        """The document as text."""
        subtitle = f'<p class="subtitle">{_text(self.subtitle)}</p>' if self.subtitle else ""
        contents = ""
        if len(self._headings) >= 3:
            links = "".join(f'<a href="#{anchor}">{_text(text)}</a>' for level, text, anchor in self._headings if level == 2)
            contents = f"<nav>{links}</nav>"
        today = dt.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{_text(self.title)}</title>\n<style>\n{_CSS}</style>\n</head>\n<body>\n<main>\n"
            f"<header><h1>{_text(self.title)}</h1>{subtitle}</header>\n{contents}\n"
            + "\n".join(self._parts)
            + f"\n<footer>Written by matfound {_text(__version__)} on {_text(today)}.</footer>\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file. Until it is complete, an older one at `path` stays as it is, also when the disk is full.

        Raises:
            OSError: names `path`.
        """
        write_text(path, self.render())


def _text(text: object) -> str:
    # Surrogates (undecodable file names) and control characters cannot be written as UTF-8 HTML.
    clean = "".join(c if c in "\n\t" or (ord(c) >= 32 and not 0xD800 <= ord(c) < 0xE000) else "\ufffd" for c in str(text))
    return html.escape(clean, quote=True)


def _caption(kind: str, number: int, caption: str) -> str:
    return f"<b>{kind} {number}.</b> {_text(caption)}".rstrip()


def _numeric(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _numbers(cells: Sequence[str]) -> list[str]:
    out = pad_decimals([cell if cell != NOTHING else "" for cell in cells], FIGURE_SPACE, PUNCTUATION_SPACE)
    return [NOTHING if cell == NOTHING else _text(text).replace("-", MINUS) for cell, text in zip(cells, out, strict=True)]


_CSS = """\
:root { --ink: #1d2126; --soft: #5c6570; --line: #d9dde2; --rule: #1d2126; --page: #ffffff; --panel: #f6f7f8; --link: #0b5a8f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe3e8; --soft: #9aa4af; --line: #343b43; --rule: #aeb6bf; --page: #15181b; --panel: #1e2226; --link: #7cbcec; }
  .picture img { filter: brightness(.93); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 17px/1.55 Charter, "Bitstream Charter", "Sitka Text", Cambria, "Noto Serif", "DejaVu Serif", serif; }
main { max-width: 66rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1, h2, h3, nav, table, figcaption, summary, footer, .subtitle
  { font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; margin: 3rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.subtitle { margin: .4rem 0 0; color: var(--soft); font-size: 1rem; }
p { margin: .8rem 0; max-width: 44rem; white-space: pre-line; overflow-wrap: anywhere; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
nav { margin: 1.6rem 0 0; display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; font-size: .9rem; }
figure { margin: 1.6rem 0; }
figcaption { font-size: .86rem; line-height: 1.45; color: var(--soft); max-width: 50rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.table figcaption { margin-bottom: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; border-top: 2px solid var(--rule); border-bottom: 2px solid var(--rule); font-size: .82rem;
  line-height: 1.35; font-variant-numeric: tabular-nums lining-nums; }
th { text-align: left; font-weight: 600; border-bottom: 1px solid var(--rule); vertical-align: bottom; }
th, td { padding: .3rem .5rem .3rem 0; }
td { white-space: nowrap; }
th + th, td + td { padding-left: .5rem; }
th:last-child, td:last-child { padding-right: .2rem; }
.n { text-align: right; }
tbody tr + tr td { border-top: 1px solid var(--line); }
.none { color: var(--soft); font-style: italic; }
.picture img { max-width: 100%; height: auto; padding: .5rem;
  background: #fff; border: 1px solid var(--line); border-radius: 6px; }
.picture figcaption { margin-top: .4rem; }
details { margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; background: var(--panel); }
summary { cursor: pointer; padding: .55rem .9rem; font-size: .9rem; font-weight: 600; }
pre { margin: 0; padding: .8rem .9rem; border-top: 1px solid var(--line); overflow-x: auto; white-space: pre; tab-size: 4;
  font: .78rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { margin-top: 3.5rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .8rem; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem; } body { font-size: 16px; } h1 { font-size: 1.6rem; } }
@media print {
  :root { --ink: #000; --soft: #444; --line: #ccc; --rule: #000; --page: #fff; --panel: #fff; --link: #000; }
  @page { margin: 18mm 16mm; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2, h3, .table figcaption { break-after: avoid; }
  .picture, tr, nav { break-inside: avoid; }
  .picture img { border: 0; padding: 0; filter: none; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  details::details-content { content-visibility: visible; block-size: auto; }
  pre { white-space: pre-wrap; }
}
"""
