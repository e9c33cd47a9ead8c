"""What the benches share: a side in a process of its own, its peak memory, batches, a step's loss.

Memory is read from /proc, so these benches run on Linux. `VmRSS` is all resident memory and `VmHWM`
its peak; `RssAnon` is of the process alone, `RssFile` pages of mapped files, which processes share.
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

SPAWN = multiprocessing.get_context("spawn")       # fresh interpreters: without this one's memory


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


def import_transformers():
    """Return the package that some benches compare with. Raises UserError if it is missing."""
    try:
        import transformers
    except ImportError:
        raise UserError("this bench compares with transformers, which is not installed: "
                        "pip install transformers, in another environment") from None
    return transformers


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
    """Give a dict that holds, once the block is left, how far each field rose above its start, in
    MiB. For fields that have no peak in /proc: they are read every 2 ms."""
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
    """Make a batch of <s>, an image of random pixels, and random words: T = image tokens + text.

    supervised (T,) bool marks the positions that are targets; alone (B,) bool the samples that end
    with their image (VDEP mode). It is the same for the same arguments."""
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
    """Return Σ weight · total / count of a batch, as train.py does. loss: the objective's name."""
    count = count_terms(loss, batch)
    return sum(t.weight * t.total / count[t.name] for t in terms)
