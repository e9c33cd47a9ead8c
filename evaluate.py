"""Answers of a checkpoint to a benchmark's questions, or to yours, scored.

    python evaluate.py --ckpt out/toy                                     the toy's test questions
    python evaluate.py --ckpt DIR --data questions.jsonl --images DIR     your own: {question_id, image, text, answer}
    python evaluate.py --ckpt DIR --image photo.jpg --prompt "What is this?"
    python evaluate.py --ckpt DIR --bench pope --data eval/pope --images coco/val2014
    torchrun --nproc_per_node=8 evaluate.py --ckpt DIR --bench vqav2 --data eval/vqav2 --images coco/test2015
    python evaluate.py --bench pope --data eval/pope --images coco/val2014 --score-only answers.jsonl     no model
    python evaluate.py --compare out/a/eval out/b/eval

A benchmark's answers are written as they come, to OUT/<bench>/pred.rank<r>of<W>.jsonl: the same command again goes on
where it was stopped, on any number of ranks. Questions about one image are asked together, which computes it once.
"""
import hashlib
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tqdm import tqdm

from common.files import read_json, read_lines
from common.flags import UserError, option, parse, run
from common.parallel import choose_device
from data import IMAGE, TEMPLATES, ImageProcessor, encode, eos_id
from evaluation.benchmarks import BENCHMARKS
from evaluation.files import picture
from evaluation.generate import generate
from evaluation.metrics import accuracy, exact
from evaluation.questions import Sample, absent, load_benchmark
from evaluation.scores import compare, read_answers, score, summary, table
from evaluation.submit import write_submission
from hub.checkpoint import CODE_VERSION, checkpoint_folder, load_model
from hub.samples import question_file, read_questions
from hub.tokenizer import load_tokenizer
from model import Llava


@dataclass
class Assistant:
    """A model and what is needed to ask it: made from a checkpoint's folder by `from_checkpoint`."""
    model: Llava
    tokenizer: Tokenizer
    processor: ImageProcessor
    template: str
    after_special: str
    pad: bool                   # images onto a square (stage 2) or centre crop (stage 1): as in training

    @classmethod
    def from_checkpoint(cls, ckpt, vision=None, llm=None, device: str = "auto", dtype: str = "auto",
                        template: str | None = None) -> "Assistant":
        folder = checkpoint_folder(ckpt)
        c = read_json(folder / "config.json")
        device, dtype = choose_device(device, dtype)
        model = load_model(folder, vision, llm, dtype, device).eval()
        return cls(model, load_tokenizer(folder), ImageProcessor.from_folder(folder), template or c["template"],
                   c["after_special"], c["pad"])

    def prepare(self, questions: list[tuple]) -> tuple[list, list, torch.Tensor, list[int]]:
        """(text, image or None, what to draw on it) each → ids and image masks, (T,) each; pixels (I,3,H,W) of the
        distinct images; which of them each question is about. <image> in a text stays where it is, else it comes first.
        An image is what `benchmarks.picture` takes. Raises UserError for one that cannot be read."""
        size, tokens = self.processor.crop_size, self.model.vision_tower.config.image_tokens
        prompts, pixels, number, which = [], [], {}, []
        for question in questions:
            text, image, region = (*question, None)[:3]
            if image is None:
                text = text.replace(IMAGE, "").strip()
            elif text.count(IMAGE) != 1:
                text = IMAGE + "\n" + text.replace(IMAGE, "").strip()
            ids, _, mask = encode([{"from": "human", "value": text}], self.tokenizer, self.template, tokens,
                                  after_special=self.after_special, image_first=False)
            prompts.append((ids, mask))
            if (image, region) not in number:
                number[image, region] = len(pixels)
                try:
                    pixels.append(torch.zeros(3, size, size) if image is None else
                                  self.processor(picture(image, region), self.pad))
                except ValueError as e:
                    raise UserError(f"{image}: {e}" if isinstance(image, Path) else f"{text[:60]!r}: {e}") from None
            which.append(number[image, region])
        ids, masks = zip(*prompts)
        return list(ids), list(masks), torch.stack(pixels), which

    def generate(self, ids: list, masks: list, pixels: torch.Tensor, which: list[int],
                 max_new_tokens: int) -> list[str]:
        """Greedy answers to what `prepare` made."""
        pixels, eos = pixels.to(next(self.model.parameters()).device), eos_id(self.tokenizer, self.template)
        out = generate(self.model, ids, pixels, max_new_tokens, masks, eos, which)
        return [self.tokenizer.decode(o).strip() for o in out]

    def answer(self, questions: list[tuple], max_new_tokens: int = 64) -> list[str]:
        """One batch of (text, image or None) → greedy answers."""
        return self.generate(*self.prepare(questions), max_new_tokens)


