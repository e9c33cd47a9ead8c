"""Grade submissions: run them in locked processes, compare what they return with what the reference returns.

The reference and the mutants (trusted) run through the same worker as submissions do, in a process of their own. A
submission's results that equal those of a known wrong solution get that mistake's name as feedback.
"""
import csv
import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from common.files import new_folder, refuse_existing, write_json, write_text
from common.flags import UserError
from course.hidden import rubric
from course.make import MODULES, ROOT, find, handed_out, module

SECONDS = 10                    # of computing, for one rubric item; three times as long on the clock


class Worker:
    """A course/worker.py: run(sources, item) → its results. One a submission; end it with close()."""
    def __init__(self, name: str):
        self.name = name
        env = {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
               "TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": "4194304"}   # memory returns at once
        self.process = subprocess.Popen([sys.executable, "-m", "course.worker", name], cwd=ROOT, env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def run(self, sources: dict[str, str], item, seed: int) -> bytes:
        graded = find(self.name).write
        job = pickle.dumps({"sources": sources, "graded": graded, "item": item, "seed": seed, "memory": item.memory,
                            "seconds": SECONDS})
        self.process.stdin.write(struct.pack("Q", len(job)) + job)
        self.process.stdin.flush()
        header = self.process.stdout.read(8)
        if len(header) < 8:
            raise UserError("the grader's worker ended: grading needs Linux with seccomp, on x86_64 or aarch64")
        return self.process.stdout.read(struct.unpack("Q", header)[0])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# ------------------------------------------------------------------------------------------------ comparing
def parse(answer: bytes) -> tuple[list[list[Tensor]] | None, str]:
    """What a locked process wrote → (results of each draw, ""), or (None, why there are none). Trusts nothing in it."""
    try:
        if answer.startswith(b"results "):
            tensors = load(answer[8:])
            return [[tensors[k] for k in sorted(tensors) if k.startswith(f"{draw}.")] for draw in (0, 1)], ""
        kind, text = json.loads(answer.removeprefix(b"error "))
        text = "".join(c if c.isprintable() else " " for c in f"{kind}: {text}")
        return None, text[:200]
    except Exception:
        return None, "the answer cannot be read"


def same(got: list[Tensor], want: list[Tensor], tolerance: float) -> bool:
    if len(got) != len(want) or any(a.shape != b.shape for a, b in zip(got, want)):
        return False
    return all(torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance) for a, b in zip(got, want))


def viewed(results: list[Tensor], item) -> list[Tensor]:
    return item.view(results) if item.view else results


def mark(t: Tensor) -> Tensor:
    """A number that tells tensors apart."""
    return (t.double().flatten() * torch.arange(1, t.numel() + 1).cos()).sum()


def agree(got: list[list[Tensor]], want: list[list[Tensor]], item) -> bool:
    """True if the results earn the item's points: both draws agree, and what the draw decides does change with it."""
    try:
        for a, b in zip(got, want):
            if not same(viewed(a, item), viewed(b, item), item.tolerance):
                return False
        for a, b, c, d in zip(*want, *got):
            if (mark(a) - mark(b)).abs() > 1e-6 and mark(c) == mark(d):
                return False
        return True
    except Exception:                   # shapes and types that no view expects
        return False


# ------------------------------------------------------------------------------------------------ known results
def given(name: str) -> dict[str, str]:
    """Modules that a submission may import, as they were handed out."""
    return {m: handed_out(m) for m in find(name).given}


def reference(name: str) -> dict[str, str]:
    return {**given(name), **{m: module(m) for m in find(name).write}}


