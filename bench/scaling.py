"""Tokens a second by number of ranks: train.py as a user runs it, on the toy's backbones or on folders that are given.

    python -m bench.scaling                                             1 and 2 ranks of this machine, both stages
    python -m bench.scaling --ranks 1,2,4,8 --micro-batch 16 --flags "--vision DIR --llm DIR --data FILE --images DIR"

A rank has the same micro-batch on any number of ranks (weak scaling); efficiency is against the first number given.
Ranks beyond the machine's cores or GPUs share them, and then it says nothing.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common.flags import UserError, option, parse, run

ROOT = Path(__file__).resolve().parent.parent
from toy import world


@dataclass
class Bench:
    """Tokens a second of training by number of ranks."""
    ranks: str = option("1,2", "numbers of ranks, with commas between")
    micro_batch: int = option(16, "samples a rank works on at a time")
    steps: int = option(12, "of which the first 4 are not counted")
    flags: str = option("", "for train.py, beside --stage")


def main() -> None:
    b = parse(Bench)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        if "--data" not in b.flags:
            world.make(data, seed=1, images=512, conversations=1, scenes=6)
        for stage in ("pretrain", "finetune"):
            first = None
            for ranks in map(int, b.ranks.split(",")):
                out = Path(folder) / f"{stage}-{ranks}"
                torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
                given = b.flags.split() or ["--data", data / f"{stage}.json", "--images", data / "images"]
                done = subprocess.run(
                    [sys.executable, *(torchrun if ranks > 1 else []), "train.py", "--stage", stage, "--out", out,
                     "--max-steps", str(b.steps), "--micro-batch", str(b.micro_batch), "--global-batch",
                     str(b.micro_batch * ranks), *given], cwd=ROOT, capture_output=True, text=True,
                    env={"OMP_NUM_THREADS": "1", **os.environ})
                if done.returncode:
                    raise UserError(f"train.py on {ranks} ranks stopped: {done.stderr.strip().splitlines()[-1]}")
                lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
                rate = statistics.median(line["tokens_per_s"] for line in lines[4:])
                first = first or rate / ranks
                print(f"{stage:9} {ranks:3} ranks   {rate:10,.0f} tokens/s   {rate / ranks / first:5.0%} a rank   peak "
                      f"{lines[-1]['peak_gib']:.2f} GiB", flush=True)


if __name__ == "__main__":
    run(main)
