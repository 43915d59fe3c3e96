"""Configuration of the documentation: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

from dataclasses import fields
from importlib import metadata

from l2g_meta.config import Config

project = "l2g-meta"
author = "The l2g-meta developers"
copyright = author
release = version = metadata.version("l2g-meta")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"l2g-meta {release}"
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes"]


def list_config_fields(app, what, name, obj, options, lines):
    """The fields of ``Config`` say what they are in their metadata, which the command line prints: print it here too."""
    if obj is Config:
        defaults = {f.name: "" if f.default is None else f" Default: ``{f.default!r}``." for f in fields(Config)}
        lines += ["", "Args:"]
        for f in fields(Config):
            choices = f.metadata.get("choices")
            among = f" ({', '.join(f'``{c}``' for c in choices)})" if choices else ""
            lines.append(f"    {f.name} ({f.type}): {f.metadata['help']}{among}.{defaults[f.name]}")


def setup(app):
    app.connect("autodoc-process-docstring", list_config_fields, priority=400)  # before napoleon, at 500