def mutant(name: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The reference with some texts replaced. Raises UserError if one of them does not occur exactly once."""
    texts = {m: (ROOT / MODULES[m].file).read_text() for m in find(name).write}
    for old, new in pairs:
        holding = [m for m in texts if texts[m].count(old) == 1]
        if len(holding) != 1 or sum(t.count(old) for t in texts.values()) != 1:
            raise UserError(f"course/mutants/{name}.py: the solution no longer has exactly one {old!r}: mend the patch")
        texts[holding[0]] = texts[holding[0]].replace(old, new)
    return {**given(name), **{m: module(m, text) for m, text in texts.items()}}


def wrong(name: str) -> list[tuple[str, str, dict[str, str]]]:
    """(mistake, item that it breaks, sources) of every wrong solution in course/mutants/."""
    found = []
    for mistake, item, *texts in importlib.import_module(f"course.mutants.{name}").WRONG:
        found.append((mistake, item, mutant(name, list(zip(texts[::2], texts[1::2])))))
    return found


def right(name: str) -> list[tuple[str, dict[str, str]]]:
    """(how it is written, sources) of every right solution that is not the project's."""
    found = []
    for way, m, code in importlib.import_module(f"course.mutants.{name}").RIGHT:
        sources = reference(name)
        sources[m] += "\n\n" + code
        found.append((way, sources))
    return found


def run_all(name: str, solutions: list[dict[str, str]], seed: int) -> list[list]:
    """parse() of every item, for each of some trusted solutions, on two processes."""
    def half(part: list[dict[str, str]]) -> list[list]:
        worker = Worker(name)
        try:
            return [[parse(worker.run(sources, item, seed)) for item in rubric(name)] for sources in part]
        finally:
            worker.close()
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(half, (solutions[::2], solutions[1::2])))
    return [parts[i % 2][i // 2] for i in range(len(solutions))]


class Key:
    """What the reference and, if asked for, the known wrong solutions return for one seed."""
    def __init__(self, name: str, seed: int, mistakes: bool = True):
        known = wrong(name) if mistakes else []
        self.name, self.seed = name, seed
        first, *rest = run_all(name, [reference(name), *(sources for _, _, sources in known)], seed)
        for item, (results, why) in zip(rubric(name), first):
            if results is None:
                raise UserError(f"the reference fails at {name}'s {item.__name__}: {why}")
        self.want = [results for results, _ in first]
        self.mistakes = [(mistake, item, [results for results, _ in row])
                         for (mistake, item, _), row in zip(known, rest)]

    def diagnose(self, i: int, got: list[list[Tensor]]) -> str | None:
        """The name of the known mistake that gives these results for item i and belongs there."""
        item = rubric(self.name)[i]
        for mistake, breaks, results in self.mistakes:
            if breaks == item.__name__ and results[i] is not None and all(
                    same(a, b, 1e-6) for a, b in zip(got, results[i])):
                return mistake
        return None


# ------------------------------------------------------------------------------------------------ grading
@dataclass
class Score:
    item: str
    points: int
    most: int
    feedback: str           # empty where nothing was lost


def read_submission(name: str, folder: Path) -> dict[str, str]:
    """The files that an assignment asks for. Links are not followed: they may lead to somebody else's solution."""
    texts = {}
    for m in find(name).write:
        path = folder / f"{m}.py"
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 20:
            raise ValueError(f"{m}.py is missing, a link, or larger than 1 MiB: hand in the file itself")
        texts[m] = path.read_text(encoding="utf-8", errors="replace")
    return texts


def grade(name: str, folder: Path, key: Key) -> list[Score]:
    """Run one submission in a process of its own and score it."""
    scores, worker = [], Worker(name)
    try:
        sources = {**given(name), **read_submission(name, folder)}
        for i, item in enumerate(rubric(name)):
            got, why = parse(worker.run(sources, item, key.seed))
            if got is not None and agree(got, key.want[i], item):
                scores.append(Score(item.__name__, item.points, item.points, ""))
                continue
            hint = " ".join(item.__doc__.split())
            if got is not None:
                hint = key.diagnose(i, got) or hint
            elif why.startswith("MemoryError"):
                hint += " (It took more memory than it may.)"
            else:
                hint += f" (Your code stopped with {why})"
            scores.append(Score(item.__name__, 0, item.points, hint))
    except ValueError as e:
        scores = [Score(item.__name__, 0, item.points, str(e)) for item in rubric(name)]
    finally:
        worker.close()
    return scores


def report(student: str, name: str, scores: list[Score]) -> str:
    points, most = sum(s.points for s in scores), sum(s.most for s in scores)
    lines = [f"{find(name).title}: {points} of {most} points ({student})", ""]
    for s in scores:
        lines.append(f"{s.points:3} of {s.most:3}  {s.item.replace('_', ' ')}")
        if s.feedback:
            lines.append(f"            {s.feedback}")
    return "\n".join(lines) + "\n"


def gradescope_results(scores: list[Score]) -> dict:
    """The format of Gradescope's results.json."""
    return {"tests": [{"name": s.item.replace("_", " "), "score": s.points, "max_score": s.most,
                       "output": s.feedback or "right", "visibility": "visible"} for s in scores]}


def grade_all(name: str, submissions: Path, out: Path, seed: int) -> list[str]:
    """Grade a folder of folders, or one submission. Writes `out` (csv) and, in a folder named like it, STUDENT.txt and
    STUDENT.json (Gradescope). Returns a line a student."""
    if not submissions.is_dir():
        raise UserError(f"{submissions} is not a folder: give one submission, or a folder with a folder a student")
    if out.suffix != ".csv":
        raise UserError(f"--out {out} is to be a table: give it a name that ends in .csv")
    for path in (out, out.with_suffix("")):
        refuse_existing(path)
    folders = sorted(p for p in submissions.iterdir() if p.is_dir() and not p.is_symlink())
    if any((submissions / f"{m}.py").exists() for m in find(name).write) or not folders:
        folders = [submissions]
    key, rows, lines = Key(name, seed), [], []
    with new_folder(out.with_suffix("")) as details:
        for folder in folders:
            scores = grade(name, folder, key)
            student, total = folder.resolve().name, sum(s.points for s in scores)
            rows.append({"student": student, "total": total, **{s.item: s.points for s in scores}})
            write_text(details / f"{student}.txt", report(student, name, scores))
            write_json(details / f"{student}.json", gradescope_results(scores))
            lines.append(f"{student}: {total}")
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_text(out, table.getvalue())
    return lines
