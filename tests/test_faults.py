"""The rows of faults.py that take little time; `python tests/faults.py` does them all."""
import faults
import pytest


@pytest.fixture(scope="module")
def undisturbed(small_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return {ranks: faults.undisturbed(small_world, folder / str(ranks), ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("row", [faults.killed_rank, faults.full_quota, faults.corrupt_newest])
def test_the_run_ends_with_its_reason_and_nothing_is_lost(row, small_world, undisturbed, tmp_path):
    row(small_world, tmp_path / "run", undisturbed)
