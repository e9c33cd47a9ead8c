"""Stop runs in many ways, resume them with `--resume`, and compare bit for bit with a run that was not disturbed.

    python tests/faults.py               all rows, about 3 minutes on 2 cores; as root, for the rows of the full disk
    python tests/faults.py killed_rank   one of them
    pytest tests/test_faults.py          the quick ones; -m slow: three more

Every row is a function that disturbs a run of real processes. It returns what the user saw.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                          # python tests/faults.py
from toy import world  # noqa: E402

STEPS = 12
LIMIT = 170                     # seconds that anything may take


class Run:
    """A stage-2 run of 12 steps on a small toy data set, in a folder of its own, that can be disturbed and resumed."""
    def __init__(self, data: Path, out: Path, ranks: int = 1, *flags, program=("train.py",),
                 env=None):
        self.out, self.ranks, self.env = out, ranks, {**os.environ, "OMP_NUM_THREADS": "1",
                                                      **(env or {})}
        options = {"stage": "finetune", "data": data / "finetune.json", "images": data / "images",
                   "out": out, "projector": "random", "global-batch": 16, "lr": 5e-4,
                   "projector-scale": 8, "max-steps": STEPS, "workers": 0, "dtype": "float32",
                   "save-every": 2, "keep-last": 2}
        self.command = [sys.executable]
        if ranks > 1:
            self.command += ["-m", "torch.distributed.run", "--standalone",
                             f"--nproc_per_node={ranks}"]
        self.command += program
        for name, value in options.items():
            self.command += [f"--{name}", str(value)]
        self.command += flags
        self.process = None

    def start(self, *flags, **options) -> "Run":
        self.process = subprocess.Popen([*self.command, *flags], cwd=ROOT, env=self.env,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        start_new_session=True, **options)
        return self

    def at(self, step: int) -> "Run":
        """Wait until that step is logged."""
        log = self.out / "metrics.jsonl"
        return self.until(lambda: log.exists() and log.read_text().count("\n") >= step)

    def until(self, true) -> "Run":
        """Wait until true()."""
        end = time.time() + LIMIT
        while not true():
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.time() < end, "what this row waits for did not happen"
            time.sleep(0.001)
        return self

    def children(self) -> list[int]:
        """Return the process ids of the ranks under torchrun,
        or without it of the processes that prepare batches."""
        return [int(p) for p in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]

    def end(self, within: float = LIMIT) -> tuple[int, str, float]:
        """Wait for the end. Returns (exit code, the lines of its error, seconds that passed)."""
        began = time.time()
        out, err = self.process.communicate(timeout=within)
        lines = [line[max(0, line.find("[rank")):]
                 for line in err.splitlines() if "error: " in line]
        return self.process.returncode, "\n".join(lines) or err[-2000:] + out[-500:], time.time() - began

    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.out / "metrics.jsonl").open()]

    def finish(self, like: "Run", *flags) -> str:
        """Resume, and check that every step and every weight
        equals those of `like`. Returns the output."""
        out, err = self.start("--resume", *flags).process.communicate(timeout=LIMIT)
        assert self.process.returncode == 0, err
        assert self.losses() == like.losses(), "a step differs from those of the undisturbed run"
        a, b = (load_file(r.out / f"finetune-{STEPS}" / "model.safetensors") for r in (self, like))
        assert all(torch.equal(a[k], b[k]) for k in b), "a weight differs from that of the undisturbed run"
        return out


def undisturbed(data: Path, out: Path, ranks: int) -> Run:
    run = Run(data, out, ranks).start()
    code, message, _ = run.end()
    assert code == 0, message
    return run


# ----------------------------------------------------------------------------------------- the rows
# Each takes (data, a new folder, the undisturbed runs by number of ranks) and returns what the user saw.
def killed_rank(data, out, whole):
    """kill -9 of one of two ranks that share the model"""
    run = Run(data, out, 2).start().at(5)
    os.kill(run.children()[1], signal.SIGKILL)
    code, message, seconds = run.end()
    assert code and "another rank ended" in message and seconds < 40, message
    run.finish(whole[2])
    return f"over after {seconds:.0f} s: {message}"


def silent_rank(data, out, whole):
    """a rank that stops answering (SIGSTOP), --timeout 0.1"""
    run = Run(data, out, 2, "--timeout", "0.1").start().at(5)
    os.kill(run.children()[1], signal.SIGSTOP)
    code, message, seconds = run.end()
    assert code and "was silent for --timeout minutes" in message, message
    run.finish(whole[2])
    return f"over after {seconds:.0f} s: {message}"


def killed_all(data, out, whole):
    """kill -9 of torchrun and all ranks"""
    run = Run(data, out, 2).start().at(5)
    for pid in [*run.children(), run.process.pid]:
        os.kill(pid, signal.SIGKILL)
    assert run.end()[0] == -signal.SIGKILL
    run.finish(whole[2])
    return "nothing is left running"


def terminated(data, out, whole):
    """SIGTERM to torchrun"""
    run = Run(data, out, 2, "--save-every", "100").start().at(5)
    run.process.terminate()
    code, message, seconds = run.end()
    assert code and list(out.glob("finetune-*")), message
    run.finish(whole[2])
    return f"saved and over after {seconds:.0f} s: {message.splitlines()[0]}"


def interrupted(data, out, whole):
    """Ctrl-C (SIGINT to every process of the terminal), batches prepared by 2 processes"""
    run = Run(data, out, 1, "--workers", "2", "--save-every", "100").start().at(5)
    os.killpg(run.process.pid, signal.SIGINT)
    code, message, _ = run.end()
    assert code == 2 and "it is saved" in message, message
    run.finish(whole[1])
    return message


def killed_while_saving(data, out, whole):
    """kill -9 during a save"""
    run = Run(data, out).start().until(lambda: (out / ".finetune-4.tmp").exists())
    run.process.kill()
    run.end()
    left = sorted(p.name for p in out.glob("finetune-*"))
    assert left == ["finetune-2"], f"{left}: the save was over before the kill came"
    run.finish(whole[1])
    assert not (out / ".finetune-4.tmp").exists(), "half of a checkpoint was left"
    return "finetune-2 is unchanged; half of finetune-4 has a temporary name, and the next save removes it"


def full_disk(data, out, whole):
    """the disk is full (a tmpfs of 12 MB, which holds one checkpoint)"""
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(out)], check=True)
    try:
        run = Run(data, out / "run").start()
        code, message, _ = run.end()
        assert code == 2 and "could not be saved" in message and "are free there" in message, message
        left = sorted(p.name for p in run.out.iterdir() if p.is_dir())
        assert left == ["finetune-2"], left
        subprocess.run(["mount", "-o", "remount,size=100m", str(out)], check=True)
        run.finish(whole[1])
    finally:
        subprocess.run(["umount", str(out)], check=True)
    return message


def full_quota(data, out, whole):
    """a file may not grow beyond 2 MB (ulimit -f), as with a full quota"""
    run = Run(data, out, program=("-c", "import resource, signal; signal.signal(signal.SIGXFSZ, "
                                        "signal.SIG_IGN);"
                                        "resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY));"
              "import train; from common.flags import run; run(train.main)"))
    code, message, _ = run.start().end()
    assert code == 2 and "could not be saved" in message, message
    assert not [p for p in out.iterdir() if p.is_dir()], "half of a checkpoint was left"
    run.command = Run(data, out).command
    run.finish(whole[1])
    return message


def corrupt_newest(data, out, whole):
    """the newest checkpoint is cut off"""
    run = Run(data, out).start().at(7)
    run.process.kill()
    run.end()
    path = max(out.glob("finetune-*"), key=lambda p: int(p.name.split("-")[1])) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    said = run.finish(whole[1])
    lines = [line for line in said.splitlines() if ".broken" in line]
    assert lines, f"the output does not mention the broken checkpoint: {said}"
    return lines[0]


def dead_worker(data, out, whole):
    """a process that prepares batches dies"""
    run = Run(data, out, 1, "--workers", "2").start().at(5)
    os.kill(run.children()[0], signal.SIGKILL)
    code, message, _ = run.end()
    assert code == 2 and "a process that prepares batches died" in message, message
    run.finish(whole[1])
    return message


def clock_jump(data, out, whole):
    """the clock jumps a day back and forth, and checkpoints are dated in the future"""
    (out.parent / "clock").mkdir()
    (out.parent / "clock" / "sitecustomize.py").write_text(
        "import time\nreal, calls = time.time, [0]\n"
        "def jumping():\n    calls[0] += 1\n    return real() + 86400 * (-1) ** "
        "calls[0]\ntime.time = jumping\n")
    run = Run(data, out, env={"PYTHONPATH": str(out.parent / "clock")}).start().at(5)
    run.process.kill()
    run.end()
    for n, path in enumerate(sorted(out.glob("finetune-*"),
                                    key=lambda p: int(p.name.split("-")[1]))):
        os.utime(path, (time.time() + 1e6 * (-1) ** n,) * 2)
    run.finish(whole[1])
    return "nothing: checkpoints are ordered by step, and time is measured with a monotonic clock"


def nan_sample(data, out, whole):
    """the pixels of one sample are NaN"""
    spoil = """
