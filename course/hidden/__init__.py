"""The hidden tests, one file an assignment: functions that call a submission and return tensors.

The grader compares them with the reference's, in its own process: nothing is decided here."""
import importlib
from collections.abc import Callable


def item(points: int, tolerance: float = 1e-7, view: Callable = list, memory: int = 1024) -> Callable:
    """Mark a function (submission, generator) → tensors as a rubric item.

    Its docstring is the feedback where points are lost. view: list of tensors → tensors to compare,
    which makes an item blind to mistakes that belong to others. memory: MiB that it may take."""
    def mark(function):
        vars(function).update(points=points, tolerance=tolerance, view=view, memory=memory)
        return function
    return mark


def rubric(name: str) -> list[Callable]:
    """The items of an assignment, in the order of its file."""
    module = importlib.import_module(f"course.hidden.{name}")
    return [f for f in vars(module).values() if hasattr(f, "points")]
