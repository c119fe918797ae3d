"""Configuration of the Sphinx site: `make docs` builds it from these pages and the docstrings into build/docs."""

from __future__ import annotations

import os
import re
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# Reads models' code only to describe it: no request to the hub, no usage report.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

project = "logitstore"
author = "the logitstore authors"
copyright = author
release = metadata.version("logitstore")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]

# Markdown. Anchors for headings down to the third level make the links work that a repository's website follows too.
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
myst_links_external_new_tab = True

# Docstrings are in Google style, and write code in single backticks.
default_role = "code"
highlight_language = "text"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autosummary_generate = False
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_title = f"logitstore {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_sidebars = {"format": []}
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "logitstore"},
    "show_prev_next": True,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "secondary_sidebar_items": ["page-toc"],
}


def offer_records(app: Sphinx, page: str, source: list[str]) -> None:
    """Turns links to benchmark records, which are not pages of the site, into downloads."""
    source[0] = re.sub(r"\[([^\]]*)\]\((\.\./benchmarks/[^)]*)\)", r"{download}`\1 <\2>`", source[0])


def keep_colons(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Stops napoleon from taking the words before a colon for a type, and lists what a function returns by name.

    Types are in signatures alone. A line of "Returns:" that begins with a name and a colon is an item of a list; its
    further lines are indented.
    """
    if what in ("attribute", "data", "property") and lines:
        lines[0] = f": {lines[0]}"
    for header in [number for number, line in enumerate(lines) if line.strip() in ("Returns:", "Yields:")]:
        first = header + 1
        end = next((i for i in range(first, len(lines)) if not lines[i].strip()), len(lines))
        indent = len(lines[first]) - len(lines[first].lstrip())
        items = [i for i in range(first, end) if lines[i][indent : indent + 1].strip()]
        if sum(bool(re.match(r"\s*\w+(, \w+)*: ", lines[i])) for i in items) > 1:
            for i in range(first, end):
                lines[i] = f"{lines[i][:indent]}{'- ' if i in items else '  '}{lines[i].lstrip()}"
        lines[first] = f"{lines[first][:indent]}: {lines[first][indent:]}"


def setup(app: Sphinx) -> None:
    """Registers what this file defines."""
    app.connect("source-read", offer_records)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before napoleon
