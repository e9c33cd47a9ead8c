"""Cut an assignment out of the project: the real files with bodies removed, and public tests.

Nothing is kept twice: solutions, docstrings and public tests are read from the project's files.
"""
import ast
import re
import shutil
from pathlib import Path

from common.files import new_folder, read_json
from common.flags import UserError
from course.hidden import rubric

ROOT = Path(__file__).resolve().parent.parent
TABLE = read_json(ROOT / "course/assignments.json")             # it explains its fields
ASSIGNMENTS, MODULES = TABLE["assignments"], TABLE["modules"]


def defined(node: ast.stmt) -> set[str]:
    """Names that a statement of a module defines, imports aside."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        return {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return set()


def used(node: ast.AST) -> set[str]:
    """Names that a statement reads and does not set, and its arguments: in tests, fixtures."""
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    return {n.id for n in names} - own | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def cut(source: str, keep: list[str] = (), drop: list[str] = ()) -> str:
    """Source with only the definitions of `keep` and what they use (empty: all), without `drop`,
    and the imports that they all use. Comments above a definition stay with it."""
    tree, lines = ast.parse(source), source.splitlines()
    names = set(keep) or set().union(*map(defined, tree.body))
    kept = []
    while more := [node for node in tree.body if node not in kept and defined(node) & names]:
        kept += more
        names = names.union(*map(used, more))
    missing = set(keep).difference(*map(defined, kept))
    if missing:
        raise UserError(f"no file defines {missing}, which course/assignments.json names: mend it")
    out, end = [], 0
    for node in tree.body:
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        above, end = lines[end:start], node.end_lineno
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [a for a in node.names if (a.asname or a.name).split(".")[0] in names]
            if node.names:
                out += [line for line in above if not line.strip()] + [ast.unparse(node)]
        elif isinstance(node, ast.Expr) or node in kept and not defined(node) & set(drop):
            out += above + lines[start:end]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(out).strip()) + "\n"


def stub(source: str, functions: list[str]) -> str:
    """Replace what these functions and methods do; signature and docstring stay."""
    lines, tree = source.splitlines(), ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    owned = [("", node) for node in tree.body] + [(f"{c.name}.", n) for c in classes for n in c.body]
    for prefix, node in owned:
        name = prefix + getattr(node, "name", "")
        if name not in functions:
            continue
        start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        while lines[start - 1].strip().startswith("#"):
            start -= 1
        text = f"{name} is yours to write. Take your time: handout.md explains it step by step."
        lines[start] = " " * (node.col_offset + 4) + f'raise NotImplementedError("{text}")'
        lines[start + 1:node.end_lineno] = [None] * (node.end_lineno - start - 1)
    return "\n".join(line for line in lines if line is not None) + "\n"


def flat(source: str) -> str:
    """Imports of the project's folders → imports of modules that lie side by side."""
    source = re.sub(r"^from (?:methods|common) import", "import", source, flags=re.M)
    return re.sub(r"^from (?:methods|common)\.(\w+) import", r"from \1 import", source, flags=re.M)


def module(name: str, source: str | None = None) -> str:
    """The text of a module with its solution. source: another text of the project's file."""
    m = MODULES[name]
    return flat(cut(source or (ROOT / m["file"]).read_text(), m["keep"]))


def handed_out(name: str) -> str:
    """The text of a module without anything that any assignment asks for."""
    return stub(cut(module(name), drop=MODULES[name]["private"]), MODULES[name]["write"])


def find(name: str) -> dict:
    if name not in ASSIGNMENTS:
        raise UserError(f"there is no assignment {name!r}: {', '.join(ASSIGNMENTS)} are there")
    return ASSIGNMENTS[name]


def make(name: str, out: Path) -> None:
    """Write one assignment to a new folder."""
    a = find(name)
    with new_folder(out) as folder:
        write_assignment(name, a, folder)


def write_assignment(name: str, a: dict, out: Path) -> None:
    for m in a["write"] + a["given"]:
        (out / f"{m}.py").write_text(handed_out(m))
    for path in a["files"]:
        shutil.copyfile(ROOT / path, out / Path(path).name)
    tests = [cut((ROOT / "tests" / path).read_text(), names) for path, names in a["tests"].items()]
    (out / "test_public.py").write_text("\n\n".join(tests))
    adapters = re.findall(r"^from adapters import (.*)$", "\n".join(tests), re.M)
    if adapters:
        names = re.findall(r"\w+", " ".join(adapters))
        (out / "adapters.py").write_text(flat(cut((ROOT / "tests/adapters.py").read_text(), names)))
    texts = ROOT / "course/handouts"
    points = [f"| {item.__name__.replace('_', ' ')} | {item.points} |" for item in rubric(name)]
    (out / "handout.md").write_text((texts / f"{name}.md").read_text() + "\n".join(
        ["\n## Points", "| hidden tests of | points |", "|---|---|", *points]) + "\n")
    files = " ".join(f"{m}.py" for m in a["write"])
    readme = (texts / "README.md").read_text().replace("TITLE", a["title"]).replace("FILES", files)
    (out / "README.md").write_text(readme)
