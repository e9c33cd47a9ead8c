"""README and docs/ do not drift: their commands run, and their tables name what is there.

A failing test says which row or line to change."""
import inspect
import json
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import make_benchmarks
import pytest
from conftest import ROOT, call, launch
from PIL import Image
from test_losses import example
from test_model import tiny

from losses import LOSSES, Objective
from toy import world
from training.settings import TrainConfig

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
WIDTH = 120
LINES_OFF = 10                  # a line count in README may be this far from the file


def commands_of(page: Path) -> list[str]:
    """Return the command lines of a page, from its ```sh blocks."""
    lines = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
        lines += block.strip().splitlines()
    return lines


def rows_under(header: str) -> str:
    """Return the rows of the first table with this header."""
    assert header in TEXT, f"no page has a table with the header {header}"
    return TEXT.split(header)[1].split("\n\n")[0]


# ----------------------------------------------------------------------------------------- commands
def small_toy() -> None:
    """Let the toy draw 64 pictures, 6 per question file."""
    small = {"images": 64, "conversations": 1, "scenes": 6}
    defaults = [p for p in inspect.signature(world.make).parameters.values()
                if p.default is not p.empty]
    world.make.__defaults__ = tuple(small.get(p.name, p.default) for p in defaults)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository as a user has it, with a small
    world and the folders that the pages' commands name."""
    clone = tmp_path_factory.mktemp("clone") / "nanoalign"
    shutil.copytree(ROOT, clone,
                    ignore=shutil.ignore_patterns(".*", "out", "__pycache__", "fixtures"))
    world.make(clone / "data/world", seed=1, images=64, conversations=1, scenes=6)
    for name, folder in [("clip-vit-large-patch14-336", "clip"), ("vicuna-7b-v1.5", "llm")]:
        shutil.copytree(clone / "toy" / folder, clone / "weights" / name)
    shutil.copytree(clone / "data/world/images", clone / "data/558k")
    shutil.copyfile(clone / "data/world/pretrain.json", clone / "data/blip_laion_cc_sbu_558k.json")
    samples = json.loads((clone / "data/world/finetune.json").read_text())
    for s in samples:
        s["image"] = "world/images/" + s["image"]
    samples.append({"id": "text",
                    "conversations": [{"from": "human", "value": "Hi"},
                                      {"from": "gpt", "value": "Ho"}]})
    (clone / "data/llava_v1_5_mix665k.json").write_text(json.dumps(samples))
    Image.new("RGB", (60, 40)).save(clone / "data/one.jpg")
    (clone / "questions.jsonl").write_text('{"image": "one.jpg", "text": "Is there a circle?", "answer": "No"}\n')
    make_benchmarks.pope(clone / "eval/pope")
    (clone / "texts").mkdir()
    for n in range(4):
        make_benchmarks.picture(clone / f"photos/{n}.jpg", n)
        (clone / f"texts/{n}.story").write_text("A cat sat on a mat.\n\n@highlight\n\nA cat.")
    return clone


def play(line: str, clone: Path) -> None:
    """Run a command as printed, except: two steps instead
    of all, two processes instead of eight, a small toy."""
    words, ranks = shlex.split(line), 1
    if words[0] in ("pip", "pytest"):
        assert line in (ROOT / ".ci" / "run").read_text().replace("--quiet ", ""), f".ci/run does not run `{line}`"
        return
    if words[0] == "torchrun":
        words, ranks = [w for w in words if not w.startswith("--nproc_per_node")], 2
    if "train.py" in words:
        words += ["--max-steps", "2"]
    done = launch(*words[1:], ranks=ranks, cwd=clone, set_up=small_toy)
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert done.stdout.strip(), f"{line} printed nothing"


@pytest.fixture(scope="module")
def played(clone) -> Path:
    """The clone after every command of README, in the order of the page."""
    lines = commands_of(README)
    assert len(lines) > 5
    for line in lines:
        play(line, clone)
    return clone


