"""Sphinx configuration: `make docs`."""

import os
import re
import sys
from pathlib import Path

import matfound

project = "matfound"
author = "matfound developers"
copyright = "2026, matfound developers"
release = version = matfound.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = "matfound"

# fields.md and the tutorials are notebooks: what they show is made when the pages are built, each in a folder of its own.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300  # seconds for one cell
nb_merge_streams = True
nb_render_markdown_format = "myst"  # with tables
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# `name` in a docstring is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
# A type in a signature, such as bytes, may be the name of several classes' attributes: it is not linked.
suppress_warnings = ["ref.python"]
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


# The notebooks' shells find `matfound`, and know how wide a page is.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ["COLUMNS"] = "88"
os.environ["PYTHONSTARTUP"] = str(Path(__file__).with_name("notebook_startup.py"))


def plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text with `code` and **bold**: |r| is a norm and x* a conjugate, not reStructuredText."""
    for number, line in enumerate(lines):
        pieces = line.split("`")
        for i in range(0, len(pieces), 2):
            pieces[i] = re.sub(r"(\*\*\w[^*]*\*\*)|([|*\\]|(?<=\w)_(?!\w))", lambda m: m[1] or "\\" + m[2], pieces[i])
        lines[number] = "`".join(pieces)


def setup(app):
    """Before napoleon, whose listeners have priority 500."""
    app.connect("autodoc-process-docstring", plain_text, priority=400)
