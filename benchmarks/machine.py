"""Where the numbers come from: the machine, and the versions of what was measured."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.servers.process import find_binary

PACKAGES = (
    "asgi-uow",
    "SQLAlchemy",
    "aiosqlite",
    "asyncmy",
    "asyncpg",
    "psycopg",
    "advanced-alchemy",
    "context-async-sqlalchemy",
    "fastapi-async-sqlalchemy",
    "fastapi-sqla",
    "svcs",
    "fastapi",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
)
PROGRAMS = {
    "MariaDB": "mariadbd",
    "PostgreSQL": "postgres",
    "wrk": "wrk",
    "valgrind": "valgrind",
}


def facts() -> dict[str, str]:
    """Name the processor, the system, and the versions of what is installed."""
    found = {
        "Processor": f"{_processor()}, {os.cpu_count()} cores",
        "System": f"{_system()}, Linux {platform.release().partition('-')[0]}",
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
    }
    found |= {name: _program_version(file) for name, file in PROGRAMS.items()}
    found |= {name: _package_version(name) for name in PACKAGES}
    return {name: text for name, text in found.items() if text}


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text("utf-8")
    names = re.findall(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return names[0] if names else platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _program_version(name: str) -> str:
    """Return the first number with a dot that the program says of itself."""
    path = find_binary(name)
    if path is None:
        return ""
    said = subprocess.run(
        [path, "--version"], check=False, capture_output=True, text=True
    )
    numbers = re.findall(r"\d+\.\d+[\w.]*", said.stdout + said.stderr)
    return numbers[0] if numbers else ""


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
