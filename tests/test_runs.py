"""The recipes in runs/ against train.py as it is."""
import dataclasses
import re
import subprocess

import pytest
from conftest import ROOT

from training.settings import TrainConfig

RECIPES = sorted((ROOT / "runs").glob("*.sh"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_flag_of_a_recipe_exists_and_it_says_what_to_expect(path):
    text = path.read_text()
    flags = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)} | {"--nproc_per_node"}
    unknown = set(re.findall(r"--[a-z][a-z_-]+", text)) - flags
    assert not unknown, f"{path.name} uses {', '.join(unknown)}, which train.py does not have"
    assert "# Expected" in text, f"{path.name} does not say how long it takes"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
