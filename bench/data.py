"""A LLaVA file of 2 million samples: index once, start-up after that, memory a rank, against json.load; the sampler.

    python -m bench.data                       writes 3 GB to the system's temporary folder, and removes it
    python -m bench.data --samples 200000 --folder DIR

Each side runs in a process of its own; its peak memory is sampled every 2 ms, beyond what it had after its imports.
`own` is memory of the process alone, `mapped` are pages of files, which all processes of a machine share.
`cpu` are seconds of a core: where a machine does other work too, they say more than the clock's. json.load makes Python
objects of the whole file: it is measured on a tenth of the samples, and the line says so.
"""
import json
import multiprocessing
import random
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.flags import UserError, option, parse, run
from data import Order
from hub.samples import read_samples

BYTES = 1500                    # a sample, about: LLaVA's 665k mix has 1.0 GB


@dataclass
class Config:
    """Measure how a large file of samples is opened, read and sampled."""
    samples: int = option(2_000_000, "samples in the file")
    folder: str | None = option(None, "where to write it; unset: the system's temporary folder")


def write(path: Path, n: int) -> None:
    """n samples of 1 to 10 questions; a sixth of them text alone; quotes, backslashes, braces and accents in all."""
    rng = random.Random(0)
    words = 'a the cat on mat, [in] {blue} "quoted" C:\\dir naïve 猫 is of and red: where \n and who'.split(" ")
    phrases = [" ".join(rng.choices(words, k=30)) for _ in range(500)]
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            turns = [{"from": who, "value": rng.choice(phrases)} for _ in range(rng.randint(1, 8))
                     for who in ("human", "gpt")]
            sample = {"id": f"{i:09}", "conversations": turns}
            if rng.random() < 5 / 6:
                sample["image"] = f"images/{i // 1000:05}/{i:09}.jpg"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            f.write(("[" if i == 0 else ", ") + json.dumps(sample, ensure_ascii=i % 2 == 0))
        f.write("]")


# ------------------------------------------------------------------------------------------------ the sides
def start(path: Path) -> tuple:
    """What a rank does before its first batch, but for pictures. The first time, the index is made."""
    samples, _ = read_samples(path)
    order = iter(Order(len(samples), 128, 16, 1, samples.lengths()))
    return samples, order, next(order)


def read(path: Path) -> None:
    """16,000 samples more, in the order of training."""
    samples, order, batch = start(path)
    for _ in range(1000):
        for i in batch:
            assert samples[i]["conversations"]
        batch = next(order)


def sort(path: Path) -> None:
    """Ten epochs' orders."""
    samples, _ = read_samples(path)
    for epoch in range(10):
        Order(len(samples), 128, 1, 1, samples.lengths()).epoch(epoch)


def load(path: Path) -> None:
    kept = json.load(open(path, encoding="utf-8"))
    assert all("conversations" in s for s in kept)


# ------------------------------------------------------------------------------------------------ measuring
def memory() -> dict[str, int]:
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return {"own": int(lines["RssAnon"].split()[0]) / 1024, "mapped": int(lines["RssFile"].split()[0]) / 1024}


def measure(job, path: Path, queue) -> None:
    before, peak, done = memory(), {"own": 0, "mapped": 0}, threading.Event()

    def sample():
        while not done.wait(0.002):
            for k, v in memory().items():
                peak[k] = max(peak[k], v - before[k])
    watcher = threading.Thread(target=sample)
    watcher.start()
    began, cpu = time.perf_counter(), time.process_time()
    kept = job(path)                                            # noqa: F841, still in memory at the end
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    done.set()
    watcher.join()
    queue.put({"seconds": seconds, "cpu": cpu, **peak})


def child(job, path: Path) -> dict:
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=measure, args=(job, path, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def visits(n: int, lengths: np.ndarray, ranks: list[int]) -> np.ndarray:
    """How often an epoch shows each sample; several numbers of ranks: the run is stopped and goes on with the next."""
    seen = np.zeros(n + 1, np.int64)                            # the last one: fillers
    batch, micro, steps = 96, 4, -(-n // 96)
    cuts = [steps * k // len(ranks) for k in range(len(ranks) + 1)]
    for many, first, last in zip(ranks, cuts, cuts[1:]):
        for rank in range(many):
            order = iter(Order(n, batch, micro, 1, lengths, rank, many, first))
            for _ in range((last - first) * (batch // micro // many)):
                np.add.at(seen, next(order), 1)
    return seen


def main() -> None:
    cfg = parse(Config)
    free = shutil.disk_usage(cfg.folder or tempfile.gettempdir()).free
    if free < 1.5 * BYTES * cfg.samples:
        raise UserError(f"{free / 1e9:.1f} GB free, {1.5 * BYTES * cfg.samples / 1e9:.1f} wanted: another --folder")
    with tempfile.TemporaryDirectory(dir=cfg.folder) as folder:
        path, tenth = Path(folder) / "data.json", Path(folder) / "tenth.json"
        write(path, cfg.samples)
        write(tenth, cfg.samples // 10)
        size = path.stat().st_size
        print(f"{cfg.samples:,} samples, {size / 1e9:.2f} GB, page cache warm; peak MiB beyond the imports", flush=True)
        for name, job, file, times in [
                ("index made", start, path, 1), ("start-up after it", start, path, 1),
                ("and 16,000 samples", read, path, 1), ("ten epochs' orders", sort, path, 1),
                ("json.load, × 10", load, tenth, 10)]:
            r = {k: v * times for k, v in child(job, file).items()}
            on = f"   (measured on {cfg.samples // times:,} samples)" * (times > 1)
            print(f"{name:20} {r['seconds']:7.2f} s   cpu {r['cpu']:7.2f} s   own {r['own']:6.0f}   mapped "
                  f"{r['mapped']:4.0f}{on}", flush=True)
        lengths = read_samples(path)[0].lengths()
        for ranks in [[1], [3], [8], [8, 3, 1], [1, 8]]:
            began = time.perf_counter()
            seen = visits(len(lengths), lengths, ranks)
            assert (seen[:-1] == 1).all(), f"on {ranks} ranks {(seen[:-1] != 1).sum()} samples come not once"
            print(f"an epoch on {' then '.join(map(str, ranks))} ranks: each of {len(lengths):,} samples once, "
                  f"{seen[-1]} fillers   ({time.perf_counter() - began:.1f} s)")


if __name__ == "__main__":
    run(main)