def answers(assistant: Assistant, questions: list[tuple], batch_size: int, max_new_tokens: int,
            name: str = "questions", quiet: bool = False) -> Iterator[list[str]]:
    """The answers, a batch at a time. The next batch's images are decoded while this one is computed."""
    batches = [questions[s:s + batch_size] for s in range(0, len(questions), batch_size)]
    with tqdm(total=len(questions), desc=name, unit="q", leave=False, disable=quiet) as bar, \
            ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(assistant.prepare, batch) for batch in batches[:1]]
        for n, batch in enumerate(batches):
            ready = ahead.pop().result()
            ahead = [pool.submit(assistant.prepare, b) for b in batches[n + 1:n + 2]]
            yield assistant.generate(*ready, max_new_tokens)
            bar.update(len(batch))


# ------------------------------------------------------------------------------------------------ the toy, and yours
def predict(assistant: Assistant, rows: list[dict], images: Path | None, batch_size: int, max_new_tokens: int,
            shuffle: bool = False, name: str = "questions") -> list[str]:
    """Answers to rows of `read_questions`, in their order. shuffle: every question gets another one's image (a fixed
    permutation), which is what a model that does not look would score."""
    files = [None if r["image"] is None else images / r["image"] for r in rows]
    if shuffle:
        asked = [i for i, f in enumerate(files) if f is not None]
        for i, f in zip(asked, random.Random(0).sample([files[i] for i in asked], len(asked))):
            files[i] = f
    questions = [(r["text"].replace(IMAGE, ""), f) for r, f in zip(rows, files)]
    return [a for batch in answers(assistant, questions, batch_size, max_new_tokens, name) for a in batch]


def evaluate(assistant: Assistant, data: Path, images: Path | None, out: Path, batch_size: int = 64,
             max_new_tokens: int = 64, limit: int | None = None) -> dict:
    """Accuracy per category on a question file, and with shuffled images; writes <name>.predictions.jsonl to `out`."""
    rows = read_questions(data, images)[:limit]
    given = predict(assistant, rows, images, batch_size, max_new_tokens, name=data.stem)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{data.stem}.predictions.jsonl", "w", encoding="utf-8") as f:
        for r, a in zip(rows, given):
            hit = None if r["answer"] is None else exact(a, str(r["answer"]))
            f.write(json.dumps({**r, "prediction": a, "correct": hit}, ensure_ascii=False) + "\n")
    scored = [i for i, r in enumerate(rows) if r["answer"] is not None]

    def score(predictions):
        return accuracy([(rows[i]["category"], predictions[i], str(rows[i]["answer"])) for i in scored])
    result = {"n": len(rows), "n_scored": len(scored), "accuracy": score(given)}
    if scored and any(r["image"] is not None for r in rows):
        shuffled = predict(assistant, rows, images, batch_size, max_new_tokens, True, data.stem + ", images shuffled")
        result["shuffled"] = score(shuffled)
    return result


