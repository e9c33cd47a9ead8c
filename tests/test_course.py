"""The course: folders that can be handed out, a grader that cannot be fooled, and the grader's own grade."""
import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

from course.audit import audit, passes
from course.grade import Key, Worker, agree, grade, grade_all, parse
from course.hidden import rubric
from course.make import ASSIGNMENTS, STUBS, handed_out, make, module

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_public.py"]


@pytest.fixture(scope="module", params=list(ASSIGNMENTS))
def folder(request, tmp_path_factory):
    """A folder as students get it."""
    out = tmp_path_factory.mktemp("course") / request.param
    make(request.param, out)
    return out


def solve(folder):
    for m in ASSIGNMENTS[folder.name].write:
        (folder / f"{m}.py").write_text(module(m))


def lines_of_code(text: str) -> set[str]:
    return {" ".join(re.sub(r"\s#.*", "", line).split()) for line in text.splitlines()}


def test_a_folder_fails_kindly_and_passes_with_the_solution(folder, tmp_path):
    result = subprocess.run(PYTEST, cwd=folder, capture_output=True, text=True, timeout=120)
    failed, passed = (int((re.findall(rf"(\d+) {word}", result.stdout) or [0])[0]) for word in ("failed", "passed"))
    assert failed >= 3 and not passed, result.stdout[-2000:]
    reasons = re.findall(r"^E +(.*)$", result.stdout, re.M)
    assert len(reasons) == failed, reasons
    assert all(r.startswith("NotImplementedError: ") and "Take your time" in r for r in reasons), reasons
    solved = tmp_path / folder.name
    shutil.copytree(folder, solved)
    solve(solved)
    began = subprocess.run(PYTEST, cwd=solved, capture_output=True, text=True, timeout=30)
    assert began.returncode == 0, began.stdout[-3000:]
    worked = subprocess.run([sys.executable, "-m", "doctest", "handout.md"], cwd=solved, capture_output=True, text=True)
    assert worked.returncode == 0, worked.stdout
    assert (folder / "handout.md").read_text().count(">>>") >= 3


def test_a_folder_holds_no_line_of_any_solution(folder):
    solution = set()
    for m in STUBS:
        solution |= lines_of_code(module(m)) - lines_of_code(handed_out(m))
    solution = {line for line in solution if len(line) > 24 and not line.startswith(("return self.", "raise "))}
    assert len(solution) > 50
    for path in folder.glob("*.py"):
        found = solution & lines_of_code(path.read_text())
        assert not found, f"{path.name} gives away {found}"


# ------------------------------------------------------------------------------------------------ hostile submissions
CORRECT = module("vista")
ESCAPES = {
    "it exits": "import os\nos._exit(0)",
    "it raises SystemExit": "raise SystemExit(0)",
    "it hangs": "while True:\n    pass",
    "it forks": "import os\nfor _ in range(100):\n    os.fork()",
    "it starts threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "it eats memory": "x = [bytearray(1 << 30) for _ in range(64)]",
    "it recurses": "def f(n):\n    return f(n + 1)\nimport sys\nsys.setrecursionlimit(10 ** 8)\nf(0)",
    "it kills the grader": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "it kills everybody": "import os\nos.kill(-1, 9)",
    "it uses the network": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "it reads the solution": f"exec(open({str(ROOT / 'methods/vista.py')!r}).read())",
    "it reads the hidden tests": f"print(open({str(ROOT / 'course/hidden/vista.py')!r}).read())",
    "it imports the solution": f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom methods.vista import alignment_loss",
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
    "it answers with zeros": "import torch\ndef alignment_loss(x, m, S, **k):\n    return 0 * x.sum() + 0 * S.sum(), m.any(1).sum()",
    "it answers with noise": "import torch\ndef alignment_loss(x, m, S, **k):\n    return torch.rand(()).double(), m.any(1).sum()",
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
def worker():
    worker = Worker("vista")
    yield worker
    worker.close()


@pytest.fixture
def earned(key, worker, monkeypatch):
    """A submission's text, and some items → those whose points it gets."""
    monkeypatch.setattr("course.grade.SECONDS", 2)

    def run(text: str, items: list) -> list[str]:
        got = [(parse(worker.run({"vista": text}, item, 1))[0], want, item)
               for item, want in zip(rubric("vista"), key.want) if item in items]
        return [item.__name__ for results, want, item in got if results and agree(results, want, item)]
    return run


def test_a_right_solution_gets_every_point(tmp_path, key):
    (tmp_path / "vista.py").write_text(CORRECT)
    assert sum(s.points for s in grade("vista", tmp_path, key)) == 100


@pytest.mark.parametrize("trick", list(ESCAPES))
def test_what_cannot_be_done_beside_a_right_solution_stops_it(trick, earned):
    """Each trick runs before a right solution: it is refused or ended, and nothing outside is changed."""
    first = rubric("vista")[:1]
    assert earned(ESCAPES[trick] + "\n" + CORRECT, first) == []
    assert not (ROOT / "course/hacked").exists()
    assert earned(CORRECT, first) == ["distance"], "the next submission is graded as ever"


@pytest.mark.parametrize("trick", list(FAKES))
def test_a_fake_earns_nothing(trick, earned):
    items = rubric("vista")
    assert earned(FAKES[trick], items[:1] if "without end" in trick else items) == []


def test_a_link_to_the_solution_is_not_followed(tmp_path, key):
    (tmp_path / "vista.py").symlink_to(ROOT / "methods/vista.py")
    scores = grade("vista", tmp_path, key)
    assert sum(s.points for s in scores) == 0 and "link" in scores[0].feedback


def test_one_item_that_hangs_costs_its_own_points_alone(earned):
    endless = '    if distance == "cosine":\n        while True:\n            pass\n'
    before = "    exact = torch"
    items = [item for item in rubric("vista") if item.__name__ in ("distance", "cosine", "gradients")]
    assert earned(CORRECT.replace(before, endless + before), items) == ["distance", "gradients"]


def test_feedback_names_the_mistake_and_never_shows_a_tensor(tmp_path, key):
    (tmp_path / "vista.py").write_text(CORRECT.replace("# 1..m", "- 1"))
    lost = [s for s in grade("vista", tmp_path, key) if s.feedback]
    assert [s.item for s in lost][:1] == ["weights"] and "counts from 1" in lost[0].feedback
    assert not any("tensor(" in s.feedback or "\n" in s.feedback for s in lost)
