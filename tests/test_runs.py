"""The recipes and tools in runs/ and bench/ against the programs as they are."""
import dataclasses
import re
import subprocess

import pytest
from conftest import ROOT, call, command, launch
from PIL import Image

from runs import compare
from training.settings import TrainConfig

RECIPES = sorted((ROOT / "runs").glob("*.sh"))
PROGRAMS = []                   # every file of bench/, runs/ and toy/ that can be started, as python -m names it
for folder in ("bench", "runs", "toy"):
    for path in sorted((ROOT / folder).glob("*.py")):
        if 'if __name__ == "__main__":' in path.read_text():
            PROGRAMS.append(f"{folder}.{path.stem}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_flag_of_a_recipe_exists_and_it_says_what_it_needs_makes_and_expects(path):
    text = path.read_text()
    commands = "\n".join(line for line in text.splitlines() if "python -m runs." not in line)
    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)} | {"--nproc_per_node"}
    unknown = set(re.findall(r"--[a-z][a-z0-9_-]+", commands)) - flags
    assert not unknown, f"{path.name} uses {', '.join(sorted(unknown))}, which train.py does not have"
    for word in ("# Needs:", "Makes:", "# Expected"):
        assert word in text, f"add a comment to {path.name} that says what it {word.strip('# :').lower()}"
    assert subprocess.run(["bash", "-n", path]).returncode == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_starts_and_refuses_an_unknown_flag_in_one_line(name):
    done = launch("-m", name, "--nonsense")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]             # before it, Python may warn of what the tests have imported
    assert last.startswith("error: ") and "--nonsense" in last, done.stderr


@pytest.mark.parametrize("content", ["[]", "{}", '{"stages": 3}', '{"accuracy": 5, "results": []}'])
def test_results_that_are_not_the_toys_are_refused_in_one_line(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    for name in ("runs.compare", "runs.mir"):
        done = launch("-m", name, tmp_path)
        assert done.returncode == 2 and str(tmp_path / "results.json") in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def results(mean: float) -> dict:
    """Return a results.json of a toy run, as far as the tables read it."""
    categories = {"colour": mean, "adversarial": mean, "mean": mean}
    stage = {"ce": 0.5, "mir": 1.0, "V_norm": 80.0, "V_var": 6000.0, "h_norm": 12.0}
    return {"stages": {"pretrain": stage, "finetune": stage}, "mir": {"pretrain": 1.0},
            "accuracy": {"test": categories, "composition": categories},
            "shuffled": {"test": categories}}


def test_the_table_gives_mean_deviation_and_t_over_seeds():
    runs = {"vista": [results(m) for m in (90.0, 92.0, 94.0)],
            "ce": [results(m) for m in (80.0, 82.0, 84.0)]}
    lines = compare.compare(runs).splitlines()
    assert lines[0] == "| | ce (n = 3) | vista (n = 3) |"
    assert "| mean | 82.0 ± 2.0 | 92.0 ± 2.0 |" in lines
    assert "| t of mean against ce |  | +6.1 |" in lines, "10 / sqrt(4/3 + 4/3)"
    assert "| test | 82.0 ± 2.0 | 82.0 ± 2.0 | 82.0 ± 2.0 |" in compare.by_category({"ce": runs["ce"]})


@pytest.mark.slow
def test_the_pictures_are_drawn_from_any_toy_run(small_world, tmp_path):
    run = tmp_path / "run"
    assert call(*command(small_world, run, steps=2)).returncode == 0
    (run / "data").symlink_to(small_world)
    done = launch("-m", "runs.pictures", "--ckpt", run, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for name, most in [("data-path.png", 60_000), ("toy.png", 120_000)]:
        assert Image.open(tmp_path / name).width > 1000
        assert (tmp_path / name).stat().st_size < most
        assert (ROOT / "docs" / name).is_file(), f"python -m runs.pictures makes docs/{name}, which is shown in README"
    done = launch("-m", "runs.pictures", "--ckpt", run, "--out", tmp_path, "--layer", "9")
    assert done.returncode == 2 and "--layer 9: the decoder has layers 1 to 4" in done.stderr