@pytest.mark.slow
def test_every_command_of_readme_runs_in_the_order_of_the_page(played):
    results = json.loads((played / "out/toy/results.json").read_text())
    assert {"existence", "adversarial", "count", "colour"} < results["accuracy"]["test"].keys()
    assert results["mir"]["pretrain"] and results["mir"]["finetune"] and Path(results["checkpoint"]).name
    assert (played / "out/finetune" / "finetune-2").is_dir()
    assert '"right":' in (played / "out/toy/report.html").read_text()
    assert (played / "out/finetune/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_every_command_of_docs_runs_after_those_of_readme(page, played):
    for line in commands_of(page):
        play(line, played)


# -------------------------------------------------------------------------------- what README lists
def line_counts(text: str) -> dict[str, int]:
    """Return file → lines, as a tree, a table or a sentence gives them:

        methods/                  one paper a file
          ce.py          82       cross-entropy
        | model.py | the model | 450 |
        `model.py` has 450 lines
    """
    found, folder = {}, ""
    for line in text.splitlines():
        if room := re.match(r"(\w+/)\s", line):
            folder = room[1]
        elif row := re.match(r"(\s*)([\w/]+\.(?:py|md))\s+(\d+)\s", line):
            found[(folder if row[1] else "") + row[2]] = int(row[3])
        elif row := re.match(r"\| `?([\w/]+\.(?:py|md))`? \|.*\| (\d+) \|$", line):
            found[row[1]] = int(row[2])
        else:
            found |= {name: int(n) for name, n in re.findall(r"`([\w/]+\.py)`[^`\n]*? (\d+) lines",
                                                             line)}
    return found


def test_a_tree_a_table_and_a_sentence_give_line_counts():
    text = ("model.py   450  the model\nmethods/        one paper a file\n  ce.py  82  "
            "cross-entropy\n| methods/vdep.py | VDEP | 50 |\nThe loop in `train.py` has 249 lines.")
    assert line_counts(text) == {"model.py": 450, "methods/ce.py": 82, "methods/vdep.py": 50,
                                 "train.py": 249}


def test_readme_lists_the_files_of_the_story_with_their_lengths():
    listed = line_counts(README.read_text())
    story = [*ROOT.glob("*.py"), *(ROOT / "methods").glob("[!_]*.py")]
    for name in sorted(str(path.relative_to(ROOT)) for path in story):
        lines = len((ROOT / name).read_text().splitlines())
        assert name in listed, f"README's tree lacks this line: `{name}   {lines}   what it is`"
        assert abs(listed[name] - lines) <= LINES_OFF, f"README says {listed[name]} lines of {name}; write {lines}"
    for name in listed:
        assert (ROOT / name).is_file(), f"README lists {name}, which does not exist: take the line out"


def test_readme_lists_every_room():
    ignored = shutil.ignore_patterns(".*", "__pycache__", "out", "data", "weights", "eval")
    names = [path.name for path in ROOT.iterdir() if path.is_dir()]
    for name in sorted(set(names) - ignored(str(ROOT), names)):
        assert re.search(rf"^{name}/\s+\S", README.read_text(), re.M), f"README's tree lacks: `{name}/   what it holds`"


def test_every_equation_leads_to_code_and_to_a_test():
    rows = re.findall(r"^\| .*? \| (\([^|]*?) \| (\S+) `(\w+)` \| (\S+) `(\w+)` \|$", TEXT, re.M)
    assert len(rows) >= 4
    for equations, file, function, test_file, test in rows:
        assert (ROOT / file).is_file(), f"the row of `{function}` names {file}, which does not exist"
        code = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {function}[(:]", code, re.M), f"{file} has no {function}: correct its row"
        for number in re.findall(r"\(\d+\)", equations):
            assert re.search(rf"# eq\. [^\n]*{re.escape(number)}", code), f"no line of {file} carries # eq. {number}"
        found = re.search(rf"^def {test}\(", (ROOT / test_file).read_text(), re.M)
        assert found, f"{test_file} has no {test}: correct the row of {file} `{function}`"


# --------------------------------------------------------------------------------------- objectives
def test_every_objective_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", rows_under("| `--loss` |"), re.M)
    for loss in LOSSES:
        assert loss in rows, f"add to README's table of objectives: | `{loss}` | what it adds | stages | file |"
    for row in rows:
        assert row in LOSSES, f"README has a row of the objective `{row}`, which losses.py does not have"


def test_every_term_that_is_logged_has_a_row_and_nothing_else():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", rows_under("| term | of |"), re.M))
    logged = {}
    for loss in LOSSES:
        for term in Objective(tiny(), TrainConfig(loss=loss, stage="pretrain"))(example()):
            logged.setdefault(term.name, []).append(loss)
    for name, losses in logged.items():
        of = "all" if len(losses) == len(LOSSES) else ", ".join(f"`{loss}`" for loss in losses)
        assert name in rows, f"add to the table of terms: | `{name}` | {of} | what it is | a healthy curve |"
        assert rows[name].startswith(of), f"the term `{name}` is of {of}; its row says {rows[name]}"
    for name in rows:
        assert name in logged, f"the table of terms has a row of `{name}`, which no objective logs: take it out"


def test_every_flag_of_an_objective_has_a_row():
    rows = rows_under("| flag | default | meaning |")
    for field in fields(TrainConfig):
        if field.name.split("_")[0] in LOSSES:
            flag = "--" + field.name.replace("_", "-")
            assert f"`{flag}`" in rows, f"add to the table of flags: | `{flag}` | {field.default} | what it does |"


def test_every_field_of_the_log_has_a_row(trained):
    rows = rows_under("| field | meaning |")
    terms = {name for loss in LOSSES.values() for name in loss.counts}
    for line in (trained["finetune"] / "metrics.jsonl").open():
        for name in json.loads(line):
            assert name in terms or f"`{name}`" in rows, f"add to the table of the log: | `{name}` | what it is |"


# -------------------------------------------------------------------------------------------- names
def test_every_flag_that_a_page_names_exists():
    known = ""
    for program in ("train.py", "evaluate.py", "mir.py"):
        known += call(program, "--help").stdout
    for part in ("check", "export"):
        known += call("hub", part, "--help").stdout
    known += call("look", "--help").stdout
    for flag in sorted(set(re.findall(r"`(--[a-z0-9-]+)", TEXT))):
        assert re.search(rf"{flag}\b(?!-)", known), f"a page names {flag}, which no program has"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_that_a_page_names_exists(page):
    text = page.read_text()
    for name in re.findall(r"`((?:tests|runs|bench|toy|methods|hub|common|training|evaluation)/[\w./]+)`", text):
        assert (ROOT / name).exists(), f"{page.name} names {name}, which does not exist"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}, which does not exist"
    for name in re.findall(r"`python ((?:runs|bench)/\w+)\.py", text):
        pytest.fail(f"{page.name}: write `python -m {name.replace('/', '.')}`; as a file it does "
                    "not find the modules")
    for name in re.findall(r"`python -m ((?:tests|runs|bench)\.\w+)", text):
        assert (ROOT / (name.replace(".", "/") + ".py")).is_file(), f"{page.name} names {name}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_of_prose_are_at_most_120_characters_wide(page):
    prose = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), page.read_text(),
                   flags=re.S)
    for number, line in enumerate(prose.splitlines(), 1):
        assert len(line) <= WIDTH or line.startswith("|"), f"{page.name}:{number} has {len(line)} characters: wrap it"
