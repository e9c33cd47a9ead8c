"""The process that runs submissions: it imports PyTorch once and forks a child for every item.

A child is locked before the submission's first line is executed: seccomp leaves it memory, clocks
and a pipe for results. A submission's process holds no solution and no expected value."""
import ctypes
import importlib
import json
import os
import pickle
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import save

ALLOWED = json.loads(Path(__file__).with_name("allowed.json").read_text("utf-8"))


def lock() -> None:
    """Allow this process the calls of allowed.json, refuse every other. Cannot be undone."""
    processor = ALLOWED[platform.machine()]
    load, equal, leave = 0x20, 0x15, 0x06               # BPF: load a word, jump if equal, return
    end, refuse, allow = 0x80000000, 0x00050000 | 1, 0x7FFF0000     # answers; 1 is EPERM
    code = [(load, 0, 0, 4), (equal, 1, 0, processor["audit"]), (leave, 0, 0, end), (load, 0, 0, 0)]
    for number in processor["calls"].values():
        code += [(equal, 0, 1, number), (leave, 0, 0, allow)]
    code.append((leave, 0, 0, refuse))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program):    # no new privileges, then seccomp
        raise OSError(ctypes.get_errno(), "seccomp is not available: nothing is graded without it")


def flatten(value) -> list:
    """Tensors, numbers, texts and None in tuples and lists → a list of tensors. None is (0,0,0)."""
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in flatten(v)]
    if isinstance(value, torch.Tensor):
        return [value.detach().to(torch.float64).contiguous().clone()]
    if isinstance(value, str):
        value = list(value.encode())
    return [torch.zeros(0, 0, 0) if value is None else torch.tensor(value, dtype=torch.float64)]


def work(sources: dict[str, str], item, seed: int) -> bytes:
    """Load a submission, call one item with two draws, return its results as safetensors."""
    try:
        names = {}
        for name, text in sources.items():
            module = sys.modules[name] = ModuleType(name)
            exec(compile(text, f"{name}.py", "exec"), vars(module))
            names.update(vars(module))
        results = {}
        for draw in (0, 1):
            g = torch.Generator().manual_seed(seed + draw)
            for i, tensor in enumerate(flatten(item(SimpleNamespace(**names), g))):
                results[f"{draw}.{i:03d}"] = tensor
        return b"results " + save(results)
    except BaseException as e:                      # SystemExit too: it says no more than others
        text = f"{type(e).__name__}: {e}"
        if "can't allocate memory" in text:
            text = "MemoryError: it took more memory than it may"
        return b"error " + text[:300].encode(errors="replace")


def child(out: int, seconds: int, sources: dict[str, str], item, seed: int) -> None:
    """Everything that happens in the process of one item. Descriptor 3 is all that it can write."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd, target in ((null, 0), (null, 1), (null, 2), (out, 3)):
        os.dup2(fd, target)
    os.closerange(4, 4096)
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[0])
    most = pages * resource.getpagesize() + (item.memory << 20)
    for limit, value in ((resource.RLIMIT_AS, most), (resource.RLIMIT_CPU, seconds),
                         (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    lock()
    os.write(3, work(sources, item, seed))      # all of it: nothing interrupts a write to a pipe


def answer_of(seconds: int, *job) -> bytes:
    """What a child writes until it ends, or why that is nothing. Takes what child() takes."""
    end, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(out, seconds, *job)
        finally:
            os._exit(0)
    os.close(out)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(3 * seconds)                   # of the clock: one that sleeps does not compute
    with open(end, "rb") as pipe:
        answer = pipe.read(16 << 20)            # the most that it may write
    signal.alarm(0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return answer or b"error Ended: no answer, it exited or took too long"


if __name__ == "__main__":
    for module in ALLOWED["imports"]:
        importlib.import_module(module)
    solutions, items, seed, seconds = pickle.load(sys.stdin.buffer)
    rows = [[answer_of(seconds, sources, item, seed) for item in items] for sources in solutions]
    pickle.dump(rows, sys.stdout.buffer)
