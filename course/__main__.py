"""The commands of the course: python -m course --help lists them."""
import shutil
import sys
import zipfile
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from common.files import new_folder, refuse_existing
from common.flags import UserError, option, parse, run
from course.audit import TABLE, audit
from course.grade import grade_all
from course.make import ASSIGNMENTS, MODULES, ROOT, find, make


@dataclass
class Flags:
    """python -m course make NAME --out DIR            an assignment as a folder that can be handed out
python -m course make --all --out DIR             the semester: all of them, and the capstone
python -m course grade NAME SUBMISSIONS --out CSV grades, and a text and a results.json a student
python -m course gradescope NAME --out ZIP        the autograder for Gradescope
python -m course audit [NAME …]                   grade the grader with wrong and right solutions"""
    out: str | None = option(None, "where the result is written")
    all: bool = option(False, "make all assignments")
    seed: int = option(1, "shapes and numbers of the hidden tests")


def make_all(out: Path) -> None:
    with new_folder(out) as semester:
        for number, name in enumerate(ASSIGNMENTS, 1):
            make(name, semester / f"{number}-{name}")
        capstone = semester / f"{len(ASSIGNMENTS) + 1}-capstone"
        capstone.mkdir()
        shutil.copyfile(ROOT / "course/handouts/capstone.md", capstone / "handout.md")


def gradescope(name: str, out: Path, seed: int) -> None:
    """Write the zip that Gradescope takes: all that the grader reads, and two scripts."""
    paths = [p for folder in ("course", "common") for p in (ROOT / folder).rglob("*.*") if p.suffix != ".pyc"]
    paths += [ROOT / m["file"] for m in MODULES.values()]
    paths += [ROOT / path for path in find(name)["files"]]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for path in sorted(set(paths)):
            z.write(path, path.relative_to(ROOT))
        for path in sorted((ROOT / "course/gradescope").iterdir()):
            z.writestr(path.name, path.read_text().replace("NAME", name).replace("SEED", str(seed)))


def run_audit(names: list[str], seed: int) -> None:
    rows = [audit(find(name) and name, seed) for name in names]
    for name, row in zip(names, rows):
        for line in row["missed"]:
            print(f"{name}: not caught, or too much lost: {line}")
        for line in row["false_alarms"]:
            print(f"{name}: false alarm: {line}")
    print("\n".join([*TABLE, *(row["row"] for row in rows)]))
    print(f"{sum(row['seconds'] for row in rows):.0f} s")
    if not all(row["passes"] for row in rows):
        raise UserError("the grader is not good enough: see the lines above the table")


def main() -> None:
    words = list(takewhile(lambda word: not word.startswith("--"), sys.argv[1:]))
    flags = parse(Flags, sys.argv[1 + len(words):], "python -m course")
    if words[:1] == ["audit"]:
        run_audit(words[1:] or list(ASSIGNMENTS), flags.seed)
        return
    if flags.out is None:
        raise UserError("--out is missing: python -m course --help shows every command")
    out = Path(flags.out)
    refuse_existing(out)
    match words:
        case ["make"] if flags.all:
            make_all(out)
        case ["make", name]:
            make(name, out)
        case ["grade", name, submissions]:
            print("\n".join(grade_all(name, Path(submissions), out, flags.seed)))
        case ["gradescope", name]:
            gradescope(name, out, flags.seed)
        case _:
            raise UserError("there is no such command: python -m course --help shows every command")
    print(f"{out} is written")


if __name__ == "__main__":
    run(main)
