"""Configuration of the documentation: ``sphinx-build -W --keep-going -b html docs docs/_build/html``."""

from dataclasses import fields
from importlib import metadata

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

from l2g_meta.training.config import Config

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
smartquotes = False  # θ' keeps its prime
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shapes"]


def list_config_fields(app, what, name, obj, options, lines):
    """What the fields of ``Config`` are is in their metadata, which the command line prints: print it here too."""
    if obj is Config:
        lines += ["", "Args:"]
        for f in fields(Config):
            kind = str(f.type) if f.default is not None or "None" in str(f.type) else f"{f.type} | None"
            choices = f.metadata.get("choices")
            among = f" ({', '.join(f'``{c}``' for c in choices)})" if choices else ""
            default = "" if f.default is None else f" Default: ``{f.default!r}``."
            lines.append(f"    {f.name} ({kind}): {f.metadata['help']}{among}.{default}")


def name_the_fields_once(app, what, name, obj, options, signature, returns):
    """The signature of ``Config`` would repeat the list above."""
    return ("(**fields)", None) if obj is Config else None


def write_mathml(self, node):
    """Browsers draw MathML themselves: formulas need no network and no script."""
    block = isinstance(node, nodes.math_block)
    formula = tex2mathml(node.astext(), as_block=block)
    self.body.append(f'<div class="math" style="padding: 0.5em 0">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
    app.connect("autodoc-process-docstring", list_config_fields, priority=400)  # before napoleon, at 500
    app.connect("autodoc-process-signature", name_the_fields_once)
