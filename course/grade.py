"""Grade submissions: run them in locked processes, compare what they return with the reference's.

The reference and the known wrong solutions (trusted) run in a worker as submissions do, in another
process. Results that equal those of a wrong solution get that mistake's name as feedback.
"""
import csv
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from common.files import new_folder, refuse_existing, write_json, write_text
from common.flags import UserError
from course.hidden import rubric
from course.make import MODULES, ROOT, find, handed_out, module

SECONDS = 10                    # of computing, for one item; three times as long on the clock


# -------------------------------------------------------------------------------- running
def execute(solutions: list[dict[str, str]], items: list, seed: int) -> list[list[tuple]]:
    """parse() of every item for each solution {module: text}, from a process that ends with it."""
    env = {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
           "PYTHONDONTWRITEBYTECODE": "1", "TOKENIZERS_PARALLELISM": "false",
           "MALLOC_MMAP_THRESHOLD_": "4194304"}                         # memory returns at once
    done = subprocess.run([sys.executable, "-m", "course.worker"], cwd=ROOT, env=env,
                          start_new_session=True, stdout=subprocess.PIPE,
                          input=pickle.dumps((solutions, items, seed, SECONDS)))
    if done.returncode:
        raise UserError("the grader's worker ended: grading needs Linux on x86_64 or aarch64")
    return [[parse(answer) for answer in row] for row in pickle.loads(done.stdout)]


def parse(answer: bytes) -> tuple[list[list[Tensor]] | None, str]:
    """What a locked process wrote → (results of both draws, ""), or (None, why). Trusts nothing."""
    try:
        if answer.startswith(b"results "):
            t = load(answer[8:])
            return [[t[k] for k in sorted(t) if k.startswith(draw)] for draw in ("0.", "1.")], ""
        kind, text = json.loads(answer.removeprefix(b"error "))
        return None, "".join(c if c.isprintable() else " " for c in f"{kind}: {text}")[:200]
    except Exception:
        return None, "an answer that cannot be read"


# -------------------------------------------------------------------------------- comparing
def same(got: list[Tensor], want: list[Tensor], tolerance: float) -> bool:
    if len(got) != len(want) or any(a.shape != b.shape for a, b in zip(got, want)):
        return False
    return all(torch.allclose(a.double(), b.double(), tolerance, tolerance) for a, b in zip(got, want))


def mark(t: Tensor) -> Tensor:
    """A number that tells tensors apart."""
    return (t.double().flatten() * torch.arange(1, t.numel() + 1).cos()).sum()


def agree(got: list[list[Tensor]], want: list[list[Tensor]], item) -> bool:
    """True if the results earn the points: both draws agree, and what depends on the draw does."""
    try:
        if not all(same(item.view(a), item.view(b), item.tolerance) for a, b in zip(got, want)):
            return False
        return not any((mark(a) - mark(b)).abs() > 1e-6 and mark(c) == mark(d)
                       for a, b, c, d in zip(*want, *got))
    except Exception:                   # shapes and types that no view expects
        return False


# -------------------------------------------------------------------------------- known solutions
def solution(name: str, *patch: str) -> dict[str, str]:
    """The reference and what is handed out with it. patch: texts and what replaces them, in turns.

    Raises UserError if a text does not occur exactly once."""
    texts = {m: (ROOT / MODULES[m]["file"]).read_text() for m in find(name)["write"]}
    for old, new in zip(patch[::2], patch[1::2]):
        if sum(text.count(old) for text in texts.values()) != 1:
            raise UserError(f"course/mutants/{name}.py: the solution has not exactly one {old!r}: mend the patch")
        texts = {m: text.replace(old, new) for m, text in texts.items()}
    given = {m: handed_out(m) for m in find(name)["given"]}
    return given | {m: module(m, text) for m, text in texts.items()}


def wrong(name: str) -> list[tuple[str, str, dict[str, str]]]:
    """(mistake, item that it breaks, sources) of every wrong solution in course/mutants/."""
    patches = importlib.import_module(f"course.mutants.{name}").WRONG
    return [(mistake, item, solution(name, *patch)) for mistake, item, *patch in patches]


def right(name: str) -> list[tuple[str, dict[str, str]]]:
    """(how it is written, sources) of every right solution that is not the project's."""
    found = []
    for way, m, code in importlib.import_module(f"course.mutants.{name}").RIGHT:
        sources = solution(name)
        found.append((way, sources | {m: sources[m] + "\n\n" + code}))
    return found


