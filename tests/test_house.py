"""The rules of the tree: which room imports which, how long files and functions are, how wide lines are.

    common ← methods ← model         {hub, data, methods} ← mir        {hub, data, losses, mir} ← training
    common ← data                    {model, data} ← evaluation        {evaluate, mir} ← look ← toy
    {model, data, methods} ← losses  {hub, evaluation} ← evaluate      all of them ← train
    {model, data} ← hub              common ← course

A room is a folder, or one of the six files on top. A
file may import what lies below its room, at any depth.
"""
import ast
from pathlib import Path

import pytest
from conftest import ROOT

BELOW = {
    "common": [], "methods": ["common"], "data": ["common"], "model": ["methods"],
    "losses": ["model", "data", "methods"], "hub": ["model", "data"],
    "evaluation": ["model", "data"], "mir": ["hub", "data", "methods"],
    "evaluate": ["hub", "evaluation"], "look": ["evaluate", "mir"], "toy": ["look"],
    "training": ["hub", "data", "losses", "mir"], "train": ["toy", "training"],
    "course": ["common"]}
SIX = {"model": 450, "losses": 120, "data": 360, "train": 320, "evaluate": 320,
       "mir": 340}  # file: lines at most
FOLDERS = [room for room in BELOW if room not in SIX]
README_LINES, FUNCTION_LINES, WIDTH, USUAL_WIDTH, WIDE_SHARE = 180, 50, 120, 100, 0.05
LONG_ON_PURPOSE = {("train.py", "train")}                # the loop is read from top to bottom

# Every file of the product by its module name: "model", "hub.tensors", "hub" for hub/__init__.py.
FILES = {room: ROOT / f"{room}.py" for room in SIX}
for folder in FOLDERS:
    for path in sorted((ROOT / folder).glob("*.py")):
        FILES[folder if path.stem == "__init__" else f"{folder}.{path.stem}"] = path


def room_of(module: str) -> str:
    return module.split(".")[0]


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Return (module, line) of everything that a file
    imports from this repository, also inside functions."""
    ours = {p.name if p.is_dir() else p.stem for p in ROOT.iterdir() if p.is_dir()
            or p.suffix == ".py"}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(name.name, node.lineno) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            assert node.level == 0, f"{where} imports with dots: write the full name, as `from hub.tensors import …`"
            # `from hub import tensors` means the file hub/tensors.py
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                found.append((inner if inner in FILES else node.module, node.lineno))
    return sorted({(module, line) for module, line in found if room_of(module) in ours})


def all_below(room: str) -> set[str]:
    """Return every room that lies below this one, at any depth."""
    found = set()
    for lower in BELOW[room]:
        found |= {lower} | all_below(lower)
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of one circle, its first node again
    at the end; an empty list if there is no circle."""
    done = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node):] + [node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return []

    for node in sorted(graph):
        if found := visit(node, []):
            return found
    return []


# ------------------------------------------------------------------------------------------- arrows
@pytest.mark.parametrize("room", BELOW)
def test_imports_run_downwards_only(room):
    wrong = []
    for module, path in FILES.items():
        if room_of(module) != room:
            continue
        for target, line in imports_of(path):
            if room_of(target) != room and room_of(target) not in all_below(room):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    may = ", ".join(sorted(all_below(room))) or "nothing of this repository"
    assert not wrong, (f"{room} lies below what it imports: " + "; ".join(wrong)
                       + f". It may import {may}. Move the code down to where both can reach it, "
                         "or pass it in")


def test_no_files_and_no_rooms_import_each_other_in_a_circle():
    files = {module: set() for module in FILES}
    rooms = {room: set() for room in BELOW}
    for module, path in FILES.items():
        for target, _ in imports_of(path):
            files[module].add(target)
            if room_of(target) != room_of(module):
                rooms[room_of(module)].add(room_of(target))
    for kind, graph in [("files", files), ("rooms", rooms)]:
        found = " → ".join(circle(graph))
        assert not found, f"these {kind} import each other in a circle: {found}. Move what both need into a lower file"


def test_two_files_that_import_a_third_one_are_no_circle():
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_every_room_says_in_one_line_what_it_is():
    for folder in FOLDERS:
        path = ROOT / folder / "__init__.py"
        assert path.is_file(), f"{folder}/ has no __init__.py: add one, with a one-line docstring of what it holds"
        lines = path.read_text().splitlines()
        assert len(lines) == 1 and ast.get_docstring(ast.parse(lines[0])), (
            f"{folder}/__init__.py must be a docstring of one line; it has {len(lines)} lines")


# -------------------------------------------------------------------------------------------- sizes
def test_six_files_lie_on_top():
    there = {path.stem for path in ROOT.glob("*.py")}
    assert there == SIX.keys(), (f"new on top: {sorted(there - SIX.keys())}, missing: {sorted(SIX.keys() - there)}. "
                                 "Six files tell the story; everything else lives in a room")


@pytest.mark.parametrize("name", [*(f"{file}.py" for file in SIX), "README.md"])
def test_the_story_stays_short(name):
    most = SIX.get(name.removesuffix(".py"), README_LINES)
    lines = len((ROOT / name).read_text().splitlines())
    assert lines <= most, f"{name} has {lines} lines; at most {most}. Move what a newcomer need not read into a room"


def test_look_stays_short():
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "look").glob("*.py"))
    assert lines <= 450, f"look/ has {lines} lines of Python; at most 450"


def test_a_function_fits_on_a_screen():
    wrong = []
    for path in FILES.values():
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (name, node.name) not in LONG_ON_PURPOSE:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    wrong.append(f"{name}:{node.lineno} {node.name} ({lines} lines)")
    assert not wrong, f"over {FUNCTION_LINES} lines: {'; '.join(wrong)}. Give a part of each a name of its own"


def test_every_text_file_is_read_and_written_as_utf8():
    """Without an encoding Python takes the machine's: é in a sample would be lost on some."""
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            text = name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute)
            text |= name == "open" and isinstance(node.func, ast.Name) and not any("b" in w for w in words)
            named = "utf-8" in words or any(k.arg == "encoding" for k in node.keywords)
            assert named or not text, f"{path.relative_to(ROOT)}:{node.lineno}: say encoding=\"utf-8\""


def test_lines_are_rarely_wider_than_100_characters_and_never_than_120():
    total, wide, too_wide, by_file = 0, 0, [], {}
    everything = [path for place in ("*.py", "*/*.py", "course/*/*.py") for path in ROOT.glob(place)]
    for path in everything:
        name, lines = str(path.relative_to(ROOT)), path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            if len(line) > WIDTH and not name.startswith("course/mutants/"):
                too_wide.append(f"{name}:{number} ({len(line)})")
        by_file[name] = sum(len(line) > USUAL_WIDTH for line in lines)
        wide += by_file[name]
        total += len(lines)
    assert not too_wide, f"wider than {WIDTH} characters: {', '.join(too_wide)}"
    worst = sorted(by_file, key=by_file.get, reverse=True)[:8]
    listed = ", ".join(f"{name} {by_file[name]}" for name in worst)
    assert wide <= WIDE_SHARE * total, (f"{wide} of {total} lines ({wide / total:.1%}) are wider than {USUAL_WIDTH} "
                                        f"characters; at most {WIDE_SHARE:.0%}. Most are in: {listed}")
