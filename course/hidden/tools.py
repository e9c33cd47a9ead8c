"""What the hidden tests of several assignments share: draws, gradients, and views of results."""
import torch
from torch import Tensor


def size(g: torch.Generator, low: int, high: int) -> int:
    """A shape that the seed decides: low..high."""
    return int(torch.randint(low, high + 1, (), generator=g))


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def normal(g: torch.Generator, *shape: int, dtype=torch.float64) -> Tensor:
    """A leaf that wants a gradient."""
    return randn(g, *shape).to(dtype).requires_grad_()


def grads(total: Tensor, *leaves: Tensor) -> list[Tensor | None]:
    """Gradients of 3 × total: backward must use what comes in. None where nothing arrives."""
    if not total.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(3 * total, leaves, allow_unused=True))


def detached(*tensors: Tensor) -> list[Tensor]:
    return [t.detach() for t in tensors]


# --------------------------------------------------------------- experiments that assignments share
def with_chunks(loss, leaf: Tensor) -> list[Tensor]:
    """Value and gradient of loss(chunk) for sizes of chunks that do and do not divide the whole."""
    totals = [loss(chunk)[0] for chunk in (1000, 1, 2, 5)]
    return [torch.cat([t.view(1), grads(t, leaf)[0].flatten()]) for t in totals]


def in_parts(loss, leaf: Tensor) -> tuple:
    """loss(rows) of a batch of 8 rows, of each row, and their gradients; for `whole` below."""
    parts, slices = [], []
    for i in range(8):
        part = loss(slice(i, i + 1))[0]
        slices.append(grads(part, leaf)[0][i].flatten())
        parts.append(part.detach())
    del part                            # its graph would count as memory of the batch
    total = loss(slice(None))[0]
    return total, parts, grads(total, leaf), slices


def twice(loss, inputs: list[Tensor]) -> tuple:
    """loss of the same inputs two times, and the inputs before and after; for `untouched` below."""
    after = [t.clone() for t in inputs]
    return loss(*after)[0], loss(*after)[0], inputs, after


# ------------------------------------------------------------- views: list of results → what counts
def ratio(r: list[Tensor]) -> list[Tensor]:
    """The first result as a multiple of the second."""
    return [r[0] / r[1]]


def share(r: list[Tensor]) -> list[Tensor]:
    """The first result as a multiple of the sum of the others."""
    return [r[0] / sum(r[1:])]


def directions(r: list[Tensor]) -> list[Tensor]:
    """Each result without its length."""
    return [x / x.norm() for x in r]


def equal_all(r: list[Tensor]) -> list[Tensor]:
    """How far each result is from the first of them, relatively."""
    return [(x - r[0]).norm() / r[0].norm() for x in r[1:]]


def whole(r: list[Tensor]) -> list[Tensor]:
    """Of in_parts: a batch is the sum of its rows, and its gradient theirs."""
    return [r[0] / sum(r[1:9]), r[9].norm() / torch.cat(r[10:]).norm()]


def untouched(r: list[Tensor]) -> list[Tensor]:
    """Of twice: the two totals are equal, and so are the inputs."""
    n = len(r) // 2
    return [r[0] / r[1], *(a - b for a, b in zip(r[2:n + 1], r[n + 1:]))]
