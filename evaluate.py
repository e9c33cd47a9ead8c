"""Ask a checkpoint: about your photo, your questions, or a benchmark's. The answers are scored.

    python evaluate.py --ckpt out/toy                                     the toy's test questions
    python evaluate.py --ckpt DIR --image photo.jpg --prompt "What is this?"
    python evaluate.py --ckpt DIR --data questions.jsonl --images DIR     your own: {question_id, image, text, answer}
    python evaluate.py --ckpt DIR --bench pope --data eval/pope --images coco/val2014
    torchrun --nproc_per_node=8 evaluate.py --ckpt DIR --bench vqav2 --data eval/vqav2 --images coco/test2015
    python evaluate.py --bench pope --data eval/pope --score-only answers.jsonl          no model: score these answers
    python evaluate.py --compare out/a/eval out/b/eval

Results go to OUT/<name>; OUT is eval/<checkpoint> beside the checkpoint unless --out says otherwise, <name> the
benchmark (pope, vqav2-test-dev) or the stem of your file. Shuffled images have a folder <name>-shuffled beside it.

    pred.rank<r>of<W>.jsonl    answers, written as they come: the same command again resumes, on any number of ranks
    pred.jsonl                 a line a question: id, image, prompt, prediction, parsed, answer, score
    results.json               metrics, headline, counts, and every setting that the numbers depend on
    submission.*               for the benchmark's server, where there is one
"""
import hashlib
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from common.files import read_json, read_lines, write_json
from common.flags import UserError, option, parse, run
from common.parallel import Ranks, choose_device, finish, start
from data import IMAGE, TEMPLATES, ImageProcessor, encode, eos_id
from evaluation.benchmarks import BENCHMARKS, Benchmark
from evaluation.files import picture, write_jsonl
from evaluation.generate import generate
from evaluation.questions import Loaded, Reading, Sample, check_images_exist, load_benchmark
from evaluation.scores import compare, read_answers, score, summary
from evaluation.submit import can_write, write_submission
from hub.checkpoint import CODE_VERSION, checkpoint_folder, load_model
from hub.samples import question_file
from hub.tokenizer import load_tokenizer
from model import Llava

A_WEEK = 7 * 24 * 60        # minutes that the first rank to finish waits for the others


# ------------------------------------------------------------------------------------------------ asking a model
@dataclass
class Assistant:
    """A model and what is needed to ask it."""
    model: Llava
    tokenizer: Tokenizer
    processor: ImageProcessor
    template: str
    after_special: str
    pad: bool                   # images are padded to a square (stage 2) or cropped (stage 1), as in training

    @classmethod
    def from_checkpoint(cls, ckpt, device="cpu", dtype: torch.dtype = torch.float32, template: str | None = None,
                        vision=None, llm=None) -> "Assistant":
        folder = checkpoint_folder(ckpt)
        c = read_json(folder / "config.json")
        return cls(load_model(folder, vision, llm, dtype, device).eval(), load_tokenizer(folder),
                   ImageProcessor.from_folder(folder), template or c["template"], c["after_special"], c["pad"])

    def prepare(self, samples: list[Sample]) -> tuple[list, list, torch.Tensor, list[int]]:
        """Encode prompts and images. Returns ids and image masks, (T,) each; pixels (I,3,H,W) of the distinct images;
        which of them each prompt is about. Raises UserError for an image that cannot be read."""
        size, tokens = self.processor.crop_size, self.model.vision_tower.config.image_tokens
        ids, masks, pixels, number, which = [], [], [], {}, []
        for s in samples:
            # <image> stays where the prompt has it, else it comes first.
            text = s.prompt
            if s.image is None:
                text = text.replace(IMAGE, "").strip()
            elif text.count(IMAGE) != 1:
                text = IMAGE + "\n" + text.replace(IMAGE, "").strip()
            tokenized, _, mask = encode([{"from": "human", "value": text}], self.tokenizer, self.template, tokens,
                                        after_special=self.after_special, image_first=False)
            ids.append(tokenized)
            masks.append(mask)
            key = s.image, s.region
            if key not in number:
                number[key] = len(pixels)
                try:
                    pixels.append(torch.zeros(3, size, size) if s.image is None else
                                  self.processor(picture(s.image, s.region), self.pad))
                except ValueError as e:
                    where = s.image if isinstance(s.image, Path) else repr(text[:60])
                    raise UserError(f"{where}: {e}") from None
            which.append(number[key])
        return ids, masks, torch.stack(pixels), which

    def generate(self, ids: list, masks: list, pixels: torch.Tensor, which: list[int], max_new: int) -> list[str]:
        """Return greedy answers to what `prepare` has made."""
        pixels = pixels.to(next(self.model.parameters()).device)
        eos = eos_id(self.tokenizer, self.template)
        answers = generate(self.model, ids, pixels, max_new, masks, eos, which)
        return [self.tokenizer.decode(answer).strip() for answer in answers]

    def answer(self, questions: list[tuple], max_new_tokens: int = 64) -> list[str]:
        """Answer one batch of (text, image file or None)."""
        samples = [Sample(id="", prompt=text, image=image) for text, image in questions]
        return self.generate(*self.prepare(samples), max_new_tokens)

    def answer_batches(self, samples: list[Sample], batch_size: int, max_new: int) -> Iterator[list[str]]:
        """Answer a batch at a time. The next batch's images are decoded while this batch is computed."""
        batches = [samples[at:at + batch_size] for at in range(0, len(samples), batch_size)]
        ahead = None
        with ThreadPoolExecutor(1) as pool:
            for n, batch in enumerate(batches):
                prepared = ahead.result() if ahead else self.prepare(batch)
                if n + 1 < len(batches):
                    ahead = pool.submit(self.prepare, batches[n + 1])
                yield self.generate(*prepared, max_new)


