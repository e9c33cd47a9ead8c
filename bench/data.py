"""Open, read and sample a LLaVA file of 2 million samples, compared with json.load; decode images.

    python -m bench.data                       writes 3 GB to the system's temporary folder, and removes it
    python -m bench.data --samples 200000 --folder DIR
    python -m bench.data --decode              images a core makes ready, and the --workers that follow

Each side runs in a process of its own; peak memory is what it needs beyond its imports. `own` is
memory of the process alone, `mapped` are pages of files, which all processes of a machine share.
`cpu` are seconds of a core: compare these where the machine does other work too. json.load makes
Python objects of the whole file. It is measured on a tenth of the samples, and its line says so.

--decode: JPEGs of COCO's sizes (640 × 480 and 500 × 375 pixels, about 100 and 60 KB), from a warm
page cache to ids, labels and pixel values of 336 × 336, as a worker makes them. 8 A100 use 57
images/s in stage 1 of LLaVA-7B and 31 in stage 2 (558k and 665k samples in 2.7 and 6 hours).
"""
import json
import math
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from bench.common import in_own_process, sampled_peak
from common.flags import UserError, option, parse, run
from data import Format, ImageProcessor, Order, Samples
from hub.samples import read_samples
from hub.tokenizer import load_tokenizer

BYTES = 1500                    # a sample, about: LLaVA's 665k mix has 1.0 GB
WORDS = 'a the cat on mat, [in] {blue} "quoted" C:\\dir naïve 猫 is of and red: where \n and who'.split(" ")


@dataclass
class Bench:
    """Measure how a large file of samples is opened, read and sampled."""
    samples: int = option(2_000_000, "samples in the file", least=1)
    folder: str | None = option(None, "where to write it; unset: the system's temporary folder")
    decode: bool = option(False, "measure images alone")


def write(path: Path, n: int) -> None:
    """Write n samples of 1 to 8 questions. A sixth of them is text alone; the text has quotes,
    backslashes, braces and accents."""
    rng = random.Random(0)
    phrases = [" ".join(rng.choices(WORDS, k=30)) for _ in range(500)]
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            turns = []
            for _ in range(rng.randint(1, 8)):
                turns += [{"from": who, "value": rng.choice(phrases)} for who in ("human", "gpt")]
            sample = {"id": f"{i:09}", "conversations": turns}
            if rng.random() < 5 / 6:
                sample["image"] = f"images/{i // 1000:05}/{i:09}.jpg"
                turns[0]["value"] = "<image>\n" + turns[0]["value"]
            f.write(("[" if i == 0 else ", ") + json.dumps(sample, ensure_ascii=i % 2 == 0))
        f.write("]")


# ---------------------------------------------------------------------------------------- the sides
# Each returns what it holds at the end, so that its memory is counted.
def start(path: Path) -> tuple:
    """What a rank does before its first batch, but for pictures. The first call makes the index."""
    samples, _ = read_samples(path)
    order = iter(Order(len(samples), 128, 16, 1, samples.lengths()))
    return samples, order, next(order)


def read(path: Path) -> tuple:
    """Start, then read 16,000 samples in the order of training."""
    samples, order, batch = start(path)
    for _ in range(1000):
        for i in batch:
            assert samples[i]["conversations"]
        batch = next(order)
    return samples, order


def sort(path: Path):
    """Make the orders of ten epochs."""
    samples, _ = read_samples(path)
    for epoch in range(10):
        Order(len(samples), 128, 1, 1, samples.lengths()).epoch(epoch)
    return samples


def load(path: Path) -> list:
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def measure(job, path: Path) -> dict[str, float]:
    with sampled_peak("RssAnon", "RssFile") as peak:
        began, cpu = time.perf_counter(), time.process_time()
        kept = job(path)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    del kept
    return {"seconds": seconds, "cpu": cpu, "own": peak["RssAnon"], "mapped": peak["RssFile"]}


