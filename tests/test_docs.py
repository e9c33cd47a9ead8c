"""README does not drift: its commands run, its files and line counts are there, its table leads to code and tests."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import make_benchmarks
import pytest
from conftest import ROOT
from PIL import Image
from test_losses import example
from test_model import tiny

from losses import LOSSES, Objective
from training.settings import TrainConfig

README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.strip().splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository as a user has it, with a small world and the folders that README's commands name."""
    clone = tmp_path_factory.mktemp("clone") / "nanoalign"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "out", "__pycache__"))
    world = clone / "toy" / "world.py"
    text = world.read_text()
    small = re.sub(r"images=\d+, conversations=\d+, scenes=\d+", "images=64, conversations=1, scenes=6", text)
    assert small != text
    world.write_text(small)
    subprocess.run([sys.executable, "toy/world.py", "--out", "data/world", "--seed", "1"], cwd=clone, check=True)
    (clone / "weights").mkdir()
    for name, folder in [("clip-vit-large-patch14-336", "clip"), ("vicuna-7b-v1.5", "llm")]:
        shutil.copytree(clone / "toy" / folder, clone / "weights" / name)
    shutil.copytree(clone / "data/world/images", clone / "data/558k")
    shutil.copyfile(clone / "data/world/pretrain.json", clone / "data/blip_laion_cc_sbu_558k.json")
    samples = json.loads((clone / "data/world/finetune.json").read_text())
    for s in samples:
        s["image"] = "world/images/" + s["image"]
    samples.append({"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]})
    (clone / "data/llava_v1_5_mix665k.json").write_text(json.dumps(samples))
    Image.new("RGB", (60, 40)).save(clone / "data/one.jpg")
    make_benchmarks.pope(clone / "eval/pope")
    make_benchmarks.vqav2(clone / "eval/vqav2")
    for n in range(4):
        make_benchmarks.picture(clone / f"photos/{n}.jpg", n)
        (clone / "texts").mkdir(exist_ok=True)
        (clone / f"texts/{n}.story").write_text("A cat sat on a mat.\n\n@highlight\n\nA cat.")
    (clone / "questions.jsonl").write_text('{"image": "one.jpg", "text": "Is there a circle?", "answer": "No"}\n')
    return clone


def test_every_command_runs_in_the_order_of_the_page(clone):
    """As printed, but for: two steps instead of all, two processes instead of eight, the python of this test."""
    ran = []
    for line in COMMANDS:
        command = shlex.split(line)
        if command[0] in ("pip", "pytest"):            # .ci/run runs these two
            assert line in (ROOT / ".ci" / "run").read_text().replace("--quiet ", "")
            continue
        short = ["--max-steps", "2"] if "train.py" in command else []
        if command[0] == "torchrun":
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            command = [sys.executable, *start, *command[2:]]
        command[0] = sys.executable
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([*command, *short], cwd=clone, capture_output=True, text=True, env=env, timeout=120)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert done.stdout.strip(), f"{line} printed nothing"
        ran.append(line)
    assert len(ran) > 5
    results = json.loads((clone / "out/toy/results.json").read_text())
    assert {"existence", "adversarial", "count", "colour"} < results["accuracy"]["test"].keys()
    assert results["mir"]["pretrain"] and results["mir"]["finetune"] and Path(results["checkpoint"]).name
    assert (clone / "out/finetune" / "finetune-2").is_dir()


def test_every_file_is_in_the_reading_order_with_its_length():
    rows = dict(re.findall(r"^\| (\S+\.(?:py|md)) \|.*\| (\d+) \|$", README, re.M))
    there = {str(p.relative_to(ROOT)) for folder in ("", "methods", "toy") for p in (ROOT / folder).glob("*.py")}
    assert set(rows) == there | {"README.md"}
    for name, lines in rows.items():
        actual = len((ROOT / name).read_text().splitlines())
        assert abs(actual - int(lines)) <= 10, f"README says that {name} has {lines} lines; it has {actual}"


def test_every_equation_leads_to_code_and_to_a_test():
    rows = re.findall(r"^\| .*? \| (\([^|]*?) \| (\S+) `(\w+)` \| (\S+) `(\w+)` \|$", README, re.M)
    assert len(rows) >= 4
    for equations, file, function, test_file, test in rows:
        code = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {function}[(:]", code, re.M), f"{file} has no {function}"
        for number in re.findall(r"\(\d+\)", equations):
            assert re.search(rf"# eq\. [^\n]*{re.escape(number)}", code), f"no line of {file} carries # eq. {number}"
        assert re.search(rf"^def {test}\(", (ROOT / test_file).read_text(), re.M), f"{test_file} has no {test}"


def test_every_term_that_is_logged_is_explained_and_nothing_else():
    table = README.split("| term | of |")[1].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M))
    logged = {}
    for loss in LOSSES:
        for term in Objective(tiny(), TrainConfig(loss=loss, stage="pretrain"))(example()):
            logged.setdefault(term.name, set()).add(loss)
    assert rows.keys() == logged.keys()
    for name, of in logged.items():
        assert rows[name] == "all" if name == "ce" else all(f"`{loss}`" in rows[name] for loss in of), rows[name]


def test_every_path_and_flag_that_is_named_exists():
    for name in re.findall(r"`((?:tests|runs|bench|toy|methods)/[\w./]+)`", README):
        assert (ROOT / name).exists(), f"README names {name}"
    flags = set(re.findall(r"`(--[a-z-]+)", README))
    help_texts = "".join((ROOT / f).read_text() for f in ("train.py", "evaluate.py", "mir.py", "export.py", "data.py"))
    for flag in flags:
        assert flag[2:].replace("-", "_") + ":" in help_texts, f"README names {flag}"
