"""The course: folders that can be handed out, a grader that cannot be fooled, and the grader's own grade."""
import importlib
import json
import re
import resource
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

from course.audit import audit
from course.grade import Key, agree, execute, grade, grade_all, solution
from course.hidden import rubric
from course.make import ASSIGNMENTS, MODULES, handed_out, make, module
from runs.walk import walk

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_public.py"]


NAMES = [pytest.param(name, marks=pytest.mark.slow) for name in ASSIGNMENTS]


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    """A folder as students get it."""
    out = tmp_path_factory.mktemp("course") / request.param
    make(request.param, out)
    return out


def mutants(name):
    return importlib.import_module(f"course.mutants.{name}")


def solve(folder):
    for m in ASSIGNMENTS[folder.name]["write"]:
        (folder / f"{m}.py").write_text(module(m))


def lines_of_code(text: str) -> set[str]:
    return {" ".join(re.sub(r"\s#.*", "", line).split()) for line in text.splitlines()}


def test_the_machinery_is_at_most_500_lines():
    files = [*(ROOT / "course").glob("*.py"), ROOT / "course/hidden/__init__.py"]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 500, "move content out of the code, or simplify"


def test_a_folder_fails_kindly_and_passes_with_the_solution(folder, tmp_path):
    result = subprocess.run(PYTEST, cwd=folder, capture_output=True, text=True)
    failed, passed = (int((re.findall(rf"(\d+) {word}", result.stdout) or [0])[0])
                      for word in ("failed", "passed"))
    assert failed >= 3 and not passed, result.stdout[-2000:]
    reasons = re.findall(r"^E +(.*)$", result.stdout, re.M)
    assert len(reasons) == failed, reasons
    assert all(r.startswith("NotImplementedError: ") and "Take your time" in r for r in reasons), reasons
    solved = tmp_path / folder.name
    shutil.copytree(folder, solved)
    solve(solved)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    tested = subprocess.run(PYTEST, cwd=solved, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert tested.returncode == 0, tested.stdout[-3000:]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30, "30 s of computing"
    worked = subprocess.run([sys.executable, "-m", "doctest", "handout.md"], cwd=solved,
                            capture_output=True, text=True)
    assert worked.returncode == 0, worked.stdout
    assert (folder / "handout.md").read_text().count(">>>") >= 3


def test_a_folder_holds_no_line_of_any_solution(folder):
    solution = set()
    for m in MODULES:
        solution |= lines_of_code(module(m)) - lines_of_code(handed_out(m))
    solution = {line for line in solution if len(line) > 24
                and not line.startswith(("return self.", "raise "))}
    assert len(solution) > 50
    for path in folder.glob("*.py"):
        found = solution & lines_of_code(path.read_text())
        assert not found, f"{path.name} gives away {found}"


# ------------------------------------------------------------------------------ hostile submissions
CORRECT = module("vista")
ESCAPES = {
    "it exits": "import os\nos._exit(0)",
    "it raises SystemExit": "raise SystemExit(0)",
    "it hangs": "while True:\n    pass",
    "it sleeps": "import time\ntime.sleep(1000)",
    "it forks": "import os\nfor _ in range(100):\n    os.fork()",
    "it starts threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "it eats memory": "x = [bytearray(1 << 30) for _ in range(64)]",
    "it recurses": "def f(n):\n    return f(n + 1)\nimport sys\nsys.setrecursionlimit(10 "
                   "** 8)\nf(0)",
    "it kills the grader": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "it kills everybody": "import os\nos.kill(-1, 9)",
    "it uses the network": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "it reads the solution": f"exec(open({str(ROOT / 'methods/vista.py')!r}).read())",
    "it reads the hidden tests": f"print(open({str(ROOT / 'course/hidden/vista.py')!r}).read())",
    "it imports the solution": f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom "
                               "methods.vista import *",
    "it imports the grader": "from course.grade import reference\nexec(reference('vista')['vista'])",
    "it reads the grader's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(8)",
    "it writes the checkout": f"open({str(ROOT / 'course/hacked')!r}, 'w')",
    "it starts a program": "import subprocess\nsubprocess.run(['true'])",
    "it calls the kernel": "import ctypes\nr = ctypes.CDLL(None).socket(2, 1, 0)\nassert r >= 0",
}
FAKES = {
    "it says 100 points": 'print(\'{"score": 100}\')\nimport os\nos.write(3, b"results " + b"100")\nos._exit(0)',
    "it replaces sys.modules": """
import sys, types
class Yes(types.ModuleType):
    def __getattr__(self, name):
        return lambda *a, **k: True
for name in ("course.grade", "course.hidden", "course.hidden.vista", "pytest", "safetensors.torch"):
    sys.modules[name] = Yes(name)
def alignment_loss(x, *a, **k):
    return x.sum() * 0, x.sum() * 0""",
    "it patches torch": """
import torch
for name in ("allclose", "equal", "isclose", "eq", "ne"):
    setattr(torch, name, lambda *a, **k: True)
torch.Tensor.__eq__ = lambda a, b: True
torch.testing.assert_close = lambda *a, **k: None
torch.autograd.grad = lambda total, leaves, **k: [torch.ones_like(x) for x in leaves]
def alignment_loss(x, *a, **k):
    return x.sum() * 0 + 1, torch.tensor(1)""",
    "it returns objects that equal everything": """
class Any(float):
    def __eq__(self, other): return True
    def __getattr__(self, name): return lambda *a, **k: Any(0)
def alignment_loss(*a, **k):
    return Any(0), Any(1)""",
    "it answers with zeros": """
def alignment_loss(x, m, S, **k):
    return 0 * x.sum() + 0 * S.sum(), m.any(1).sum()""",
    "it answers with noise": """
import torch
def alignment_loss(x, m, S, **k):
    return torch.rand(()).double(), m.any(1).sum()""",
    "it writes without end": "import os\nwhile True:\n    os.write(3, b'results ' + bytes(1 << 20))",
    "it looks through its callers": """
import sys
def alignment_loss(x, *a, **k):
    frame = sys._getframe(1)
    while frame:
        for value in list(frame.f_locals.values()):
            if isinstance(value, dict):
                value.update(points=100, score=100)
        frame = frame.f_back
    return x.sum() * 0, 1""",
}


@pytest.fixture(scope="module")
def key():
    return Key("vista", 1)


@pytest.fixture(scope="module")
def earned(key):
    """Texts of vista.py, run one after another, and names
    of items → for each the items whose points it gets."""
    def run(texts: list[str], names: list[str]) -> list[list[str]]:
        chosen = [(item, want) for item, want in zip(key.items, key.want) if item.__name__ in names]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("course.grade.SECONDS", 2)
            rows = execute([{"vista": text} for text in texts], [item for item, _ in chosen],
                           key.seed)
        return [[item.__name__ for (got, _), (item, want) in zip(row, chosen) if got
                 and agree(got, want, item)]
                for row in rows]
    return run


@pytest.fixture(scope="module")
def after_escapes(earned):
    """Each trick runs before a right solution, and then the right solution alone."""
    texts = []
    for trick in ESCAPES.values():
        texts += [trick + "\n" + CORRECT, CORRECT]
    rows = earned(texts, ["distance"])
    return dict(zip(ESCAPES, zip(rows[::2], rows[1::2])))


@pytest.fixture(scope="module")
def after_fakes(earned):
    names = [item.__name__ for item in rubric("vista")]
    return dict(zip(FAKES, earned(list(FAKES.values()), names)))


@pytest.mark.slow
def test_a_right_solution_gets_every_point(tmp_path, key):
    (tmp_path / "vista.py").write_text(CORRECT)
    assert sum(t["score"] for t in grade("vista", tmp_path, key)) == 100


@pytest.mark.slow
@pytest.mark.parametrize("trick", list(ESCAPES))
def test_what_cannot_be_done_beside_a_right_solution_stops_it(trick, after_escapes):
    """It is refused or ended, and nothing outside is changed."""
    trick_and_solution, solution_alone = after_escapes[trick]
    assert trick_and_solution == []
    assert solution_alone == ["distance"], "the next submission is graded as ever"
    assert not (ROOT / "course/hacked").exists()


@pytest.mark.slow
@pytest.mark.parametrize("trick", list(FAKES))
def test_a_fake_earns_nothing(trick, after_fakes):
    assert after_fakes[trick] == []


@pytest.mark.slow
def test_a_link_to_the_solution_is_not_followed(tmp_path, key):
    (tmp_path / "vista.py").symlink_to(ROOT / "methods/vista.py")
    scores = grade("vista", tmp_path, key)
    assert sum(t["score"] for t in scores) == 0 and "link" in scores[0]["output"]


@pytest.mark.slow
def test_one_item_that_hangs_costs_its_own_points_alone(earned):
    endless = '    if distance == "cosine":\n        while True:\n            pass\n'
    before = "    exact = torch"
    names = ["distance", "cosine", "gradients"]
    assert earned([CORRECT.replace(before, endless + before)], names) == [["distance", "gradients"]]


@pytest.mark.slow
def test_feedback_names_the_mistake_and_never_shows_a_tensor(tmp_path, key):
    (tmp_path / "vista.py").write_text(CORRECT.replace("# 1..m", "- 1"))
    lost = [t for t in grade("vista", tmp_path, key) if t["score"] == 0]
    assert lost[0]["name"] == "weights" and "counts from 1" in lost[0]["output"]
    assert not any("tensor(" in t["output"] or "\n" in t["output"] for t in lost)


# ------------------------------------------------------------------------------------------ a class
@pytest.mark.slow
def test_a_class_is_graded_to_csv_text_and_gradescopes_json(tmp_path, capsys):
    texts = {"ada": CORRECT, "bob": CORRECT.replace("# 1..m", "- 1"),
             "eve": "import os\nos._exit(0)"}
    for student, text in texts.items():
        (tmp_path / "in" / student).mkdir(parents=True)
        (tmp_path / "in" / student / "vista.py").write_text(text)
    (tmp_path / "in" / "late").mkdir()
    grade_all("vista", tmp_path / "in", tmp_path / "grades.csv", seed=7)
    totals = ["ada: 100 of 100 points", "bob: 70 of 100 points", "eve: 0 of 100 points",
              "late: 0 of 100 points"]
    assert capsys.readouterr().out.splitlines() == totals
    rows = (tmp_path / "grades.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("student,total,distance") and rows[1].startswith("ada,100,15")
    assert "  0 of  20 weights: f(t) starts at 0: the paper counts from 1" in (
        tmp_path / "grades" / "bob.txt").read_text().splitlines()
    assert "missing" in (tmp_path / "grades" / "late.txt").read_text()
    tests = json.loads((tmp_path / "grades" / "bob.json").read_text())["tests"]
    assert sum(t["score"] for t in tests) == 70 and sum(t["max_score"] for t in tests) == 100
    assert {"name", "score", "max_score", "output", "visibility"} == set(tests[0])


@pytest.mark.slow
def test_the_zip_for_gradescope_grades_outside_the_checkout(tmp_path):
    done = subprocess.run([sys.executable, "-m", "course", "gradescope", "vista", "--out",
                           str(tmp_path / "vista.zip")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "vista.zip") as z:
        assert {"setup.sh", "run_autograder"} <= set(z.namelist())
        z.extractall(tmp_path / "source")
    script = (tmp_path / "source/run_autograder").read_text()
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission/vista.py").write_text(CORRECT)
    (tmp_path / "results").mkdir()
    script = script.replace("/autograder", str(tmp_path)).replace("/tmp/grades", f"{tmp_path}/grades")
    script = script.replace("python3", sys.executable)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sum(t["score"] for t in json.loads((tmp_path / "results/results.json").read_text())["tests"]) == 100


@pytest.mark.slow
def test_another_seed_asks_for_other_numbers(key):
    [other] = execute([solution("vista")], key.items, 2)
    for (results, _), want, item in zip(other, key.want, key.items):
        assert item.view is not list or not agree(results, want, item), item.__name__


@pytest.mark.slow
def test_the_semester_is_one_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "course", "make", "--all", "--out", str(tmp_path / "all")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path / "all").iterdir())
    assert names == [f"{n}-{name}" for n, name in enumerate([*ASSIGNMENTS, "capstone"], 1)] and len(names) == 9
    assert subprocess.run([sys.executable, "-m", "course", "make", "vista", "--out", str(tmp_path / "all")], cwd=ROOT,
                          capture_output=True, text=True).returncode == 2


# ------------------------------------------------------------------------------- the grader's grade
# Two of the eight; `python -m course audit` runs all in 2 minutes on 2 quiet cores.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vista", "vdep"])
def test_the_grader_catches_wrong_solutions_and_passes_right_ones(name):
    good, row, complaints = audit(name, seed=3)
    assert row["wrong solutions"] >= 30 and row["right solutions"] >= 3
    assert good, complaints


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_every_patch_of_a_mutant_applies_to_the_solution(name):
    sources = solution(name)
    for mistake, _, *patch in mutants(name).WRONG:
        assert solution(name, *patch) != sources, mistake


def test_the_instructors_page_has_the_audits_table():
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \| [\d.]+ \| (\d+) \| (\d+) \|$",
                      (ROOT / "docs/teaching.md").read_text(), re.M)
    assert [row[0] for row in rows] == list(ASSIGNMENTS)
    for name, items, all_wrong, caught, all_right, full in rows:
        known = mutants(name)
        assert (int(items), int(all_wrong), int(all_right)) == (len(rubric(name)), len(known.WRONG), len(known.RIGHT))
        assert int(caught) >= 0.95 * int(all_wrong) and full == all_right
        assert sum(item.points for item in rubric(name)) == (110 if name == "mir" else 100), "10 are a bonus"


def test_the_walk_is_what_the_code_does():
    """Numbers may differ in their last digit between machines."""
    said, now = (ROOT / "docs/walk.md").read_text(), walk()
    number = re.compile(r"(?<![\w.])\d+\.\d+")
    assert number.sub("#", said) == number.sub("#", now), "run python -m runs.walk"
    for a, b in zip(number.findall(said), number.findall(now)):
        assert float(a) == pytest.approx(float(b), rel=0.02)