# ------------------------------------------------------------------------------------------------ which questions
@dataclass
class Questions:
    """One set of questions, and where its results go."""
    name: str                   # "pope"; of own questions the file's stem: "test", or "test, images shuffled"
    bench: str                  # key of BENCHMARKS
    benchmark: Benchmark
    data: Path
    loaded: Loaded
    samples: list[Sample]       # of loaded.samples the first --limit, their images shuffled or not
    settings: dict              # what the results depend on
    out: Path


def load_questions(cfg: "Config", folder: Path | None, out: Path, settings: dict) -> list[Questions]:
    """Read the questions that the flags ask for: a benchmark's, own ones, or the toy's. Raises UserError.

    settings: of the checkpoint or the file that the answers come from."""
    bench = cfg.bench or "own"
    benchmark = BENCHMARKS[bench]
    if cfg.metric:
        benchmark = replace(benchmark, score=cfg.metric)
    if cfg.data:
        files = [(Path(cfg.data), cfg.images)]
    else:
        files = [question_file(folder, None, None, name) for name in ("test.jsonl", "composition.jsonl")]
    sets = []
    for data, images in files:
        if cfg.score_only and images is None:
            images = "."                                    # no image is opened
        reading = Reading(images and Path(images), cfg.labels and Path(cfg.labels), cfg.split, cfg.style, cfg.ocr,
                          cfg.region)
        loaded = load_benchmark(bench, data, reading)
        name = Path(loaded.files[0]).stem if bench == "own" else bench
        place = f"{name}-{cfg.split}" if cfg.split else name
        versions = [(name, place, loaded.samples)]
        if cfg.shuffle_images or cfg.data is None:
            versions.append((f"{name}, images shuffled", f"{place}-shuffled", shuffle_images(loaded.samples)))
        for name, place, samples in versions:
            used = {**loaded.settings, "questions": questions_digest(samples), **settings}
            if bench == "own":
                used["metric"] = benchmark.score
            if not cfg.score_only:
                used["max_new_tokens"] = cfg.max_new_tokens or benchmark.max_new
            sets.append(Questions(name, bench, benchmark, data, loaded, samples[:cfg.limit], used, out / place))
    return sets


def shuffle_images(samples: list[Sample]) -> list[Sample]:
    """Give each question another one's image, by a fixed permutation: the score of a model that ignores the image."""
    images = [(s.image, s.region) for s in samples if s.image is not None]
    shuffled = iter(random.Random(0).sample(images, len(images)))
    out = []
    for s in samples:
        image, region = next(shuffled) if s.image is not None else (None, None)
        out.append(replace(s, image=image, region=region))
    return out