# ---------------------------------------------------------------------------------------- the order
def visits(n: int, lengths: np.ndarray, ranks: list[int]) -> np.ndarray:
    """Return how often an epoch shows each sample, (n + 1,), the last entry counting fillers. With
    several numbers of ranks the run is stopped on the way and resumed with the next number."""
    seen = np.zeros(n + 1, np.int64)
    batch, micro, steps = 96, 4, -(-n // 96)
    cuts = [steps * k // len(ranks) for k in range(len(ranks) + 1)]
    for count, first, last in zip(ranks, cuts, cuts[1:]):
        for rank in range(count):
            order = iter(Order(n, batch, micro, 1, lengths, rank, count, first))
            for _ in range((last - first) * (batch // micro // count)):
                np.add.at(seen, next(order), 1)
    return seen


def check_visits(path: Path) -> None:
    """Fail unless an epoch shows every sample once, on any number of ranks."""
    lengths = read_samples(path)[0].lengths()
    for ranks in [[1], [3], [8], [8, 3, 1], [1, 8]]:
        began = time.perf_counter()
        seen = visits(len(lengths), lengths, ranks)
        wrong = int((seen[:-1] != 1).sum())
        assert wrong == 0, f"on {ranks} ranks {wrong} samples are not shown exactly once"
        seconds = time.perf_counter() - began
        print(f"an epoch on {' then '.join(map(str, ranks))} ranks: each of {len(lengths):,} samples "
              f"once, {seen[-1]} fillers   ({seconds:.1f} s)")


# ------------------------------------------------------------------------------------------- images
EATEN = {"stage 1": 57, "stage 2": 31}      # images/s by 8 cards, at 7B


def write_photos(folder: Path, size: tuple[int, int], n: int = 20) -> float:
    """Write n JPEGs as hard to decode as photos: noise of several scales. Returns their mean KB."""
    rng, total = np.random.default_rng(0), 0
    width, height = size
    for i in range(n):
        pixels = np.zeros((height, width, 3))
        for scale in (4, 16, 64):
            shape = height // scale + 1, width // scale + 1, 3
            coarse = rng.integers(0, 255, shape, dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(coarse).resize(size, Image.BICUBIC)) / 3
        path = folder / f"{i}.jpg"
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)
        total += path.stat().st_size
    return total / n / 1000


def decode() -> None:
    """Print images a core makes ready in a second, and the workers that 8 cards need."""
    processor, tokenizer = ImageProcessor(336, 336), load_tokenizer("toy/llm")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"},
             {"from": "gpt", "value": "A circle. " * 8}]
    for size in [(640, 480), (500, 375)]:
        with tempfile.TemporaryDirectory() as folder:
            kb = write_photos(Path(folder), size)
            rows = [{"id": str(i), "image": f"{i}.jpg", "conversations": turns} for i in range(20)]
            for stage, text in [("stage 1", Format("plain")), ("stage 2", Format("v1", pad=True))]:
                samples, times = Samples(rows, folder, tokenizer, processor, text), []
                for _ in range(5):
                    began = time.process_time()
                    for i in range(len(rows)):
                        assert samples[i].pixel_values is not None
                    times.append((time.process_time() - began) / len(rows))
                rate = 1 / min(times)
                needed = math.ceil(EATEN[stage] / rate)
                print(f"{stage}: {size[0]} × {size[1]}, {kb:.0f} KB: {1000 / rate:.1f} ms of a core "
                      f"an image, {rate:.0f} images/s; {EATEN[stage]} images/s of 8 cards: --workers "
                      f"{math.ceil(needed / 8)} a GPU at least (unset: 4), {needed} in all", flush=True)


def main() -> None:
    b = parse(Bench)
    if b.decode:
        decode()
        return
    free, needed = shutil.disk_usage(b.folder or tempfile.gettempdir()).free, 1.5 * BYTES * b.samples
    if free < needed:
        raise UserError(f"{free / 1e9:.1f} GB are free, {needed / 1e9:.1f} GB are needed: "
                        "give another --folder")
    with tempfile.TemporaryDirectory(dir=b.folder) as folder:
        path, tenth = Path(folder) / "data.json", Path(folder) / "tenth.json"
        write(path, b.samples)
        write(tenth, b.samples // 10)
        size = path.stat().st_size
        print(f"{b.samples:,} samples, {size / 1e9:.2f} GB, page cache warm; "
              "peak MiB beyond the imports", flush=True)
        for name, job, file, times in [
                ("index made", start, path, 1), ("start-up after it", start, path, 1),
                ("and 16,000 samples", read, path, 1), ("ten epochs' orders", sort, path, 1),
                ("json.load, × 10", load, tenth, 10)]:
            r = {k: v * times for k, v in in_own_process(measure, job, file).items()}
            line = (f"{name:20} {r['seconds']:7.2f} s   cpu {r['cpu']:7.2f} s   own {r['own']:6.0f}   "
                    f"mapped {r['mapped']:4.0f}")
            if times > 1:
                line += f"   (measured on {b.samples // times:,} samples)"
            print(line, flush=True)
        check_visits(path)


if __name__ == "__main__":
    run(main)