# ------------------------------------------------------------------------------------------------ a benchmark's answers
def fingerprint(folder: Path) -> str:
    """A hash of a checkpoint's weights: of each file's size and of 64 blocks of 64 KiB spread over it. Training changes
    weights everywhere, so it shows, and hashing 14 GB would take longer than loading them."""
    h = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        h.update(f"{path.name} {size}".encode())
        with open(path, "rb") as f:
            for block in range(64):
                f.seek(block * max(0, size - 65536) // 63)
                h.update(f.read(65536))
    return h.hexdigest()[:16]


def what_is_asked(samples: list[Sample]) -> str:
    """A hash of ids, prompts and images (files by name)."""
    h = hashlib.sha256()
    for s in samples:
        image = s.image.name if isinstance(s.image, Path) else getattr(s.image, "digest", s.image)
        h.update(json.dumps([s.id, s.prompt, image, s.region]).encode())
    return h.hexdigest()[:16]


def done_before(out: Path, settings: dict) -> tuple[dict[str, str], list[int]]:
    """(predictions by id, batch sizes) in a folder. Raises UserError if other settings made them."""
    done, sizes = {}, set()
    for path in sorted(out.glob("pred.rank*.jsonl")):
        for line in read_lines(path)[0]:                      # a line is done when its newline is written
            if "settings" in line:
                changed = [k for k in settings | line["settings"] if settings.get(k) != line["settings"].get(k)]
                if changed:
                    raise UserError(f"{path} was made with another {', '.join(changed)}: --overwrite, or another --out")
                sizes.add(line["batch_size"])
            else:
                done[line["id"]] = line["prediction"]
    return done, sorted(sizes)


def answer_samples(assistant: Assistant, samples: list[Sample], done: dict, path: Path, header: dict, batch_size: int,
                   max_new_tokens: int, rank: int, ranks: int, name: str) -> None:
    """Appends to `path` this rank's share of what is not done: every ranks-th image with all questions about it. Who
    takes what depends on the questions alone, so ranks need not agree on what is done."""
    groups = {}
    for s in samples:
        groups.setdefault((s.image, s.region) if s.image is not None else s.id, []).append(s)
    mine = [s for group in list(groups.values())[rank::ranks] for s in group if s.id not in done]
    if path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)              # what a stopped run has left of a line
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(header) + "\n")
        given = answers(assistant, [(s.prompt, s.image, s.region) for s in mine], batch_size, max_new_tokens,
                        name if ranks == 1 else f"{name}, rank 0 of {ranks}", quiet=rank > 0)
        at = 0
        for batch in given:
            for s, a in zip(mine[at:], batch):
                f.write(json.dumps({"id": s.id, "prediction": a}, ensure_ascii=False) + "\n")
            f.flush()
            at += len(batch)