# ------------------------------------------------------------------------------------------------ what is done already
def fingerprint(folder: Path) -> str:
    """Hash a checkpoint's weights: of each file its size and 64 blocks of 64 KiB spread over it. Training changes
    weights everywhere, so that shows any change; hashing all of 14 GB would take longer than loading them."""
    h = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        h.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for block in range(64):
                f.seek(block * max(0, size - 65536) // 63)
                h.update(f.read(65536))
    return h.hexdigest()[:16]


def questions_digest(samples: list[Sample]) -> str:
    """Hash ids, prompts and images (files by name)."""
    h = hashlib.sha256()
    for s in samples:
        image = s.image.name if isinstance(s.image, Path) else getattr(s.image, "digest", s.image)
        h.update(json.dumps([s.id, s.prompt, image, s.region]).encode())
    return h.hexdigest()[:16]


def check_same(path: Path, old: dict, new: dict) -> None:
    """Raise UserError if `path` was made with other settings."""
    changed = [k for k in {**new, **old} if old.get(k) != new.get(k) and k not in ("batch_size", "limit")]
    if changed:
        raise UserError(f"{path} was made with another {', '.join(changed)}: --overwrite, or another --out")


def read_predictions(questions: Questions) -> tuple[dict[str, str], list[int]]:
    """Return (predictions by id, batch sizes) of all runs so far. Raises UserError if other settings made them."""
    done, sizes = {}, set()
    for path in sorted(questions.out.glob("pred.rank*.jsonl")):
        for line in read_lines(path)[0]:                    # a line without its newline is answered again
            if "settings" in line:
                check_same(path, line["settings"], questions.settings)
                sizes.add(line["batch_size"])
            else:
                done[line["id"]] = line["prediction"]
    return done, sorted(sizes)


# ------------------------------------------------------------------------------------------------ asking and scoring
def evaluate(cfg: "Config", ranks: Ranks) -> list[dict]:
    """Ask, score and write. Every rank calls this; returns the contents of results.json on the first rank, else []."""
    folder = None
    if cfg.score_only:
        out = Path(cfg.score_only).with_suffix(".scored")
        settings = {"answers": cfg.score_only}
    else:
        folder = checkpoint_folder(cfg.ckpt)
        out = folder.parent / "eval" / folder.name
        settings = checkpoint_settings(cfg, folder, ranks)
    sets = load_questions(cfg, folder, Path(cfg.out) if cfg.out else out, settings)
    for questions in sets:
        can_write(questions.benchmark, questions.samples)   # raises if a package is missing
        if not cfg.score_only:
            check_images_exist(questions.samples)
    if cfg.overwrite and ranks.first:
        for questions in sets:
            for path in questions.out.glob("pred.rank*.jsonl"):
                path.unlink()
            (questions.out / "results.json").unlink(missing_ok=True)
    ranks.wait()
    for questions in sets:
        results = questions.out / "results.json"
        if results.exists():
            check_same(results, read_json(results)["settings"], questions.settings)
        questions.out.mkdir(parents=True, exist_ok=True)

    if not cfg.score_only:
        answer_all(cfg, folder, sets, ranks)
        ranks.wait()
    return [score_and_write(cfg, folder, questions) for questions in sets] if ranks.first else []


def checkpoint_settings(cfg: "Config", folder: Path, ranks: Ranks) -> dict:
    """Return what the answers of a checkpoint depend on. Raises UserError if it has learned captions alone."""
    c = read_json(folder / "config.json")
    template = cfg.template or c["template"]
    if template == "plain":
        raise UserError(f"{folder} has learned captions (template plain), which leave no place for a question: use "
                        "--template v1 to ask all the same, and expect answers that cannot be parsed")
    return {"checkpoint": fingerprint(folder), "template": template, "dtype": str(ranks.dtype).removeprefix("torch."),
            "pad": c["pad"], "after_special": c["after_special"], "code_version": CODE_VERSION}


def answer_all(cfg: "Config", folder: Path, sets: list[Questions], ranks: Ranks) -> None:
    """Answer this rank's share of what is not answered yet. The model is loaded only if there is something to ask."""
    done = [read_predictions(questions)[0] for questions in sets]
    assistant = None
    for questions, answered in zip(sets, done):
        if all(s.id in answered for s in questions.samples):
            continue
        if assistant is None:
            assistant = Assistant.from_checkpoint(folder, ranks.device, ranks.dtype, questions.settings["template"],
                                                  cfg.vision, cfg.llm)
        answer_share(assistant, questions, answered, cfg.batch_size, ranks)


def answer_share(assistant: Assistant, questions: Questions, done: dict, batch_size: int, ranks: Ranks) -> None:
    """Append this rank's answers to its file. A rank takes every ranks.count-th image with all questions about it. That
    depends on the questions alone, so ranks need not agree on what is done."""
    groups = {}
    for s in questions.samples:
        groups.setdefault((s.image, s.region) if s.image is not None else s.id, []).append(s)
    mine = []
    for group in list(groups.values())[ranks.rank::ranks.count]:
        mine += [s for s in group if s.id not in done]

    path = questions.out / f"pred.rank{ranks.rank}of{ranks.count}.jsonl"
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)      # remove the half line of a stopped run
    label = questions.name if ranks.count == 1 else f"{questions.name}, rank 0 of {ranks.count}"
    batches = assistant.answer_batches(mine, batch_size, questions.settings["max_new_tokens"])
    with open(path, "a", encoding="utf-8") as f, tqdm(
            total=len(mine), desc=label, unit="q", leave=False, disable=None if ranks.first else True) as bar:
        f.write(json.dumps({"settings": questions.settings, "batch_size": batch_size}) + "\n")
        at = 0
        for answers in batches:
            for s, answer in zip(mine[at:], answers):
                f.write(json.dumps({"id": s.id, "prediction": answer}, ensure_ascii=False) + "\n")
            f.flush()
            at += len(answers)
            bar.update(len(answers))


