"""metrics.py: every rule by hand."""
import pytest

from metrics import accuracy, exact


@pytest.mark.parametrize("prediction, reference, hit", [
    ("red", "red", True), ("Red.", "red", True), (" red\n", "red", True), ("red-ish", "redish", True),
    ("dark red", "red", False), ("a red", "red", False), ("", "red", False), ("2", "two", False), ("", "", True)])
def test_exact_match_ignores_case_punctuation_and_outer_space_and_nothing_else(prediction, reference, hit):
    assert exact(prediction, reference) is hit


def test_the_mean_is_over_categories_not_over_questions():
    rows = [("count", "two", "two")] * 3 + [("count", "one", "two")] + [("colour", "red", "blue")]
    assert accuracy(rows) == {"count": 75.0, "colour": 0.0, "mean": 37.5}
    assert accuracy([]) == {}
