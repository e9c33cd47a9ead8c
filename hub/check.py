"""python -m hub check FILE: which samples of a file cannot be used, and why, before a run finds out."""
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from common.files import refuse_existing, write_text
from common.flags import UserError, option
from common.images import open_image, read_header
from data import IGNORE, TEMPLATES, encode, eos_id
from hub.samples import SampleFile, sample_problem
from hub.show import sample_page
from hub.tokenizer import load_tokenizer


@dataclass
class CheckFlags:
    """Look through FILE, LLaVA JSON or JSONL, before a run. The exit code is 0 if every sample can be used, else 2.

    With --show N it writes a page of the first N samples as the model gets them, and counts nothing."""
    images: str | None = option(None, "the folder of its images", "samples")
    out: str | None = option(None, "write the list of the samples that cannot be used to this file; with --show: the "
                                   "page")
    show: int | None = option(None, "show so many samples: picture and tokens; needs --llm, --vision and --out")
    vision: str | None = option(None, "with --show: a vision encoder's folder, for its preprocessing")
    vdep: bool = option(False, "with --show: after each sample with an image the same one in VDEP mode")
    llm: str | None = option(None, "a language model's folder: find the samples of which "
                                   "--max-length leaves no answer",
                             "length (with --llm)")
    template: Literal[tuple(TEMPLATES)] = option("v1", "how a conversation is written")
    image_tokens: int = option(576, "positions of an image", most=2**14)
    max_length: int = option(2048, "positions a sample may have")


def image_problem(path: Path) -> str | None:
    """Return why an image cannot be used, or None. Reads the file's two ends, and decodes it only
    if those look wrong: half a million images take seconds, not hours. Damage in between shows when
    training decodes the image."""
    try:
        with read_header(path) as image:
            kind = image.format
        with open(path, "rb") as f:
            f.seek(-min(path.stat().st_size, 64), 2)
            tail = f.read()
        if kind == "PNG" and b"IEND" in tail or kind == "JPEG" and b"\xff\xd9" in tail:
            return None
    except (OSError, ValueError):
        pass                                                    # open_image says what is wrong
    try:
        open_image(path)
    except ValueError as e:
        return str(e)


def image_problems(samples: SampleFile, images: str | Path) -> dict[str, str]:
    """Return image file → why it cannot be used. Checks every file once."""
    # One sample of each image, in the order of the file. Key 0 means text alone.
    keys, first = np.unique(samples.column("image"), return_index=True)
    first = np.sort(first[keys != 0])
    found, slow = {}, False
    with ThreadPoolExecutor(8) as pool, tqdm(total=len(first), desc="images", delay=2, leave=False) as bar:
        for part in np.array_split(first, len(first) // 4096 + 1):
            began, names = time.perf_counter(), [samples[i]["image"] for i in part]
            paths = [Path(images) / name for name in names]
            # Threads wait for a slow disk together. Files in memory are faster without: Python runs one thread.
            problems = pool.map(image_problem, paths) if slow else map(image_problem, paths)
            found |= {name: problem for name, problem in zip(names, problems) if problem}
            slow = slow or time.perf_counter() - began > 2e-4 * len(part)
            bar.update(len(part))
    return found


def check(path: str | Path, cfg: CheckFlags) -> tuple[dict[str, int], dict[int, str]]:
    """Return (what → how many samples, number of a sample → why it cannot be used)."""
    samples = SampleFile(path)
    image, malformed, answered = (samples.column(name)
                                  for name in ("image", "malformed", "answered"))
    if image.any() and cfg.images is None:
        raise UserError(f"{path} names images: say with --images in which folder they are")
    silent = ~malformed & ~answered
    why = {i: sample_problem(samples[i]) for i in np.flatnonzero(malformed).tolist()}
    why |= dict.fromkeys(np.flatnonzero(silent).tolist(), "has no answer")
    rows = {"samples": len(samples), "with an image": int((image != 0).sum()),
            "text alone": int((~malformed & (image == 0)).sum()), "malformed": int(malformed.sum()),
            "without an answer": int(silent.sum()), "image missing": 0, "image corrupt": 0,
            "image unreadable": 0}
    if image.any():
        found = image_problems(samples, cfg.images)
        for i in np.flatnonzero(samples.with_image(list(found))).tolist():
            name = samples[i]["image"]
            if found[name] == "missing":
                rows["image missing"] += 1
            elif found[name].startswith(("[Errno", "not a file")):
                rows["image unreadable"] += 1                   # an error of the disk
            else:
                rows["image corrupt"] += 1                      # an error of Pillow
            why[i] = f"has image {name}: {found[name]}"
    if cfg.llm:
        tokenizer, row = load_tokenizer(cfg.llm), f"no answer within {cfg.max_length} positions"
        # Raises if the template is another family's.
        eos_id(tokenizer, cfg.template)
        rows[row] = 0
        for i in tqdm(np.flatnonzero(answered).tolist(), desc="text", delay=2, leave=False):
            turns = samples[i]["conversations"]
            _, labels, _ = encode(turns, tokenizer, cfg.template, cfg.image_tokens, cfg.max_length)
            if (labels == IGNORE).all():
                rows[row] += 1
                why[i] = f"has {row}"
    return rows | {"usable": len(samples) - len(why)}, why


def print_check(path: str, cfg: CheckFlags) -> None:
    """Print the counts of a file and write --out. Raises UserError if any sample cannot be used."""
    if cfg.images and not Path(cfg.images).is_dir():
        raise UserError(f"--images {cfg.images} is not a folder")
    refuse_existing(cfg.out)
    # first: the check may take minutes
    if cfg.out and not os.access(Path(cfg.out).parent, os.W_OK):
        raise UserError(f"--out {cfg.out} cannot be written: {Path(cfg.out).parent} is no folder, "
                        "or is read-only")
    if cfg.show is not None:
        if not (cfg.llm and cfg.vision and cfg.out):
            raise UserError("--show needs --llm DIR for its tokenizer, --vision DIR for its "
                            "preprocessing and --out PAGE")
        write_text(Path(cfg.out), sample_page(path, cfg))
        print(f"wrote {cfg.out}")
        return
    rows, why = check(path, cfg)
    for name, count in rows.items():
        print(f"{name:32} {count:12,}")
    if cfg.out:
        write_text(Path(cfg.out), "".join(f"sample {i} {why[i]}\n" for i in sorted(why)))
    if why:
        first, lists = min(why), cfg.out or "--out FILE"
        raise UserError(f"{len(why):,} of {rows['samples']:,} samples of {path} cannot be used; "
                        "the first is sample "
                        f"{first}, which {why[first]}; {lists} lists them")
