"""Time and peak memory of `next_token_loss` against `F.cross_entropy` over the full logits, forward and backward.

    python -m bench.ce                    B=8, T=640, V=32000, D=1024, 5 % of the positions supervised

Each side runs in a process of its own; peak is what it needs beyond inputs, weights and their gradients.
"""
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from methods.ce import next_token_loss

B, T, V, D, SUPERVISED, RUNS = 8, 640, 32000, 1024, 0.05, 5


def full_logits(h, labels, weight):
    return F.cross_entropy((h @ weight.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def supervised_only(h, labels, weight):
    total, count = next_token_loss(h, labels, weight)
    return total / count


def memory(field: str) -> float:
    """VmRSS or VmHWM (its peak) of this process, in MiB."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(loss, queue) -> None:
    torch.manual_seed(0)
    h = torch.randn(B, T, D, requires_grad=True)
    weight = (torch.randn(V, D) * 0.02).requires_grad_()
    labels = torch.randint(0, V, (B, T))
    labels[torch.rand(B, T) >= SUPERVISED] = -100
    h.grad, weight.grad = torch.zeros_like(h), torch.zeros_like(weight)
    seconds, before = [], memory("VmRSS")
    for _ in range(RUNS):
        Path("/proc/self/clear_refs").write_text("5")           # sets the peak back to the present
        start = time.perf_counter()
        value = loss(h, labels, weight)
        value.backward()
        seconds.append(time.perf_counter() - start)
    queue.put((value.item(), statistics.median(seconds), memory("VmHWM") - before))


if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    results = {}
    for loss in (full_logits, supervised_only):
        queue = spawn.Queue()
        process = spawn.Process(target=measure, args=(loss, queue))
        process.start()
        results[loss.__name__] = queue.get()
        process.join()
        value, seconds, peak = results[loss.__name__]
        print(f"{loss.__name__:16} loss {value:.5f}   {seconds:7.3f} s   peak {peak:7.0f} MiB")
    (_, t0, m0), (_, t1, m1) = results.values()
    print(f"ratio (ours / full): time {t1 / t0:.3f}   peak {m1 / m0:.3f}")