import data, train
from common.flags import run
make = data.Samples.__getitem__
def spoiled(self, i):
    example = make(self, i)
    if i == 7 and example.pixel_values is not None:
        example.pixel_values.fill_(float("nan"))
    return example
data.Samples.__getitem__ = spoiled
run(train.main)
"""
    run = Run(data, out, program=("-c", spoil)).start()
    code, message, _ = run.end()
    name = json.loads((data / "finetune.json").read_text())[7]["id"]
    assert code == 2 and name in message and "rank 0" in message, message
    for path in out.glob("finetune-*/model.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values()), "NaN was saved"
    run.command = Run(data, out).command
    run.finish(whole[1])
    return message


def second_run(data, out, whole):
    """a second `train.py --out OUT --resume` while the first runs"""
    run = Run(data, out).start().at(3)
    run.process.send_signal(signal.SIGSTOP)
    code, message, _ = Run(data, out).start("--resume").end()
    assert code == 2 and "is in use" in message, message
    run.process.send_signal(signal.SIGCONT)
    assert run.end()[0] == 0 and run.losses() == whole[1].losses(), "the second run disturbed the first"
    run.finish(whole[1])
    return message


def flipped_bit(data, out, whole):
    """a bit of the newest checkpoint's tensors is flipped, then `train.py --out OUT --resume`"""
    run = Run(data, out).start().at(7)
    run.process.kill()
    run.end()
    path = max(out.glob("finetune-*"), key=lambda p: int(p.name.split("-")[1])) / "model.safetensors"
    spoiled = bytearray(path.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    path.write_bytes(spoiled)
    lines = [line for line in run.finish(whole[1]).splitlines() if ".broken" in line]
    assert lines and "is not what was saved" in lines[0], lines
    return lines[0]


def changed_data(data, out, whole):
    """a word of --data is changed while the run is stopped, then `train.py --out OUT --resume`"""
    shutil.copytree(data, out.parent / "data")
    run = Run(out.parent / "data", out).start().at(5)
    run.process.kill()
    run.end()
    path = out.parent / "data" / "finetune.json"
    text = path.read_text()
    path.write_text(text.replace("Yes", "Not", 1))
    code, message, _ = run.start("--resume").end()
    assert code == 2 and "the --data of finetune has changed" in message, message
    path.write_text(text)
    run.finish(whole[1])
    return message


def full_disk_at_the_start(data, out, whole):
    """the disk is full at the first write of `train.py
    --out OUT` (a tmpfs of 8 kB), then the same command"""
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(out)], check=True)
    try:
        (out / "other").write_bytes(b"x" * 8192)
        run = Run(data, out / "run").start()
        code, message, _ = run.end()
        assert code, "a full disk went unnoticed"
        subprocess.run(["mount", "-o", "remount,size=100m", str(out)], check=True)
        assert run.start().end()[0] == 0, "the same command is refused"
        run.finish(whole[1])
    finally:
        subprocess.run(["umount", str(out)], check=True)
    return message.splitlines()[-1]


