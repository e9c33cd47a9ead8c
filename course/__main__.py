"""The commands of the course: python -m course --help shows them."""
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from common.files import refuse_existing
from common.flags import UserError, option, parse, run
from course.audit import audit
from course.grade import grade_all
from course.make import ASSIGNMENTS, find, gradescope, make, make_all


@dataclass
class Flags:
    """python -m course make NAME --out DIR            an assignment as a folder that can be handed out
    python -m course make --all --out DIR             the semester: all of them, and the capstone
    python -m course grade NAME SUBMISSIONS --out CSV grades; a text and results.json a student
    python -m course gradescope NAME --out ZIP        the autograder for Gradescope
    python -m course audit [NAME …]                   grade the grader: wrong and right solutions"""
    out: str | None = option(None, "where the result is written")
    all: bool = option(False, "make every assignment")
    seed: int = option(1, "shapes and numbers of the hidden tests")


def main() -> None:
    words = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    flags = parse(Flags, sys.argv[1 + len(words):], "python -m course COMMAND")
    out = Path(flags.out or "")
    if words[:1] != ["audit"] and flags.out is None:
        raise UserError("--out is missing: python -m course --help shows every command")
    refuse_existing(flags.out)
    match words:
        case ["make"] if flags.all:
            make_all(out)
        case ["make", name]:
            make(name, out)
        case ["grade", name, submissions]:
            grade_all(name, Path(submissions), out, flags.seed)
        case ["gradescope", name]:
            gradescope(name, out, flags.seed)
        case ["audit", *names] if all(map(find, names)):
            with ThreadPoolExecutor(2) as pool:         # each waits for a process
                audits = pool.map(lambda name: audit(name, flags.seed), names or ASSIGNMENTS)
            good, rows, complaints = zip(*audits)
            print(*sum(complaints, []), sep="\n")
            for line in [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]:
                print("|", " | ".join(map(str, line)), "|")
            if not all(good):
                raise UserError("the grader is not good enough: see the lines above the table")
        case _:
            raise UserError("there is no such command: python -m course --help shows every command")


if __name__ == "__main__":
    run(main)
