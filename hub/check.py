"""Look through a file of samples before a run: which ones cannot be used, and why."""
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.flags import UserError, option, parse
from data import IGNORE, TEMPLATES, encode, eos_id, open_image
from hub.samples import SampleFile, sample_problem
from hub.tokenizer import load_tokenizer


def image_problem(path: Path) -> str | None:
    """Why an image cannot be used, or None. Reads its two ends only, and decodes it only if those look wrong: half a
    million images take seconds, not hours. What this cannot see, training reports when it comes to it."""
    try:
        with Image.open(path) as image:
            kind = image.format
        with open(path, "rb") as f:
            f.seek(-min(path.stat().st_size, 64), 2)
            tail = f.read()
        if kind == "PNG" and b"IEND" in tail or kind == "JPEG" and b"\xff\xd9" in tail:
            return None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        pass
    try:
        open_image(path)
    except ValueError as e:
        return str(e)


def image_problems(samples: SampleFile, images: str | Path) -> dict[str, str]:
    """Image file → why it cannot be used. Looks at every file once, at its ends, a few thousand at a time."""
    keys, first = np.unique(samples.column("image"), return_index=True)
    first = np.sort(first[keys != 0])                           # one sample of each image, in the order of the file
    found = {}
    with ThreadPoolExecutor(8) as pool, tqdm(total=len(first), desc="images", delay=2, leave=False) as bar:
        for part in np.array_split(first, len(first) // 4096 + 1):
            names = [samples[i]["image"] for i in part]
            problems = pool.map(image_problem, (Path(images) / n for n in names))
            found |= {n: problem for n, problem in zip(names, problems) if problem}
            bar.update(len(part))
    return found


@dataclass
class CheckConfig:
    """Look through a file of samples before a run: exit code 0 if every sample can be used, 2 if not."""
    check: str | None = option(None, "LLaVA JSON or JSONL")
    images: str | None = option(None, "the folder of its images")
    llm: str | None = option(None, "a language model's folder: to find samples of which --max-length leaves no answer")
    template: Literal[tuple(TEMPLATES)] = option("v1", "with --llm: how a conversation is written")
    image_tokens: int = option(576, "with --llm: positions of an image")
    max_length: int = option(2048, "with --llm: positions a sample may have")
    out: str | None = option(None, "file for the list of the samples that cannot be used")


def check(cfg: CheckConfig) -> tuple[dict[str, int], dict[int, str]]:
    """(what → how many samples of the file, number of a sample → why it cannot be used)."""
    samples = SampleFile(cfg.check)
    image, malformed, answered = (samples.column(name) for name in ("image", "malformed", "answered"))
    if image.any() and cfg.images is None:
        raise UserError(f"{cfg.check} names images: say with --images in which folder they are")
    why = {i: sample_problem(samples[i]) for i in np.flatnonzero(malformed).tolist()}
    why |= dict.fromkeys(np.flatnonzero(~malformed & ~answered).tolist(), "has no answer")
    rows = {"samples": len(samples), "with an image": int((image != 0).sum()),
            "text alone": int((~malformed & (image == 0)).sum()), "malformed": int(malformed.sum()),
            "without an answer": int((~malformed & ~answered).sum()),
            "image missing": 0, "image corrupt": 0, "image unreadable": 0}
    if image.any():
        found = image_problems(samples, cfg.images)
        for i in np.flatnonzero(samples.with_image(list(found))).tolist():
            name = samples[i]["image"]
            kind = ("missing" if found[name] == "missing" else
                    "unreadable" if found[name].startswith("[Errno") else "corrupt")     # the disk's word, or Pillow's
            rows[f"image {kind}"] += 1
            why[i] = f"has image {name}: {found[name]}"
    if cfg.llm:
        tokenizer = load_tokenizer(cfg.llm)
        eos_id(tokenizer, cfg.template)                            # else the template is another family's
        row = f"no answer within {cfg.max_length} positions"
        rows[row] = 0
        for i in tqdm(np.flatnonzero(answered).tolist(), desc="text", delay=2, leave=False):
            _, labels, _ = encode(samples[i]["conversations"], tokenizer, cfg.template, cfg.image_tokens,
                                  cfg.max_length)
            if (labels == IGNORE).all():
                rows[row] += 1
                why[i] = f"has {row}"
    return rows | {"usable": len(samples) - len(why)}, why


def main() -> None:
    cfg = parse(CheckConfig)
    if cfg.check is None:
        raise UserError("say with --check FILE which samples to look through")
    if cfg.images and not Path(cfg.images).is_dir():
        raise UserError(f"--images {cfg.images} is not a folder")
    try:
        out = open(cfg.out, "w") if cfg.out else None
    except OSError as e:
        raise UserError(f"--out {cfg.out} cannot be written: {e.strerror}") from None
    rows, why = check(cfg)
    for name, count in rows.items():
        print(f"{name:32} {count:12,}")
    if out:
        out.writelines(f"sample {i} {why[i]}\n" for i in sorted(why))
        out.close()
    if why:
        i = min(why)
        raise UserError(f"{len(why):,} of {rows['samples']:,} samples of {cfg.check} cannot be used; the first is "
                        f"sample {i}, which {why[i]}; " + (f"{cfg.out} lists them" if out else "--out FILE lists them"))
