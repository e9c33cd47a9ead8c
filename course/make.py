"""Cut an assignment out of the project: the real files with bodies removed, what they need, and public tests.

Nothing is kept twice: solutions, docstrings, symbol tables and public tests are read from the project's own files.
"""
import ast
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from common.files import new_folder, read_json, refuse_existing
from common.flags import UserError
from course.hidden import rubric

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Assignment:
    title: str
    write: list[str]                        # modules with functions to write; a student hands in these files
    given: list[str] = field(default_factory=list)                  # modules that those import
    tests: dict[str, list[str]] = field(default_factory=dict)       # file of tests/ → public tests
    files: list[str] = field(default_factory=list)                  # copied as they are


@dataclass(frozen=True)
class Module:
    """A file of the project, as it lies flat in a folder."""
    file: str
    keep: list[str] = field(default_factory=list)                   # only these definitions and what they use
    write: list[str] = field(default_factory=list)                  # students write these, in whatever folder it lies
    private: list[str] = field(default_factory=list)                # parts of the solution, left out


TABLE = read_json(ROOT / "course/assignments.json")
ASSIGNMENTS = {name: Assignment(**a) for name, a in TABLE["assignments"].items()}
MODULES = {name: Module(**m) for name, m in TABLE["modules"].items()}


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Top-level names of a module → the statement that defines them; imports are left out."""
    found = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in ast.walk(node.targets[0] if isinstance(node, ast.Assign) else node.target):
                if isinstance(target, ast.Name):
                    found[target.id] = node
    return found


def names_in(node: ast.AST) -> set[str]:
    """Names that a piece of code reads and does not set itself, and its arguments: in tests these are fixtures."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return {n.id for n in names} - own | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def reachable(tree: ast.Module, wanted: list[str]) -> set[ast.stmt]:
    """The statements that define `wanted`, and all that these use."""
    defined, todo, kept = definitions(tree), list(wanted), set()
    while todo:
        name = todo.pop()
        if name in defined and defined[name] not in kept:
            kept.add(defined[name])
            todo += names_in(defined[name])
    missing = [name for name in wanted if name not in defined]
    if missing:
        raise UserError(f"course/assignments.json names {', '.join(missing)}, which its file does not define: mend it")
    return kept


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])


def cut(source: str, keep: list[str] = (), drop: list[str] = ()) -> str:
    """Source with only the definitions of `keep` and what they use (empty: all), without `drop`, and the imports that
    they all use. Comments above a definition stay with it."""
    tree = ast.parse(source)
    lines = source.splitlines()
    defined = definitions(tree)
    kept = reachable(tree, list(keep) or list(defined))
    used = set().union(*map(names_in, kept))
    kept -= {defined[name] for name in drop}
    out, end = [], 0
    for node in tree.body:
        start = first_line(node) - 1
        above, end = lines[end:start], node.end_lineno
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a for a in node.names if (a.asname or a.name).split(".")[0] in used]
            if names:
                node.names = names
                out += [*[x for x in above if not x.strip()], ast.unparse(node)]
        elif node in kept or isinstance(node, ast.Expr):
            out += above + lines[start:end]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(out).strip()) + "\n"


def flat(source: str) -> str:
    """Imports of the project's folders → imports of modules that lie side by side."""
    source = re.sub(r"^from (?:methods|common) import", "import", source, flags=re.M)
    return re.sub(r"^from (?:methods|common)\.(\w+) import", r"from \1 import", source, flags=re.M)


def stub(source: str, functions: list[str]) -> str:
    """Replace what these functions do; signature and docstring stay."""
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        for inner in [node, *getattr(node, "body", [])]:
            if isinstance(inner, ast.FunctionDef):
                name = inner.name if inner is node else f"{node.name}.{inner.name}"
                found[name] = inner
    for name in sorted(set(functions) & set(found), key=lambda n: -found[n].lineno):
        node = found[name]
        start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        while lines[start - 1].strip().startswith("#"):
            start -= 1
        lines[start:node.end_lineno] = [" " * (node.col_offset + 4) + f'raise NotImplementedError("{name} is yours to '
                                        'write. Take your time: handout.md explains it step by step.")']
    return "\n".join(lines) + "\n"


def module(name: str, source: str | None = None) -> str:
    """The text of a module with its solution, as it lies in a folder. source: another text of the project's file."""
    m = MODULES[name]
    return flat(cut(source or (ROOT / m.file).read_text(), m.keep))


def handed_out(name: str) -> str:
    """The text of a module without anything that any assignment asks for."""
    return stub(cut(module(name), drop=MODULES[name].private), MODULES[name].write)


def find(name: str) -> Assignment:
    if name not in ASSIGNMENTS:
        raise UserError(f"there is no assignment {name!r}: {', '.join(ASSIGNMENTS)} are there")
    return ASSIGNMENTS[name]


def make(name: str, out: Path) -> None:
    """Write one assignment to a new folder."""
    refuse_existing(out)
    with new_folder(out) as folder:
        write_assignment(name, find(name), folder)


def write_assignment(name: str, a: Assignment, out: Path) -> None:
    for m in a.write + a.given:
        (out / f"{m}.py").write_text(handed_out(m))
    tests = []
    for path, names in a.tests.items():
        tests.append(cut((ROOT / "tests" / path).read_text(), names))
    (out / "test_public.py").write_text("\n\n".join(tests))
    adapters = set(re.findall(r"\w+", " ".join(re.findall(r"^from adapters import (.*)$", "\n".join(tests), re.M))))
    if adapters:
        (out / "adapters.py").write_text(flat(cut((ROOT / "tests/adapters.py").read_text(), sorted(adapters))))
    for path in a.files:
        shutil.copyfile(ROOT / path, out / Path(path).name)
    points = [f"| {item.__name__.replace('_', ' ')} | {item.points} |" for item in rubric(name)]
    (out / "handout.md").write_text((ROOT / "course/handouts" / f"{name}.md").read_text() + "\n".join([
        "\n## Points", "| hidden tests of | points |", "|---|---|", *points]) + "\n")
    hand_in = " ".join(f"{m}.py" for m in a.write)
    (out / "README.md").write_text(f"""# {a.title}
Read handout.md. Write the functions of {hand_in} that raise NotImplementedError; leave the other files as they are.

```sh
pip install torch pytest
pytest -q test_public.py
zip answer.zip {hand_in}
```

The first command installs what you need, the second runs the public tests, the third packs what you hand in.
""")


def capstone(out: Path) -> None:
    """The last assignment: the whole project, and a page."""
    out.mkdir(parents=True)
    shutil.copyfile(ROOT / "course/handouts/capstone.md", out / "handout.md")