def score_and_write(cfg: "Config", folder: Path | None, questions: Questions) -> dict:
    """Write pred.jsonl, results.json and the submission. Returns the contents of results.json."""
    benchmark, samples, loaded = questions.benchmark, questions.samples, questions.loaded
    settings, counts = {**questions.settings, "limit": cfg.limit}, dict(loaded.counts)
    if cfg.score_only:
        predictions = read_answers(Path(cfg.score_only), samples, benchmark.repeats, counts)
    else:
        predictions, settings["batch_size"] = read_predictions(questions)
    partial = len(samples) < len(loaded.samples)
    rows, results = score(benchmark, samples, predictions, partial)
    counts["references that are none of the options"] = results["n_no_option"]
    warnings = [f"{n} {what}" for what, n in counts.items() if n]
    if benchmark.sizes and len(loaded.samples) not in benchmark.sizes:
        sizes = " or ".join(map(str, benchmark.sizes))
        warnings.append(f"{len(loaded.samples)} questions; the released files have {sizes}")

    write_jsonl(questions.out / "pred.jsonl", rows)
    submission = None
    if can_write(benchmark, samples):
        submission = str(write_submission(benchmark, samples, rows, questions.data, questions.out))
    elif benchmark.submission:
        warnings.append("no spreadsheet for the benchmark's server, which needs openpyxl: pip install openpyxl")
    report = {"benchmark": questions.bench, "name": questions.name, "checkpoint": folder and str(folder),
              "partial": partial, **results, "settings": settings, "files": loaded.files, "warnings": warnings,
              "folder": str(questions.out), "submission": submission, "versions": {"torch": torch.__version__, "code": CODE_VERSION}}
    write_json(questions.out / "results.json", report)
    return report


