"""Two hundred cases of fuzz.py, in a process of their own. `python tests/fuzz.py --n 2000` runs more."""
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_every_cause_of_an_error_is_named_by_every_command():
    done = subprocess.run([sys.executable, ROOT / "tests" / "refusals.py"], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_spoiled_files_end_in_one_line_within_a_minute_and_a_gigabyte(fuzzing):
    out, errors = fuzzing.communicate()                 # started with the first test: see conftest.py
    assert fuzzing.returncode == 0, out + errors
    assert out.startswith("200 cases"), out
