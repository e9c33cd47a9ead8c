"""Tokens a second by number of ranks: train.py as a user runs it, on the toy's backbones or on given folders.

    python -m bench.scaling                                             1 and 2 ranks of this machine, both stages
    python -m bench.scaling --ranks 1,2,4,8 --micro-batch 16 --flags "--vision DIR --llm DIR --data FILE --images DIR"

A rank has the same micro-batch on any number of ranks (weak scaling). Efficiency is relative to the
first number given. It means nothing where ranks share cores or GPUs.
"""
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.files import read_jsonl
from common.flags import UserError, option, parse, run
from toy import world

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Bench:
    """Measure tokens a second of training by number of ranks."""
    ranks: str = option("1,2", "numbers of ranks, separated by commas")
    micro_batch: int = option(16, "samples of a rank at a time", least=1)
    steps: int = option(12, "steps, of which the first 4 are not counted", least=1)
    flags: str = option("", "for train.py, in addition to --stage; unset: a small toy data set")


def train(b: Bench, stage: str, ranks: int, data: Path, out: Path) -> list[dict]:
    """Train for some steps. Returns the lines of metrics.jsonl."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["train.py", "--stage", stage, "--out", str(out), "--max-steps", str(b.steps),
                "--micro-batch", str(b.micro_batch), "--global-batch", str(b.micro_batch * ranks)]
    toy = ["--data", str(data / f"{stage}.json"), "--images", str(data / "images")]
    command += b.flags.split() or toy
    if stage == "finetune" and "--projector" not in b.flags:
        command += ["--projector", "random"]
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        raise UserError(f"train.py on {ranks} ranks stopped: {last}")
    return read_jsonl(out / "metrics.jsonl")


def main() -> None:
    b = parse(Bench)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        if "--data" not in b.flags:
            world.make(data, seed=1, images=512, conversations=1, scenes=6)
        for stage in ("pretrain", "finetune"):
            first = None
            for ranks in map(int, b.ranks.split(",")):
                lines = train(b, stage, ranks, data, Path(folder) / f"{stage}-{ranks}")
                rate = statistics.median(line["tokens_per_s"] for line in lines[4:])
                first = first or rate / ranks
                line = f"{stage:9} {ranks:3} ranks   {rate:10,.0f} tokens/s   {rate / ranks / first:5.0%} a rank"
                print(f"{line}   peak {lines[-1]['peak_gib']:.2f} GiB", flush=True)


if __name__ == "__main__":
    run(main)
