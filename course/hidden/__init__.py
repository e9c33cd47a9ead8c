"""The hidden tests, one file an assignment: functions that call a submission and return plain tensors.

Nothing is decided here. The functions run beside the submission, in a process that is not trusted. What they return is
compared with what the reference returns, in the grader's process: knowing these files gives no points."""
import importlib
from collections.abc import Callable

import torch
from torch import Tensor


def item(points: int, tolerance: float = 1e-7, view: Callable | None = None, memory: int = 1024) -> Callable:
    """Mark a function (submission, generator) → tensors as a rubric item. Its docstring is the feedback where points
    are lost. view: list of tensors → tensors to compare, which makes an item blind to mistakes that belong to others.
    memory: MiB that the process may use beyond what it starts with."""
    def mark(function):
        function.points, function.tolerance, function.view, function.memory = points, tolerance, view, memory
        return function
    return mark


def rubric(name: str) -> list[Callable]:
    """The items of an assignment, in the order of its file."""
    module = importlib.import_module(f"course.hidden.{name}")
    return [f for f in vars(module).values() if hasattr(f, "points")]


def size(g: torch.Generator, low: int, high: int) -> int:
    """A shape that the seed decides: low..high."""
    return int(torch.randint(low, high + 1, (), generator=g))


def normal(g: torch.Generator, *shape: int, dtype=torch.float64) -> Tensor:
    """A leaf that wants a gradient."""
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def grads(total: Tensor, *leaves: Tensor) -> list[Tensor | None]:
    """Gradients of 3 × total: a backward that ignores what comes into it shows. None where nothing arrives."""
    if not total.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(3 * total, leaves, allow_unused=True))


def equal_all(r: list[Tensor]) -> list[Tensor]:
    """View: how far each result is from the first of them, relatively."""
    return [(x - r[0]).norm() / r[0].norm() for x in r[1:]]


def untouched(r: list[Tensor]) -> list[Tensor]:
    """View of (total, total again, inputs before, inputs after): the two totals are equal, and so are the inputs."""
    n = len(r) // 2
    return [r[0] / r[1], *(a - b for a, b in zip(r[2:n + 1], r[n + 1:]))]
