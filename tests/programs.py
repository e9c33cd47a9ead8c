"""Run the repository's programs as a user does, but quickly: forked from a server that has imported everything.

    start("train.py", "--out", out)                a process; .until(…), .send(signal), .wait()
    launch("mir.py", "--ckpt", ckpt, ranks=2)      to its end, as under torchrun
    call("evaluate.py", "--ckpt", ckpt)            to its end, inside this process: the cheapest
    shell("train.py", "--loss", "ce")              a new Python, or torchrun itself: the slowest

A new Python needs 3 seconds to import PyTorch, a fork 0.1.
"""
import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import connection, forkserver
from pathlib import Path

import torch
from tqdm import tqdm

from common.flags import run

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 170                                   # seconds that a program may take
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
         "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["programs", "train", "toy.report", "hub.check", "hub.export",
                               "hub.inspect"])


def start_server() -> None:
    """Start the server that programs are forked from, with the environment that they are to have."""
    before = dict(os.environ)
    os.environ.update(QUIET)
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


class Program:
    """A program that runs as one process or as several ranks. Each runs the file as `__main__`, with its own command
    line, folder and environment."""
    def __init__(self, words: list[str], ranks: int, cwd: Path, set_up=None):
        self.words = words
        self.folder = Path(tempfile.mkdtemp(prefix="nanoalign-"))
        with socket.socket() as s:                         # a free port for the ranks to meet at
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes = []
        for rank in range(ranks):
            env = {}
            if ranks > 1:
                env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            process = SERVER.Process(target=be_program,
                                     args=(words, env, str(cwd), self.folder / str(rank), set_up))
            process.start()
            self.processes.append(process)

    def until(self, true) -> "Program":
        """Wait until true(), while the program runs."""
        end = time.time() + TIMEOUT
        while not true():
            assert self.processes[0].is_alive(), "it ended too early: " + self.wait().stderr
            assert time.time() < end, f"{' '.join(self.words)}: what the test waits for did not happen"
            time.sleep(0.001)
        return self

    def send(self, number: int) -> "Program":
        """Send a signal to every process."""
        for process in self.processes:
            os.kill(process.pid, number)
        return self

    def wait(self) -> subprocess.CompletedProcess:
        """Wait for the end, which the first rank that fails brings to all, as torchrun does."""
        end = time.time() + TIMEOUT
        while any(p.is_alive() for p in self.processes) and time.time() < end:
            if any(p.exitcode for p in self.processes):
                end = min(end, time.time() + 3)            # the others may still write why
            connection.wait([p.sentinel for p in self.processes if p.is_alive()], 0.5)
        late = [p for p in self.processes if p.is_alive()]
        for process in late:
            process.kill()
        for process in self.processes:
            process.join()
        codes = [p.exitcode for p in self.processes]
        out, err = ("".join(self.read(rank, kind) for rank in range(len(codes)))
                    for kind in ("out", "err"))
        shutil.rmtree(self.folder)
        failed = [code for code in codes if code]
        assert failed or not late, f"{' '.join(self.words)} did not end within {TIMEOUT} s\n{out}\n{err}"
        return subprocess.CompletedProcess(self.words, failed[0] if failed else 0, out, err)

    def read(self, rank: int, kind: str) -> str:
        path = self.folder / f"{rank}.{kind}"
        return path.read_text(errors="replace") if path.exists() else ""


def be_program(words: list[str], env: dict[str, str], cwd: str, output: Path, set_up) -> None:
    """The life of a forked process: `python WORDS`, printing to OUTPUT.out and OUTPUT.err.
    set_up(): called first."""
    for number, kind in [(1, "out"), (2, "err")]:
        f = os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT)
        os.dup2(f, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False)
                              for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)        # the server ignores it
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    # its own is shared by processes: a semaphore left behind
    tqdm.set_lock(threading.RLock())
    code = 0
    try:
        if set_up is not None:
            set_up()
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)                                         # pytest's own clean-up belongs to pytest


def start(*words, ranks: int = 1, cwd: Path = ROOT, set_up=None) -> Program:
    """Start `python WORDS`, or `torchrun --nproc_per_node=RANKS WORDS`."""
    return Program([str(w) for w in words], ranks, cwd, set_up)


def launch(*words, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    """Run a program of the repository to its end, in processes of its own."""
    return start(*words, ranks=ranks, **options).wait()


def shell(*words, ranks: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a program in a new Python, or as ranks of torchrun itself: for tests of what a shell sees."""
    python = [sys.executable]
    if ranks > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    process = subprocess.Popen([*python, *map(str, words)], cwd=cwd, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | QUIET)
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        # torchrun hands this on to its ranks; kill() would not
        process.terminate()
        out, err = process.communicate()
        raise AssertionError(f"{' '.join(map(str, words))} did not end within {TIMEOUT} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def call(script: str, *arguments) -> subprocess.CompletedProcess:
    """Run a program inside this process: the cheapest way, for one process and no signals. script:
    "train.py", or "hub" for `python -m hub`."""
    module = importlib.import_module(script.removesuffix(".py") if script.endswith(".py")
                                     else f"{script}.__main__")
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv, os.getcwd()
    sys.argv = [script, *map(str, arguments)]
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(module.main)
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    return subprocess.CompletedProcess([script, *arguments], code or 0, out.getvalue(),
                                       err.getvalue())
