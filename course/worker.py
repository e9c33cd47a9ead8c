"""The process that runs submissions: it imports PyTorch once and forks a child for every item.

A child is locked before the submission's first line is executed: seccomp leaves it memory, clocks
and the pipe that its results go through. It cannot open files (hidden tests, other submissions),
use a network, fork, start programs or send signals, whatever it does with ctypes or torch. Limits
end it when it takes too much time or memory. This process holds no solutions and no expected
values, and passes on what a child writes as bytes: the grader compares, and believes nothing.
"""
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
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import save

OUTPUT_LIMIT = 16 << 20
CALLS = json.loads(Path(__file__).with_name("calls.json").read_text())
# A locked child cannot open files: what a submission may import is imported here.
IMPORTS = ["math", "copy", "random", "statistics", "itertools", "functools", "dataclasses", "enum",
           "collections", "re", "typing", "contextlib", "warnings", "operator", "string", "tokenizers",
           "numpy.ctypeslib", "torch.nn.functional", "torch.utils.checkpoint", "torch.nn.utils.rnn"]


def lock() -> None:
    """Allow this process the calls of calls.json; every other returns EPERM. Cannot be undone."""
    processor = CALLS[platform.machine()]
    load, equal, leave = 0x20, 0x15, 0x06               # BPF: load a word, jump if equal, return
    end, refuse, allow = 0x80000000, 0x00050000 | 1, 0x7FFF0000     # answers; 1 is EPERM
    code = [(load, 0, 0, 4), (equal, 1, 0, processor["audit"]), (leave, 0, 0, end), (load, 0, 0, 0)]
    for number in processor["calls"].values():
        code += [(equal, 0, 1, number), (leave, 0, 0, allow)]
    code.append((leave, 0, 0, refuse))
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with a filter
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program):
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


def failure(kind: str, text: str) -> bytes:
    return b"error " + json.dumps([kind, text[:300]]).encode()


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
        if "can't allocate memory" in str(e):
            return failure("MemoryError", "it took more memory than it may")
        return failure(type(e).__name__, str(e))


def child(out: int, memory: int, seconds: int, *job) -> None:
    """Everything that happens in the process of one item. Descriptor 3 is all that it can write."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.dup2(out, 3)
    os.closerange(4, 4096)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (memory << 20)
    for limit, value in ((resource.RLIMIT_AS, most), (resource.RLIMIT_CPU, seconds),
                         (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (value, value))
    lock()
    answer = memoryview(work(*job))
    while answer:
        answer = answer[os.write(3, answer):]


def answer_of(sources: dict[str, str], item, seed: int, seconds: int) -> bytes:
    """What the child for one item writes until it ends, or why that is nothing."""
    end, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(out, item.memory, seconds, sources, item, seed)
        finally:
            os._exit(0)
    os.close(out)
    timer = threading.Timer(3 * seconds, os.kill, (pid, signal.SIGKILL))    # by the clock
    timer.start()
    with open(end, "rb") as pipe:
        answer = pipe.read(OUTPUT_LIMIT)
    late = not timer.is_alive()
    timer.cancel()
    timer.join()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if late:
        return failure("Timeout", f"no answer after {3 * seconds} s")
    return answer or failure("Ended", "it ended without an answer, or computed too long")


def main() -> None:
    """Read (solutions, items, seed, seconds) from standard input, write the answers, a row each."""
    for module in IMPORTS:
        importlib.import_module(module)
    solutions, items, *limits = pickle.load(sys.stdin.buffer)
    rows = [[answer_of(sources, item, *limits) for item in items] for sources in solutions]
    pickle.dump(rows, sys.stdout.buffer)


if __name__ == "__main__":
    main()