class Key:
    """What the reference and, if asked for, the known wrong solutions return for one seed."""
    def __init__(self, name: str, seed: int, mistakes: bool = True):
        self.name, self.seed, self.items = name, seed, rubric(name)
        known = wrong(name) if mistakes else []
        solutions = [solution(name), *(sources for *_, sources in known)]
        half = len(solutions) // 2 + 1
        with ThreadPoolExecutor(2) as pool:         # each waits for a process
            rows = pool.map(lambda part: execute(part, self.items, seed) if part else [],
                            (solutions[:half], solutions[half:]))
        first, *rest = sum(rows, [])
        for item, (results, why) in zip(self.items, first):
            if results is None:
                raise UserError(f"the reference fails at {name}'s {item.__name__}: {why}")
        self.want = [results for results, _ in first]
        self.mistakes = [(mistake, item, row) for (mistake, item, _), row in zip(known, rest)]

    def lost(self, row: list[tuple]) -> list[str]:
        """Names of the items whose points these results do not earn."""
        return [item.__name__ for (got, _), want, item in zip(row, self.want, self.items)
                if got is None or not agree(got, want, item)]

    def feedback(self, i: int, got: list[list[Tensor]] | None, why: str) -> str:
        """The known mistake of item i that gives these results, or what the item asks for."""
        item = self.items[i]
        hint = " ".join(item.__doc__.split())
        if got is None:
            return f"{hint} (Your code stopped with {why})"
        for mistake, breaks, row in self.mistakes:
            known = row[i][0]
            if breaks == item.__name__ and known and all(same(a, b, 1e-6) for a, b in zip(got, known)):
                return mistake
        return hint


# -------------------------------------------------------------------------------- grading
def read_submission(name: str, folder: Path) -> dict[str, str]:
    """The submission and what was handed out. Follows no links: to somebody else's solution."""
    sources = {m: handed_out(m) for m in find(name)["given"]}
    for m in find(name)["write"]:
        path = folder / f"{m}.py"
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 20:
            raise ValueError(f"{m}.py is missing, a link, or larger than 1 MiB: hand in the file itself")
        sources[m] = path.read_text(encoding="utf-8", errors="replace")
    return sources


def grade(name: str, folder: Path, key: Key) -> list[dict]:
    """Run one submission in a process of its own. Returns the "tests" of Gradescope's results."""
    try:
        [row] = execute([read_submission(name, folder)], key.items, key.seed)
        lost = key.lost(row)
        hints = [key.feedback(i, *results) for i, results in enumerate(row)]
    except ValueError as e:
        lost, hints = [item.__name__ for item in key.items], [str(e)] * len(key.items)
    tests = []
    for item, hint in zip(key.items, hints):
        failed = item.__name__ in lost
        tests.append({"name": item.__name__.replace("_", " "), "max_score": item.points,
                      "score": 0 if failed else item.points, "visibility": "visible",
                      "output": hint if failed else "right"})
    return tests


def report(student: str, name: str, tests: list[dict]) -> str:
    points, most = sum(t["score"] for t in tests), sum(t["max_score"] for t in tests)
    lines = [f"{find(name)['title']}: {points} of {most} points ({student})", ""]
    for t in tests:
        lines.append(f"{t['score']:3} of {t['max_score']:3}  {t['name']}")
        if t["score"] < t["max_score"]:
            lines.append(f"            {t['output']}")
    return "\n".join(lines) + "\n"


def grade_all(name: str, submissions: Path, out: Path, seed: int) -> list[str]:
    """Grade one submission, or a folder with a folder for each student. Returns a line a student.

    Writes `out` (csv) and, in a folder named like it, STUDENT.txt and STUDENT.json (Gradescope)."""
    if not submissions.is_dir():
        raise UserError(f"{submissions} is not a folder: give a submission, or a folder a student in a folder")
    folders = sorted(p for p in submissions.iterdir() if p.is_dir() and not p.is_symlink())
    if any((submissions / f"{m}.py").exists() for m in find(name)["write"]) or not folders:
        folders = [submissions]
    if out.suffix != ".csv":
        raise UserError(f"--out {out} is to be a table: give it a name that ends in .csv")
    refuse_existing(out.with_suffix(""))
    key, totals, text = Key(name, seed), [], io.StringIO(newline="")
    with new_folder(out.with_suffix("")) as details:
        table = csv.writer(text)
        table.writerow(["student", "total", *(item.__name__ for item in key.items)])
        for folder in folders:
            tests, student = grade(name, folder, key), folder.resolve().name
            points = [t["score"] for t in tests]
            table.writerow([student, sum(points), *points])
            write_text(details / f"{student}.txt", report(student, name, tests))
            write_json(details / f"{student}.json", {"tests": tests})
            totals.append(f"{student}: {sum(points)}")
        write_text(out, text.getvalue())
    return totals
