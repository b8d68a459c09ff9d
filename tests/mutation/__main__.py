"""Make the mutants, run the tests on each, print who survived; fail below a score."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from mutmut.__main__ import create_mutants
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code
from mutmut.utils import file_utils

from tests.mutation.plugin import PORTS
from tests.mutation.verdict import (
    NOTICED,
    Mutant,
    Verdict,
    read_diff,
    read_explained,
    stale,
)
from tests.servers.plugin import RunningServers

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "docs", "benchmarks", "pyproject.toml", "tox.ini")
ERRORS = {3, 255}  # exit codes where pytest itself has failed: nothing is noticed
CHILDREN = "2"  # on one core: the tests wait for half of their time
PACKAGE = Path("src/asgi_uow")


def make() -> None:
    """Write the mutants of each file, as `mutmut run` does first."""
    Path("mutants").mkdir()
    file_utils.copy_src_dir()
    file_utils.copy_also_copy_files()
    file_utils.setup_source_paths()
    create_mutants(1)


def results() -> Iterator[tuple[Path, str, str]]:
    """Give of each mutant its file, its name, and what the tests said of it so far."""
    for path in map(Path, file_utils.walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        for name, code in data.exit_code_by_key.items():
            yield path, name, "error" if code in ERRORS else status_by_exit_code[code]


def read() -> Iterator[Mutant]:
    for path, name, status in results():
        change = read_diff(get_diff_for_mutant(name, path=path))
        yield Mutant(path.relative_to(PACKAGE).as_posix(), name, *change, status)


def try_out(names: list[str], ports: dict[str, int | None]) -> dict[str, str]:
    """Run the tests on these mutants: on SQLite, or those that need a server."""
    Path("mutants/mutmut-stats.json").unlink(missing_ok=True)
    tool = str(Path(sys.executable).with_name("mutmut"))
    log = Path("log")
    with log.open("wb") as out:
        code = subprocess.call(
            [tool, "run", "--max-children", CHILDREN, *names],
            env={**os.environ, PORTS: json.dumps(ports)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    if code:
        sys.exit(log.read_text("utf-8", "replace")[-5000:])
    return {name: status for _, name, status in results()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.mutation", description=__doc__)
    parser.add_argument("folder", type=Path, help="is emptied, and worked in")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    own = settings["tool"]["asgi-uow"]["mutation"]
    help_of_part = "2/4: the second quarter of the mutants; 1/1: all"
    parser.add_argument("--part", default=own["part"], help=help_of_part)
    options = parser.parse_args()
    first, every = map(int, options.part.split("/"))
    explained = read_explained((ROOT / own["explained"]).read_text("utf-8"))

    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    for each in COPIED:
        copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
        copy(ROOT / each, options.folder / each)
    os.chdir(options.folder)
    began = time.monotonic()
    with redirect_stdout(StringIO()):  # mutmut names every file
        make()
    made = list(read())
    if gone := stale(explained, made):
        print("Explained, but no mutant of the code:", *gone, sep="\n    ")
        return 1
    wanted = [each for each in made if not each.is_of_text]
    tried = wanted[first - 1 :: every]
    texts = len(made) - len(wanted)
    print(f"{len(made)} mutants, {texts} of them of texts, which are left out.")
    print(f"Part {first} of {every}: {len(tried)} are tried. --part 1/1 tries all.")
    sys.stdout.flush()
    found = try_out([each.name for each in tried], {})
    left = [each.name for each in tried if found[each.name] not in NOTICED]
    print(f"{len(left)} survive the tests on SQLite; these get those with servers.")
    sys.stdout.flush()
    servers = RunningServers({})
    try:
        ports = {kind: servers.port(kind) for kind in ("mariadb", "postgresql")}
        found |= {
            name: status
            for name, status in (try_out(left, ports) if left else {}).items()
            if name in left and status != "no tests"
        }
    finally:
        servers.stop()
    tried = [dataclasses.replace(each, status=found[each.name]) for each in tried]
    verdict = Verdict(tried, explained)
    print(*verdict.report(), sep="\n")
    print(f"Took {(time.monotonic() - began) / 60:.0f} minutes.")
    return 1 if verdict.wrong or verdict.score < own["fail_under"] else 0


if __name__ == "__main__":
    sys.exit(main())