def ask(cfg: "Config", name: str, samples: list[Sample], settings: dict, folder: Path, out: Path,
        max_new_tokens: int) -> tuple[dict[str, str], list[int]] | None:
    """The checkpoint's answers by id, and the batch sizes they were made with; on ranks other than 0 None. What a
    stopped run has left in `out` is taken over if its settings were these."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if torch.cuda.is_available() and cfg.device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if ranks > 1:                             # the first rank that is done may wait for hours
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    if cfg.overwrite and rank == 0:
        for path in out.glob("pred.rank*.jsonl"):
            path.unlink()
    if ranks > 1:
        dist.barrier()
    done, _ = done_before(out, settings)
    if any(s.id not in done for s in samples):
        assistant = Assistant.from_checkpoint(folder, cfg.vision, cfg.llm, cfg.device, cfg.dtype, settings["template"])
        header = {"settings": settings, "batch_size": cfg.batch_size}
        answer_samples(assistant, samples, done, out / f"pred.rank{rank}of{ranks}.jsonl", header, cfg.batch_size,
                       max_new_tokens, rank, ranks, name)
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    return done_before(out, settings) if rank == 0 else None


# ------------------------------------------------------------------------------------------------ a benchmark
def run_benchmark(cfg: "Config", name: str) -> None:
    """Loads, answers (or reads answers), scores, writes and prints. All ranks answer, the first does the rest."""
    if cfg.data is None:
        raise UserError(f"--bench {name} wants --data: its file, or the folder that holds it")
    data, images, labels, given, out = [None if p is None else Path(p) for p in (
        cfg.data, cfg.images, cfg.labels, cfg.score_only, cfg.out)]
    benchmark = replace(BENCHMARKS[name], score=cfg.metric) if cfg.metric else BENCHMARKS[name]
    max_new, folder = cfg.max_new_tokens or benchmark.max_new, None
    if given is None:
        folder = checkpoint_folder(cfg.ckpt)
        c = read_json(folder / "config.json")
        template = cfg.template or c["template"]
        if template == "plain":
            raise UserError(f"{folder} has learned captions (template plain), which leave no place for a question: "
                            "--template v1 asks nevertheless; expect answers that cannot be parsed")
    elif images is None:
        images = Path()                                           # nobody looks at them
    samples, info = load_benchmark(name, data, images, labels, cfg.split, cfg.style, cfg.ocr, cfg.region)
    settings = {k: v for k, v in info.items() if k in ("split", "style", "ocr", "region")}
    asked = what_is_asked(samples)
    partial = cfg.limit is not None and cfg.limit < len(samples)
    samples = samples[:cfg.limit]

    if given is None:
        absent(samples)
        out = (out or folder.parent / "eval" / folder.name) / (f"{name}-{cfg.split}" if cfg.split else name)
        out.mkdir(parents=True, exist_ok=True)
        dtype = str(choose_device(cfg.device, cfg.dtype)[1]).removeprefix("torch.")
        settings.update(checkpoint=fingerprint(folder), questions=asked, template=template, dtype=dtype, pad=c["pad"],
                        after_special=c["after_special"], max_new_tokens=max_new, code_version=CODE_VERSION)
        answered = ask(cfg, name, samples, settings, folder, out, max_new)
        if answered is None:
            return
        predictions, settings["batch_size"] = answered
    else:
        out = out or given.parent / f"{given.stem}.scored"
        if (out / "results.json").exists() and not cfg.overwrite:
            raise UserError(f"{out} holds results already: --overwrite, or another --out")
        out.mkdir(parents=True, exist_ok=True)
        predictions = read_answers(given, samples, benchmark.repeats, info["counts"])
        settings["answers"] = str(given)
    if name == "own":
        settings["metric"] = benchmark.score

    rows, results = score(benchmark, samples, predictions, partial)
    with open(out / "pred.jsonl", "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    submission = write_submission(benchmark, samples, rows, data, out)
    info["counts"]["references that are none of the options"] = results["n_no_option"]
    warnings = [f"{n} {what}" for what, n in info["counts"].items() if n]
    if info["released"] and info["n"] not in info["released"]:
        warnings.append(f"{info['n']} questions; the released files have {' or '.join(map(str, info['released']))}")
    report = {"benchmark": name, "checkpoint": None if folder is None else str(folder), "partial": partial, **results,
              "settings": {**settings, "limit": cfg.limit}, "files": info["files"], "warnings": warnings,
              "versions": {"torch": torch.__version__, "code": CODE_VERSION}}
    (out / "results.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(summary(report))
    print(f"written to {out}" + (f", for the benchmark's server {submission}" if submission else ""))


@dataclass
class Config:
    """Ask a checkpoint the questions of a benchmark or of a file and score the answers, or ask it one question."""
    ckpt: str = option("out/toy", "a checkpoint's folder, or a run's (its newest checkpoint)")
    bench: Literal[tuple(BENCHMARKS)] | None = option(None, "a benchmark; own: your questions, scored by --metric")
    data: str | None = option(None, "its file or folder, or questions, JSONL: {question_id, image, text, answer, "
                              "category}; unset: the toy's")
    images: str | None = option(None, "the folder of their images")
    labels: str | None = option(None, "the labels' file or folder, if not beside --data")
    split: str | None = option(None, "the split, where files of several are there")
    style: Literal["llava", "lmms"] | None = option(None, "whose prompts (default: lmms for parquet, else llava)")
    ocr: bool | None = option(None, "textvqa: OCR tokens in the prompt (default: on for llava, off for lmms)")
    region: Literal["bbox", "seg"] = option("bbox", "refcoco: how the region is drawn")
    metric: Literal["vqa", "exact", "choice", "anls", "contains", "none"] | None = option(
        None, "how your own questions are scored")
    score_only: str | None = option(None, "score this file of answers, {question_id, text} lines, without a model")
    compare: list[str] | None = option(None, "print the results of benchmarks in these folders side by side")
    image: str | None = option(None, "one image, to be asked about with --prompt")
    prompt: str | None = option(None, "one question, answered on the terminal")
    out: str | None = option(None, "folder for predictions and results.json (default: eval/ beside the checkpoint)")
    overwrite: bool = option(False, "replace the results that are in --out")
    batch_size: int = option(64, "questions at a time; in bfloat16, 1 for numbers to publish")
    max_new_tokens: int | None = option(None, "longest answer, in tokens (default: the benchmark's; 64 for own files)")
    limit: int | None = option(None, "only the first questions of the file")
    template: Literal[tuple(TEMPLATES)] | None = option(None, "ask in this conversation format, not the checkpoint's")
    vision: str | None = option(None, "where the vision encoder of a stage-1 checkpoint is now")
    llm: str | None = option(None, "where its language model is now")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it")


def main() -> None:
    cfg = parse(Config)
    for name in ("batch_size", "max_new_tokens", "limit"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(cfg, name)}")
    if cfg.compare:
        print(compare(cfg.compare))
        return
    bench = cfg.bench or ("own" if cfg.metric else None)
    one = cfg.image is not None or cfg.prompt is not None
    if cfg.metric and bench != "own":
        raise UserError(f"--metric is for your own questions; {bench} has its own")
    alone = [n for n in ("labels", "split", "style", "score_only") if getattr(cfg, n)]
    if alone and bench is None:
        raise UserError(f"--{alone[0].replace('_', '-')} wants --bench with it, the benchmark's name, or --metric")
    if one and (cfg.data is not None or bench is not None):
        raise UserError("--data and --bench ask a file's questions, --image and --prompt one: give one or the other")
    if one and cfg.prompt is None:
        raise UserError('--image wants a question with it: --prompt "What is this?"')
    if cfg.image is not None and not Path(cfg.image).is_file():
        raise UserError(f"--image {cfg.image} does not exist")
    if bench is not None:
        run_benchmark(cfg, bench)
        return
    folder, max_new = checkpoint_folder(cfg.ckpt), cfg.max_new_tokens or 64
    if not one:
        files = [question_file(folder, cfg.data, cfg.images, name)
                 for name in (["test.jsonl", "composition.jsonl"] if cfg.data is None else [cfg.data])]
        out = Path(cfg.out) if cfg.out else folder.parent / "eval" / folder.name
        taken = [f.stem for f, _ in files if (out / f"{f.stem}.predictions.jsonl").exists()]
        if taken and not cfg.overwrite:
            raise UserError(f"{out} holds predictions for {', '.join(taken)} already: --overwrite, or another --out")
        for f, images in files:
            read_questions(f, images)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    assistant = Assistant.from_checkpoint(folder, cfg.vision, cfg.llm, cfg.device, cfg.dtype, cfg.template)
    if one:
        print(assistant.answer([(cfg.prompt, cfg.image and Path(cfg.image))], max_new)[0])
        return
    results = {f.stem: evaluate(assistant, f, images, out, cfg.batch_size, max_new, cfg.limit) for f, images in files}
    report = {"checkpoint": str(folder), "settings": {**vars(cfg), "max_new_tokens": max_new},
              "dtype": str(next(assistant.model.parameters()).dtype), **results}
    (out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    rows = {}
    for name, r in results.items():
        rows[name] = r["accuracy"]
        rows[name + ", images shuffled"] = r.get("shuffled", {})
    rows = {name: r for name, r in rows.items() if r}
    print(table(rows) if rows else f"{sum(r['n'] for r in results.values())} answers, no reference to score them by")
    print(f"written to {out}")


if __name__ == "__main__":
    run(main)
