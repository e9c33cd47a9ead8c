"""Cut an assignment out of the project's own files: bodies are removed, nothing is kept twice."""
import ast
import re
import zipfile
from pathlib import Path

from common.files import new_folder, read_json
from common.flags import UserError
from course.hidden import rubric

ROOT = Path(__file__).resolve().parent.parent
TABLE = read_json(ROOT / "course/assignments.json")             # it explains its fields
ASSIGNMENTS, MODULES = TABLE["assignments"], TABLE["modules"]


def find(name: str) -> dict:
    if name not in ASSIGNMENTS:
        raise UserError(f"there is no assignment {name!r}: {', '.join(ASSIGNMENTS)} are there")
    return ASSIGNMENTS[name]


def names_in(node: ast.AST) -> tuple[set[str], set[str]]:
    """What a statement defines, and what it reads. Arguments count: those of tests are fixtures."""
    nodes = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    own = {n.id for n in nodes if isinstance(n.ctx, ast.Store)}
    used = {n.id for n in nodes} - own | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        own = {node.name}
    return own, used


def cut(source: str, keep: list[str] = (), drop: list[str] = ()) -> str:
    """Source with `keep` (empty: all) and what that uses, without `drop`; imports of one folder."""
    tree, lines, kept = ast.parse(source), source.splitlines(), []
    about = {node: names_in(node) for node in tree.body}
    names = set(keep) or set().union(*(own for own, _ in about.values()))       # that are needed
    names.update(*(read for node, (_, read) in about.items() if isinstance(node, ast.Expr)))
    while more := [node for node in tree.body if node not in kept and about[node][0] & names]:
        kept += more
        names = names.union(*(about[node][1] for node in more))
    if missing := set(keep).difference(*(about[node][0] for node in kept)):
        raise UserError(f"no file defines {missing}, which course/assignments.json names: mend it")
    out, end = [], 0
    for node in tree.body:
        start = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])]) - 1
        above, end = lines[end:start], node.end_lineno
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node.names = [a for a in node.names if (a.asname or a.name).split(".")[0] in names]
            if node.names:
                text = re.sub(r"^from (methods|common) import", "import", ast.unparse(node))
                out += [line for line in above if not line.strip()]
                out.append(re.sub(r"^from (methods|common)\.", "from ", text))
        elif isinstance(node, ast.Expr) or node in kept and not about[node][0] & set(drop):
            out += above + lines[start:end]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(out).strip()) + "\n"


def stub(source: str, functions: list[str]) -> str:
    """Replace what these functions and methods do; signature and docstring stay."""
    lines, tree = source.splitlines(), ast.parse(source)
    found = {getattr(node, "name", ""): node for node in tree.body}
    for c in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        found |= {f"{c.name}.{getattr(node, 'name', '')}": node for node in c.body}
    for name in found.keys() & set(functions):
        node = found[name]
        start = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        while lines[start - 1].strip().startswith("#"):
            start -= 1
        text = f"{name} is yours to write. Take your time: handout.md explains it step by step."
        lines[start] = " " * (node.col_offset + 4) + f'raise NotImplementedError("{text}")'
        lines[start + 1:node.end_lineno] = [None] * (node.end_lineno - start - 1)
    return "\n".join(line for line in lines if line is not None) + "\n"


def module(name: str, source: str | None = None) -> str:
    """The text of a module with its solution. source: another text of the project's file."""
    return cut(source or (ROOT / MODULES[name]["file"]).read_text("utf-8"), MODULES[name]["keep"])


def handed_out(name: str) -> str:
    """The text of a module without anything that any assignment asks for."""
    return stub(cut(module(name), drop=MODULES[name]["private"]), MODULES[name]["write"])


def make(name: str, out: Path) -> None:
    """Write one assignment to a new folder."""
    a, files = find(name), {}
    files["test_public.py"] = "\n\n".join(
        cut((ROOT / "tests" / path).read_text("utf-8"), names) for path, names in a["tests"].items())
    imports = re.findall(r"^from adapters import (.*)$", files["test_public.py"], re.M)
    if imports:
        adapters = re.findall(r"\w+", " ".join(imports))
        files["adapters.py"] = cut((ROOT / "tests/adapters.py").read_text("utf-8"), adapters)
    files |= {f"{m}.py": handed_out(m) for m in a["write"] + a["given"]}
    files |= {Path(path).name: (ROOT / path).read_text("utf-8") for path in a["files"]}
    readme, handout = ((ROOT / f"course/handouts/{n}.md").read_text("utf-8") for n in ("README", name))
    readme = readme.replace("FILES", " ".join(f"{m}.py" for m in a["write"]))
    files["README.md"] = readme.replace("TITLE", a["title"])
    points = [f"| {item.__name__.replace('_', ' ')} | {item.points} |" for item in rubric(name)]
    files["handout.md"] = handout.replace("POINTS", "\n".join(points))
    with new_folder(out) as folder:
        for file, text in files.items():
            (folder / file).write_text(text, "utf-8")


def make_all(out: Path) -> None:
    """Write the semester: every assignment and the capstone."""
    with new_folder(out) as semester:
        for number, name in enumerate(ASSIGNMENTS, 1):
            make(name, semester / f"{number}-{name}")
        capstone = semester / f"{len(ASSIGNMENTS) + 1}-capstone"
        capstone.mkdir()
        (capstone / "handout.md").write_text((ROOT / "course/handouts/capstone.md").read_text("utf-8"), "utf-8")


def gradescope(name: str, out: Path, seed: int) -> None:
    """Write the zip that Gradescope takes: all that the grader reads, and two scripts."""
    paths = [*(ROOT / "course").rglob("*.*"), *(ROOT / "common").rglob("*.py")]
    paths += [ROOT / path for path in [m["file"] for m in MODULES.values()] + find(name)["files"]]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for path in sorted(path for path in set(paths) if path.suffix != ".pyc"):
            z.write(path, path.relative_to(ROOT))
        for path in sorted((ROOT / "course/gradescope").iterdir()):
            z.writestr(path.name, path.read_text("utf-8").replace("NAME", name).replace("SEED", str(seed)))
