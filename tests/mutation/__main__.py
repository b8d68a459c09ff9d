"""Make the mutants, run the tests on each, print who survived; fail below a score."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from mutmut import __main__ as mutmut
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

from tests.mutation.verdict import Mutant, Verdict, read_diff, read_explained, stale

ROOT = Path(__file__).parents[2]
COPIED = ("src", "tests", "docs", "benchmarks", "pyproject.toml", "tox.ini")
PACKAGE = Path("src/asgi_uow")


def make() -> None:
    """Write the mutants of each file, as `mutmut run` does first."""
    Path("mutants").mkdir()
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    mutmut.create_mutants(1)


def read() -> list[Mutant]:
    """Read the mutants of all files, and what the tests said of each so far."""
    mutants = []
    for path in mutmut.walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        module = Path(path).relative_to(PACKAGE).as_posix()
        for name, code in data.exit_code_by_key.items():
            before, after = read_diff(get_diff_for_mutant(name, path=path))
            status = status_by_exit_code[code]
            mutants.append(Mutant(module, name, before, after, status))
    return mutants


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.mutation")
    parser.add_argument("folder", type=Path, help="is emptied, and worked in")
    parser.add_argument(
        "--part", default=None, help="1/3: the first third; 1/1: all; 1/90: a try"
    )
    options = parser.parse_args()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    own = settings["tool"]["asgi-uow"]["mutation"]
    first, every = map(int, (options.part or own["part"]).split("/"))
    explained = read_explained((ROOT / own["explained"]).read_text("utf-8"))

    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    for each in COPIED:
        copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
        copy(ROOT / each, options.folder / each)
    os.chdir(options.folder)
    began = time.monotonic()
    make()
    made = read()
    if gone := stale(explained, made):
        print("Explained, but no mutant of the code:", *gone, sep="\n    ")
        return 1
    wanted = [each for each in made if not each.is_of_text]
    names = [each.name for each in wanted][first - 1 :: every]
    texts = len(made) - len(wanted)
    print(f"{len(made)} mutants, {texts} of them of texts, which are left out.")
    print(f"Part {first} of {every}: {len(names)} are tried. --part 1/1 tries all.")
    sys.stdout.flush()
    tool = Path(sys.executable).with_name("mutmut")
    with Path("log").open("wb") as log:
        command = [str(tool), "run", "--max-children", "1", *names]
        code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT)
    if code:
        print(Path("log").read_text("utf-8", "replace").rpartition("\r")[2])
        return code
    verdict = Verdict([each for each in read() if each.name in set(names)], explained)
    print(*verdict.report(), sep="\n")
    print(f"Took {(time.monotonic() - began) / 60:.0f} minutes.")
    return 1 if verdict.wrong or verdict.score < own["fail_under"] else 0


if __name__ == "__main__":
    sys.exit(main())
