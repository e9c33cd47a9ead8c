"""The rows of faults.py that take little time. `python -m tests.faults` runs all of them."""
import faults
import pytest


@pytest.fixture(scope="module")
def whole(small_world, tmp_path_factory):
    """The undisturbed runs by number of ranks, each made when a row asks for it."""
    class Runs(dict):
        def __missing__(self, ranks):
            self[ranks] = faults.undisturbed(small_world, tmp_path_factory.mktemp("undisturbed"),
                                             ranks)
            return self[ranks]
    return Runs()


# Half of the rows. Quick ones of the same causes are in test_promises.py, test_errors.py and test_train.py.
@pytest.mark.slow
@pytest.mark.parametrize("row", [
    faults.corrupt_newest, faults.flipped_bit, faults.full_quota, faults.killed_rank, faults.nan_sample,
    faults.second_run, faults.changed_data], ids=lambda row: row.__name__)
def test_the_run_ends_with_its_reason_and_nothing_is_lost(row, small_world, whole, tmp_path):
    row(small_world, tmp_path / "run", whole)