# ------------------------------------------------------------------------------------------------ the command
@dataclass
class Config:
    """Ask a checkpoint one question, the questions of a file, or a benchmark's; score the answers."""
    ckpt: str = option("out/toy", "a checkpoint's folder, or a run's (its newest checkpoint)", "run")
    out: str | None = option(None, "folder for answers and results (unset: eval/<checkpoint> beside the checkpoint)")
    overwrite: bool = option(False, "replace the answers and results in --out, instead of resuming")
    batch_size: int = option(64, "questions at a time; with bfloat16 use 1 for numbers to publish")
    limit: int | None = option(None, "ask only the first N questions (unset: all)")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it")
    prompt: str | None = option(None, "the question; the answer is printed", "one question")
    image: str | None = option(None, "the image it is about (unset: none)")
    data: str | None = option(None, "questions, JSONL of {question_id, image, text, answer, category}; with --bench "
                              "the benchmark's file or folder (unset: the toy's test questions)", "many questions")
    images: str | None = option(None, "the folder of their images (unset: the images are inside the file)")
    bench: Literal[tuple(BENCHMARKS)] | None = option(None, "a benchmark (unset: own, your questions)")
    labels: str | None = option(None, "file or folder of the labels (unset: beside --data)")
    split: str | None = option(None, "a benchmark's split (unset: that of the first files found)")
    shuffle_images: bool = option(False, "ask a second time, each question about another one's image: the score of a "
                                  "model that ignores the image")
    template: Literal[tuple(TEMPLATES)] | None = option(
        None, "conversation format (unset: the checkpoint's)", "how they are asked")
    max_new_tokens: int | None = option(None, "longest answer (unset: the benchmark's; 64 for one or own questions)")
    style: Literal["llava", "lmms"] | None = option(None, "whose prompts (unset: lmms for parquet, else llava)")
    ocr: bool | None = option(None, "textvqa: OCR tokens in the prompt (unset: on for llava, off for lmms)")
    region: Literal["bbox", "seg"] = option("bbox", "refcoco: how the region is drawn")
    metric: Literal["vqa", "exact", "choice", "anls", "contains", "none"] | None = option(
        None, "rule for own questions (unset: exact)", "scoring")
    score_only: str | None = option(None, "score this file of {question_id, text} lines; no model is loaded")
    compare: list[str] | None = option(None, "print the results in these folders side by side")
    vision: str | None = option(None, "folder of the vision encoder (unset: where it was when training)",
                                "parts of a stage-1 checkpoint")
    llm: str | None = option(None, "folder of the language model (unset: where it was when training)")


def check(cfg: Config) -> None:
    """Raise UserError for flags that do not go together."""
    for name in ("batch_size", "max_new_tokens", "limit"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(cfg, name)}")
    if cfg.prompt is None and cfg.image is not None:
        raise UserError('--image needs a question: --prompt "What is this?"')
    if cfg.prompt is not None and (cfg.data or cfg.bench):
        raise UserError("--prompt asks one question, --data and --bench those of a file: give one or the other")
    if cfg.image is not None and not Path(cfg.image).is_file():
        raise UserError(f"--image {cfg.image} does not exist")
    if cfg.bench not in (None, "own"):
        if cfg.metric:
            raise UserError(f"--metric is for your own questions; {cfg.bench} has its own rule")
        if not cfg.data:
            raise UserError(f"--bench {cfg.bench} needs --data: its file, or the folder that holds it")
    else:
        for name in ("labels", "split", "style"):
            if getattr(cfg, name):
                raise UserError(f"--{name} needs --bench, the benchmark's name")
    if cfg.score_only and not cfg.data:
        raise UserError("--score-only needs --data, the questions that were answered")
    if cfg.score_only and cfg.shuffle_images:
        raise UserError("--shuffle-images asks a model; --score-only does not")


def main() -> None:
    cfg = parse(Config)
    check(cfg)
    if cfg.compare:
        print(compare(cfg.compare))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"          # images are prepared in a thread of their own
    ranks = start(*choose_device(cfg.device, cfg.dtype), minutes=A_WEEK, gloo=True)
    if cfg.prompt is not None:
        folder = checkpoint_folder(cfg.ckpt)
        template = checkpoint_settings(cfg, folder, ranks)["template"]
        if ranks.first:
            assistant = Assistant.from_checkpoint(folder, ranks.device, ranks.dtype, template, cfg.vision, cfg.llm)
            image = Path(cfg.image) if cfg.image else None
            print(assistant.answer([(cfg.prompt, image)], cfg.max_new_tokens or 64)[0])
    else:
        reports = evaluate(cfg, ranks)
        if reports:
            print(summary(reports))
    finish(ranks)


if __name__ == "__main__":
    run(main)
