"""Configuration of Sphinx."""

from __future__ import annotations

from importlib.metadata import version as installed_version

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
exclude_patterns = ["_build", "examples"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# Many types are imported for type checkers only; names and defaults say enough.
autodoc_typehints = "none"

nitpicky = True
# Inventories of other projects are not fetched: building needs no network.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|contextlib|sqlalchemy|starlette|anyio|typing)\b.*"),
    ("py:.*", r"Exception|BaseException|bool|dict|float|int|list|str|tuple"),
    ("py:.*", r"(asgi_uow\._decision\.)?(Cause|State)"),  # described, not importable
    ("py:class", r"asgi_uow\._sessions\.statements\.StatementSession"),
]
