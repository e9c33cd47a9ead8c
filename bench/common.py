"""What the benches share: a side in a process of its own, its peak memory, random batches, the loss of a step.

Memory is read from /proc, so these benches run on Linux. `VmRSS` is all resident memory and `VmHWM`
its peak; `RssAnon` is memory of the process alone, `RssFile` counts pages of mapped files, which
processes share.
"""
import contextlib
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.flags import UserError
from data import IGNORE, Batch
from losses import Term, count_terms
from model import VisionConfig

# a fresh interpreter: no memory comes along from this one
SPAWN = multiprocessing.get_context("spawn")


# -------------------------------------------------------------------------------- processes, memory
def send_result(job, arguments: tuple, pipe) -> None:
    pipe.send(job(*arguments))


def in_own_process(job, *arguments):
    """Return job(*arguments), computed in a process of its own. `job` is a function of a module."""
    here, there = SPAWN.Pipe()
    process = SPAWN.Process(target=send_result, args=(job, arguments, there))
    process.start()
    there.close()                                  # so that a process that dies ends the wait
    try:
        return here.recv()
    except EOFError:
        raise UserError(f"{job.__name__}{arguments} ended without a result: its message stands "
                        "above, or memory ran out") from None
    finally:
        process.join()


def memory(field: str) -> float:
    """Return a field of /proc/self/status (VmRSS, VmHWM, RssAnon, RssFile) in MiB."""
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    """Set VmHWM back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def sampled_peak(*fields: str) -> Iterator[dict[str, float]]:
    """Give a dict that holds, once the block is left, the peak of each field beyond its value at
    the start, in MiB. For fields that have no peak in /proc: they are read every 2 ms."""
    before = {field: memory(field) for field in fields}
    peak, done = dict.fromkeys(fields, 0.0), threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            for field in fields:
                peak[field] = max(peak[field], memory(field) - before[field])
    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


# ------------------------------------------------------------------------------------------- a step
def random_batch(samples: int, vision: VisionConfig, vocabulary: int, text: int, supervised: Tensor,
                 alone: Tensor | None = None) -> Batch:
    """A batch of <s>, an image of random pixels, and random words: T = image tokens + text, always
    the same.

    supervised (T,) bool marks the positions that are targets; alone (B,) bool the samples that end
    with their image (VDEP mode)."""
    g = torch.Generator().manual_seed(0)
    n = vision.image_tokens
    position = torch.arange(n + text)
    ids = torch.randint(3, vocabulary, (samples, n + text), generator=g)                    # (B,T)
    image = ((position > 0) & (position <= n)).expand(samples, -1)
    if alone is None:
        alone = torch.zeros(samples, dtype=torch.bool)
    attention = ~(alone[:, None] & (position > n))
    pixels = torch.randn(samples, 3, vision.image_size, vision.image_size, generator=g)
    return Batch(ids, ids.where(supervised & attention, IGNORE), image, attention, pixels,
                 torch.ones(samples, dtype=torch.bool), alone)


def step_loss(loss: str, terms: list[Term], batch: Batch) -> Tensor:
    """Σ weight · total / count of one batch, as train.py computes it for a global batch. loss: the
    objective's name."""
    count = count_terms(loss, batch)
    return sum(t.weight * t.total / count[t.name] for t in terms)
