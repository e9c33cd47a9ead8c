"""Time and peak memory of `next_token_loss` against `F.cross_entropy` over the full logits, forward and backward.

    python -m bench.ce                    B=8, T=640, V=32000, D=1024, 5 % of the positions supervised

Each side runs in a process of its own. Peak is beyond inputs, weights and their gradients.
"""
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import in_own_process, memory, reset_peak
from common.flags import option, parse, run
from methods.ce import next_token_loss


@dataclass
class Shape:
    """Compare cross-entropy at supervised positions with cross-entropy over the full logits."""
    batch: int = option(8, "samples", least=1)
    length: int = option(640, "positions a sample", least=1)
    vocabulary: int = option(32000, "words", least=1)
    width: int = option(1024, "width of the hidden states", least=1)
    supervised: float = option(0.05, "share of the positions that are targets")
    rounds: int = option(5, "forward and backward passes; the median is printed", least=1)


def full_logits(h: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy((h @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def supervised_only(h: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    total, count = next_token_loss(h, labels, weight)
    return total / count


def measure(loss, s: Shape) -> tuple[float, float, float]:
    """Return (value, median seconds, peak MiB)."""
    torch.manual_seed(0)
    h = torch.randn(s.batch, s.length, s.width, requires_grad=True)
    weight = (torch.randn(s.vocabulary, s.width) * 0.02).requires_grad_()
    labels = torch.randint(0, s.vocabulary, (s.batch, s.length))
    labels[torch.rand(s.batch, s.length) >= s.supervised] = -100
    h.grad, weight.grad = torch.zeros_like(h), torch.zeros_like(weight)
    seconds, before = [], memory("VmRSS")
    reset_peak()
    for _ in range(s.rounds):
        start = time.perf_counter()
        value = loss(h, labels, weight)
        value.backward()
        seconds.append(time.perf_counter() - start)
    return value.item(), statistics.median(seconds), memory("VmHWM") - before


def main() -> None:
    s = parse(Shape)
    results = []
    for loss in (full_logits, supervised_only):
        value, seconds, peak = in_own_process(measure, loss, s)
        line = f"{loss.__name__:16} loss {value:.5f}   {seconds:7.3f} s   peak {peak:7.0f} MiB"
        print(line, flush=True)
        results.append((seconds, peak))
    (full_seconds, full_peak), (seconds, peak) = results
    print(f"ratio (supervised / full): time {seconds / full_seconds:.3f}   peak {peak / full_peak:.3f}")


if __name__ == "__main__":
    run(main)
