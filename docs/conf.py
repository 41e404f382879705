"""Sphinx configuration: `make docs`."""

import re

import matfound

project = "matfound"
author = "matfound developers"
copyright = "2026, matfound developers"
release = version = matfound.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]
html_theme = "furo"
html_title = "matfound"

# fields.md is a notebook: its table is made from the code when the pages are built.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_render_markdown_format = "myst"  # with tables
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

# `name` in a docstring is code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


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
