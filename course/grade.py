"""Grade submissions: run them in locked processes, compare their results with the reference's."""
import csv
import importlib
import io
import pickle
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from common.files import new_folder, refuse_existing, write_json, write_text
from common.flags import UserError
from course.hidden import rubric
from course.make import MODULES, ROOT, find, handed_out, module

SECONDS = 10                    # of computing, for one item; three times as long on the clock
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
               "MALLOC_MMAP_THRESHOLD_": "4194304"}             # memory returns at once


def execute(solutions: list[dict[str, str]], items: list, seed: int) -> list[list[tuple]]:
    """parse() of every item for each solution {module: text}, from a process that ends with it."""
    done = subprocess.run([sys.executable, "-B", "-m", "course.worker"], cwd=ROOT, env=ENVIRONMENT,
                          input=pickle.dumps((solutions, items, seed, SECONDS)), stdout=subprocess.PIPE)
    if done.returncode:
        raise UserError("the grader's worker ended: grading needs Linux on x86_64 or aarch64")
    return [[parse(answer) for answer in row] for row in pickle.loads(done.stdout)]


def parse(answer: bytes) -> tuple[list[list[Tensor]] | None, str]:
    """What a locked process wrote → (results of both draws, ""), or (None, why). Trusts nothing."""
    try:
        if answer.startswith(b"results "):
            t = load(answer[8:])
            return [[t[k] for k in sorted(t) if k.startswith(draw)] for draw in ("0.", "1.")], ""
        text = answer.removeprefix(b"error ").decode(errors="replace")[:200]
        return None, "".join(c if c.isprintable() else " " for c in text)
    except Exception:
        return None, "an answer that cannot be read"


def same(got: list[Tensor], want: list[Tensor], tolerance: float) -> bool:
    return [t.shape for t in got] == [t.shape for t in want] and all(
        torch.allclose(a.double(), b.double(), tolerance, tolerance) for a, b in zip(got, want))


def mark(t: Tensor) -> Tensor:
    """A number that tells tensors apart."""
    return (t.double().flatten() * torch.arange(1, t.numel() + 1).cos()).sum()


def agree(got: list[list[Tensor]], want: list[list[Tensor]], item) -> bool:
    """True if the results earn the points: both draws agree, and what depends on the draw does."""
    try:
        right = all(same(item.view(a), item.view(b), item.tolerance) for a, b in zip(got, want))
        return right and not any(mark(c) == mark(d) and (mark(a) - mark(b)).abs() > 1e-6
                                 for a, b, c, d in zip(*want, *got))
    except Exception:                   # shapes and types that no view expects
        return False


def solution(name: str, *patch: str) -> dict[str, str]:
    """The reference and what is handed out with it. patch: texts and what replaces them, in turns."""
    texts = {m: (ROOT / MODULES[m]["file"]).read_text("utf-8") for m in find(name)["write"]}
    for old, new in zip(patch[::2], patch[1::2]):
        if sum(text.count(old) for text in texts.values()) != 1:
            raise UserError(f"course/mutants/{name}.py: not once in the solution, mend it: {old!r}")
        texts = {m: text.replace(old, new) for m, text in texts.items()}
    given = {m: handed_out(m) for m in find(name)["given"]}
    return given | {m: module(m, text) for m, text in texts.items()}


class Key:
    """What the reference and the known wrong solutions return for one seed."""
    def __init__(self, name: str, seed: int):
        self.seed, self.items = seed, rubric(name)
        self.known = importlib.import_module(f"course.mutants.{name}")
        patches = [patch for _, _, *patch in self.known.WRONG]
        solutions = [solution(name, *patch) for patch in [[], *patches]]
        reference, *rows = execute(solutions, self.items, seed)
        if any(why for _, why in reference):
            raise UserError(f"the reference of {name} fails: {[why for _, why in reference]}")
        self.want = [results for results, _ in reference]
        self.mistakes = [(*wrong[:2], row) for wrong, row in zip(self.known.WRONG, rows)]

    def judge(self, row: list[tuple]) -> dict[str, str]:
        """Items whose points these results do not earn → the known mistake, or what is asked."""
        lost = {}
        for i, (item, want, (got, why)) in enumerate(zip(self.items, self.want, row)):
            if got and agree(got, want, item):
                continue
            feedback = " ".join(item.__doc__.split())
            if got is None:
                feedback += f" (Your code stopped with {why})"
            for mistake, breaks, known in self.mistakes:
                theirs = known[i][0] if breaks == item.__name__ else None
                if got and theirs and all(same(a, b, 1e-6) for a, b in zip(got, theirs)):
                    feedback = mistake
            lost[item.__name__] = feedback
        return lost


def read_submission(name: str, folder: Path) -> dict[str, str]:
    """The submission and what was handed out. Follows no links: to somebody else's solution."""
    sources = {m: handed_out(m) for m in find(name)["given"]}
    for m in find(name)["write"]:
        path = folder / f"{m}.py"
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 20:
            raise ValueError(f"{m}.py is missing, a link, or over 1 MiB: hand in the file itself")
        sources[m] = path.read_text(encoding="utf-8", errors="replace")
    return sources


def grade(name: str, folder: Path, key: Key) -> list[dict]:
    """Run one submission in a process of its own. Returns the "tests" of Gradescope's results."""
    try:
        lost = key.judge(execute([read_submission(name, folder)], key.items, key.seed)[0])
    except ValueError as e:
        lost = {item.__name__: str(e) for item in key.items}
    tests = []
    for item in key.items:
        points = 0 if item.__name__ in lost else item.points
        tests.append({"name": item.__name__.replace("_", " "), "visibility": "visible", "score": points,
                      "max_score": item.points, "output": lost.get(item.__name__, "right")})
    return tests


def grade_all(name: str, submissions: Path, out: Path, seed: int) -> None:
    """Grade one submission, or a folder with a folder a student: print totals, write `out` (csv)
    and, in a folder named like it, STUDENT.txt and STUDENT.json (Gradescope)."""
    if not submissions.is_dir():
        raise UserError(f"{submissions} is not a folder: give one submission, or a folder of them")
    folders = sorted(p for p in submissions.iterdir() if p.is_dir() and not p.is_symlink())
    if any((submissions / f"{m}.py").exists() for m in find(name)["write"]) or not folders:
        folders = [submissions]
    if out.suffix != ".csv":
        raise UserError(f"--out {out} is to be a table: give it a name that ends in .csv")
    refuse_existing(out.with_suffix(""))
    key, rows = Key(name, seed), io.StringIO(newline="")
    with new_folder(out.with_suffix("")) as details:
        table = csv.writer(rows)
        table.writerow(["student", "total", *(item.__name__ for item in key.items)])
        for folder in folders:
            tests, student = grade(name, folder, key), folder.resolve().name
            points, most = [t["score"] for t in tests], sum(t["max_score"] for t in tests)
            table.writerow([student, sum(points), *points])
            total = f"{student}: {sum(points)} of {most} points"
            print(total)
            lines = [f"{t['score']:3} of {t['max_score']:3} {t['name']}: {t['output']}" for t in tests]
            write_text(details / f"{student}.txt", "\n".join([total, *lines]) + "\n")
            write_json(details / f"{student}.json", {"tests": tests})
        write_text(out, rows.getvalue())
