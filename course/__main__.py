"""python -m course make NAME --out DIR            an assignment as a folder that can be handed out
python -m course make --all --out DIR             the semester: all of them, and the capstone
python -m course grade NAME SUBMISSIONS --out CSV grades, and a text and a results.json for every student
python -m course gradescope NAME --out ZIP        the autograder for Gradescope
python -m course audit [NAME …]                   grade the grader with wrong and right solutions
"""
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from common.files import new_folder, refuse_existing
from common.flags import UserError, option, parse, run
from course.audit import audit, passes, table
from course.grade import grade_all
from course.make import ASSIGNMENTS, MODULES, ROOT, capstone, find, make


@dataclass
class Flags:
    """make, grade, gradescope and audit: python -m course --help lists them."""
    out: str | None = option(None, "where the result is written")
    seed: int = option(1, "shapes and numbers of the hidden tests")


def gradescope(name: str, out: Path, seed: int) -> None:
    """Write the zip that Gradescope takes: setup.sh, run_autograder, and the files that the grader reads."""
    find(name)
    refuse_existing(out)
    paths = [p for folder in ("course", "common") for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".md")]
    paths += [ROOT / m.file for m in MODULES.values()] + [ROOT / "course/assignments.json"]
    paths += [ROOT / path for a in ASSIGNMENTS.values() for path in a.files]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for path in sorted(set(paths)):
            z.write(path, path.relative_to(ROOT))
        z.writestr("setup.sh", "#!/usr/bin/env bash\nset -e\napt-get update && apt-get install -y python3-pip\n"
                   "pip3 install torch numpy safetensors tokenizers "
                   "--extra-index-url https://download.pytorch.org/whl/cpu\n")
        z.writestr("run_autograder", "#!/usr/bin/env bash\nset -e\ncd /autograder/source\n"
                   "rm -rf /tmp/grades /tmp/grades.csv\n"
                   f"python3 -m course grade {name} /autograder/submission --seed {seed} --out /tmp/grades.csv\n"
                   "cp /tmp/grades/submission.json /autograder/results/results.json\n")


def run_audit(names: list[str], seed: int) -> None:
    rows = [audit(name, seed) for name in names]
    for row in rows:
        for line in row["missed"]:
            print(f"{row['assignment']}: not caught, or too much lost: {line}")
        for line in row["false_alarms"]:
            print(f"{row['assignment']}: false alarm: {line}")
    print(table(rows))
    print(f"{sum(r['seconds'] for r in rows):.0f} s")
    if not all(map(passes, rows)):
        raise UserError("the grader is not good enough: see the lines above the table")


def main() -> None:
    command = sys.argv[1:]
    words = []
    while command and not command[0].startswith("--"):
        words.append(command.pop(0))
    everything = "--all" in command
    flags = parse(Flags, [word for word in command if word != "--all"]) if "--help" not in command else None
    match words:
        case _ if flags is None:
            print(__doc__, end="")
        case ["audit", *names]:
            for name in names:
                find(name)
            run_audit(names or list(ASSIGNMENTS), flags.seed)
        case _ if flags.out is None:
            raise UserError("--out is missing: python -m course --help shows every command")
        case ["make"] if everything:
            refuse_existing(flags.out)
            with new_folder(Path(flags.out)) as semester:
                for number, name in enumerate(ASSIGNMENTS, 1):
                    make(name, semester / f"{number}-{name}")
                capstone(semester / f"{len(ASSIGNMENTS) + 1}-capstone")
            print(f"{flags.out}: {len(ASSIGNMENTS)} assignments and the capstone")
        case ["make", name]:
            make(name, Path(flags.out))
            print(f"{flags.out}: read {flags.out}/handout.md")
        case ["grade", name, submissions]:
            print("\n".join(grade_all(name, Path(submissions), Path(flags.out), flags.seed)))
        case ["gradescope", name]:
            gradescope(name, Path(flags.out), flags.seed)
            print(f"{flags.out}: upload it as the assignment's autograder")
        case _:
            raise UserError("there is no such command: python -m course --help shows every command")


if __name__ == "__main__":
    run(main)
