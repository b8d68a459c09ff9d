"""Configuration of Sphinx."""

from __future__ import annotations

import importlib
import re
import sys
import tempfile
import typing
import zlib
from contextlib import AbstractAsyncContextManager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "asgi-uow"
author = "asgi-uow contributors"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx reads this name
release = installed_version("asgi-uow")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
]
exclude_patterns = ["_build", "examples", "truth.md"]  # that one is included
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/icon.svg"
pygments_dark_style = "github-dark"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3


def stand_for(name: str) -> type:
    """Make what a private name of a type is shown as; the inventory has its address."""
    return type(name, (), {"__module__": "asgi_uow._asgi"})


def import_with_types() -> None:
    """Import the package as a type checker does: annotations name what they import."""
    public = ("inspector", "observers", "otel", "sanic", "sentry", "testing")
    names = ["asgi_uow", *(f"asgi_uow.{name}" for name in public)]
    for name in names:  # what others ship is imported as usual
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "asgi_uow"]:
        del sys.modules[name]
    typing.TYPE_CHECKING = True
    package, *_ = [importlib.import_module(name) for name in names]
    typing.TYPE_CHECKING = False
    shown = {name: stand_for(name) for name in ("ASGIApp", "Receive", "Scope", "Send")}
    shown |= {
        "Block": AbstractAsyncContextManager[None],
        "Engines": package.Database,
        "Savepoint": AsyncSessionTransaction,
    }
    for module in [each for name, each in sys.modules.items() if "asgi_uow" in name]:
        vars(module).update({name: shown[name] for name in shown.keys() & vars(module)})


import_with_types()
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 70
python_use_unqualified_type_names = True


default_role = "py:obj"  # of docstrings


packed_inventories = tempfile.TemporaryDirectory()


def inventory(name: str) -> str:
    """Pack a list of names and addresses: building the pages needs no network."""
    names = Path(__file__).parent.joinpath("inventories", f"{name}.txt").read_bytes()
    head = f"# Sphinx inventory version 2\n# Project: {name}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    packed = Path(packed_inventories.name, f"{name}.inv")
    packed.write_bytes(head.encode() + zlib.compress(names))
    return str(packed)


intersphinx_mapping = {
    name: (address, inventory(name))
    for name, address in {
        "python": "https://docs.python.org/3/",
        "sqlalchemy": "https://docs.sqlalchemy.org/en/20/",
        "asgi": "https://asgi.readthedocs.io/en/latest/",
        "opentelemetry": "https://opentelemetry-python.readthedocs.io/en/latest/",
    }.items()
}
nitpicky = True
nitpick_ignore = [
    ("py:class", "P"),  # what the caller's function takes
    ("py:class", "P.args"),
    ("py:class", "P.kwargs"),
    ("py:class", "T"),  # what it returns
    ("py:class", "sanic.app.Sanic"),  # its site has no page with this address
]

SIGNATURES = {
    r"dataclasses\.InitVar\[(.*?)\], \*": r"\1, *",
    r"\*args: ~typing\.~P, ": "*args: P.args, ",
    r"\*\*kwargs: ~typing\.~P": "**kwargs: P.kwargs",
    r"\[~?P\]": "P",
    r"~asgi_uow\._entrypoints\.replay\.T": "T",
    r"~?asgi_uow\._testing\.watching\.Statements": "list[str]",
    r"<class '(\w+)'>": r"\1",
    r"<built-in function time>": "time.time",
    r"_decision\.commit_below_400": "commit_below_400",
    r"= logger\b": "= getLogger('asgi_uow')",
    r"\bTABLE\b": "'idempotency_keys'",
}
"""What Sphinx writes, and how it can be read."""


def write_signature(*arguments: object) -> list[str | None]:
    """Name types and defaults as one writes them in code."""
    written: list[str | None] = []
    for text in arguments[-2:]:
        shown = text if isinstance(text, str) else ""
        for pattern, better in SIGNATURES.items():
            shown = re.sub(pattern, better, shown)
        written.append(shown or None)
    return written


def name_base(*arguments: object) -> None:
    """Name SQLAlchemy's class in place of the private one between it and ours."""
    bases = arguments[-1]
    bases[:] = [AsyncSession if "._" in each.__module__ else each for each in bases]


def link_or_leave(
    app: Sphinx,
    env: BuildEnvironment,
    node: pending_xref,
    content: nodes.Element,
) -> nodes.Element | None:
    """Link `name` and `name(...)` of a docstring if it is ours; else it is code."""
    if node["reftype"] != "obj":
        return None
    name = node["reftarget"].partition("(")[0]
    for module in ("asgi_uow", "asgi_uow.errors", "asgi_uow.observers"):
        node["py:module"] = module
        arguments = env, node["refdoc"], app.builder, "obj", name, node, content
        found = env.domains.python_domain.resolve_xref(*arguments)
        if found is not None:
            return found
    return content


def setup(app: Sphinx) -> None:
    """Have Sphinx call the functions above."""
    app.connect("autodoc-process-signature", write_signature)
    app.connect("autodoc-process-bases", name_base)
    app.connect("missing-reference", link_or_leave, priority=600)