def infinite_weights(data, out, whole):
    """`train.py --lr 1e39`: the first update leaves no finite weight"""
    run = Run(data, out, 1, "--lr", "1e39", "--save-every", "1").start()
    code, message, _ = run.end()
    assert code == 2 and "not finite, so it is not saved" in message, message
    assert not list(out.glob("finetune-*")), "NaN was saved"
    shutil.rmtree(out)
    Run(data, out).start().end()
    Run(data, out).finish(whole[1])
    return message


def refused_inputs(data, out, whole):
    """spoiled files, impossible flags, places that cannot
    be written and a full disk, for every command"""
    done = subprocess.run([sys.executable, ROOT / "tests" / "refusals.py"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.replace("\n", "\n    ").rstrip()


ROWS = [killed_rank, silent_rank, killed_all, terminated, interrupted, killed_while_saving,
        full_disk, full_quota, corrupt_newest, dead_worker, clock_jump, nan_sample, second_run,
        flipped_bit, changed_data, full_disk_at_the_start, infinite_weights, refused_inputs]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        world.make(base / "world", seed=1, images=96, conversations=1, scenes=6)
        whole = {ranks: undisturbed(base / "world", base / f"whole{ranks}", ranks)
                 for ranks in (1, 2)}
        for row in ROWS:
            if sys.argv[1:] and row.__name__ not in sys.argv[1:]:
                continue
            (base / row.__name__).mkdir()
            said = row(base / "world", base / row.__name__ / "run", whole)
            if row is not refused_inputs:
                said += f"\n    resumed: all {STEPS} steps and weights as undisturbed"
            print(f"{row.__doc__}\n    {said}", flush=True)


if __name__ == "__main__":
    main()
