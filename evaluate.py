"""Ask a checkpoint: about your photo, your questions, or a benchmark's. The answers are scored.

    python evaluate.py --ckpt out/toy                                 the toy's test questions
    python evaluate.py --ckpt DIR --image photo.jpg --prompt "What is this?"
    python evaluate.py --ckpt DIR --image photo.jpg                   a conversation
    python evaluate.py --ckpt DIR --data questions.jsonl --images DIR  yours: {image, text, answer}
    python evaluate.py --ckpt DIR --bench pope --data eval/pope --images coco/val2014
    torchrun --nproc_per_node=8 evaluate.py --ckpt DIR --bench vqav2 --data eval/vqav2 --images coco/test2015
    python evaluate.py --bench pope --data eval/pope --score-only answers.jsonl   loads no model
    python evaluate.py --compare out/a/eval out/b/eval

DIR is a checkpoint, a run, or a released LLaVA (--vision: its CLIP, where it holds none). Results
go to OUT/<name>: OUT is --out, or eval/<checkpoint> beside the checkpoint; <name> is the benchmark
(pope, vqav2-test-dev) or your file's stem (test); <name>-shuffled is of shuffled images.
    pred.rank<r>of<W>.jsonl   answers as they come: the same command resumes, on any number of ranks
    pred.jsonl                a line a question: id, image, prompt, prediction, parsed, answer, score
    results.json              metrics, headline, counts, every setting that the numbers depend on
    submission.*              for the benchmark's server, where there is one
"""
import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from common.files import file_crc, files_digest, locked, remove, write_json
from common.flags import UserError, option, parse, run
from common.parallel import Ranks, choose_device, explain_lost_ranks, finish, start
from common.text import RULES
from data import IMAGE, TEMPLATES, ImageProcessor, encode, eos_id
from evaluation.answers import answer_share, questions_digest, read_answers, read_predictions
from evaluation.benchmarks import BENCHMARKS
from evaluation.chat import talk
from evaluation.files import picture, write_jsonl
from evaluation.generate import generate
from evaluation.questions import Questions, Reading, Sample, check_images_exist, load_benchmark, shuffle_images
from evaluation.scores import OWN_RULES, compare, notes, score, summary
from evaluation.submit import check_submission, write_submission
from hub.checkpoint import CODE_VERSION, load_model
from hub.configs import load_processor
from hub.samples import question_file
from hub.tokenizer import load_tokenizer
from hub.usage import all_weights, model_folder, read_usage, results_folder
from model import Llava


@dataclass
class Assistant:
    """A model and what is needed to ask it."""
    model: Llava
    tokenizer: Tokenizer
    processor: ImageProcessor
    template: str           # how a conversation is written: a key of data.TEMPLATES
    after_special: str      # the spaces after </s>: one of common.text.RULES
    pad: bool               # images are padded to a square (stage 2) or cropped (stage 1)

    @classmethod
    def from_checkpoint(cls, ckpt, device="cpu", dtype=torch.float32, template: str | None = None,
                        vision=None, llm=None, after_special: str | None = None,
                        pad: bool | None = None, plain_specials: bool | None = None) -> "Assistant":
        """Load a checkpoint, the newest of a run, or a released LLaVA. None: as it was trained."""
        folder = model_folder(ckpt)
        use, tokenizer = read_usage(folder, vision), load_tokenizer(folder, plain_specials)
        processor = load_processor(folder, vision)
        return cls(load_model(folder, vision, llm, dtype, device).eval(), tokenizer, processor,
                   template or use.template, after_special or use.after_special,
                   use.pad if pad is None else pad)

    def encode(self, s: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a prompt: ids and image mask, (T,) each. Raises UserError if the model has no room for it."""
        # <image> stays where the prompt has it, else it comes first.
        text = s.prompt
        if s.image is None:
            text = text.replace(IMAGE, "").strip()
        elif text.count(IMAGE) != 1:
            text = IMAGE + "\n" + text.replace(IMAGE, "").strip()
        turns = [{"from": "human", "value": text}]
        ids, _, mask = encode(turns, self.tokenizer, self.template, self.model.image_tokens,
                              after_special=self.after_special, image_first=False)
        most = self.model.language_model.config.max_position_embeddings
        if len(ids) > most:
            raise UserError(f"prompt {s.id} {s.prompt[:40]!r} has {len(ids)} tokens, the model room for {most}: "
                            "shorten it")
        return ids, mask

    def prepare(self, samples: list[Sample]) -> tuple[list, list, torch.Tensor, list[int]]:
        """Encode prompts and images. Returns ids and image masks, (T,) each; pixels (I,3,H,W) of
        the distinct images; which of them each prompt is about. Raises UserError for bad images."""
        size, encoded = self.processor.crop_size, [self.encode(s) for s in samples]
        ids, masks = [e[0] for e in encoded], [e[1] for e in encoded]
        pixels, which, number = [], [], {}      # number: image → its place in pixels
        for s in samples:
            # Each distinct image is decoded once. Text alone has a zero image, which nothing reads.
            key = s.image, s.region
            if key not in number:
                number[key] = len(pixels)
                try:
                    pixels.append(torch.zeros(3, size, size) if s.image is None else
                                  self.processor(picture(s.image, s.region), self.pad))
                except ValueError as e:     # only a file has a name to show
                    where = s.image if isinstance(s.image, Path) else repr(s.prompt[:60])
                    raise UserError(f"{where}: {e}") from None
            which.append(number[key])
        return ids, masks, torch.stack(pixels), which

    def generate(self, ids: list, masks: list, pixels, which: list, max_new: int) -> list[str]:
        """Return greedy answers to what `prepare` returned."""
        pixels = pixels.to(next(self.model.parameters()).device)
        eos = eos_id(self.tokenizer, self.template)
        answers = generate(self.model, ids, pixels, max_new, masks, eos, which)
        return [self.tokenizer.decode(answer).strip() for answer in answers]

    def answer(self, questions: list[tuple], max_new_tokens: int = 64) -> list[str]:
        """Answer one batch of (text, image file or None)."""
        samples = [Sample(id="", prompt=text, image=image) for text, image in questions]
        return self.generate(*self.prepare(samples), max_new_tokens)

    def answer_batches(self, samples: list, batch_size: int, max_new: int) -> Iterator[tuple]:
        """Yield (samples, answers) of each batch."""
        batches = [samples[at:at + batch_size] for at in range(0, len(samples), batch_size)]
        ahead = None            # the next batch, while it is prepared
        with ThreadPoolExecutor(1) as pool:
            for n, batch in enumerate(batches):
                prepared = ahead.result() if ahead else self.prepare(batch)
                # Images of the next batch are decoded while the model answers this one.
                if n + 1 < len(batches):
                    ahead = pool.submit(self.prepare, batches[n + 1])
                yield batch, self.generate(*prepared, max_new)


# ---------------------------------------------------------------------------------- which questions
def load_questions(cfg: "Config", folder: Path | None, out: Path, source: dict) -> list[Questions]:
    """Read the questions that the flags ask for. source: settings of the model or its answers."""
    bench = cfg.bench or "own"
    benchmark = replace(BENCHMARKS[bench], score=cfg.metric or BENCHMARKS[bench].score)
    labels, sets = cfg.labels and Path(cfg.labels), []
    # Without --data: the toy's two files, beside the checkpoint.
    files = ["test.jsonl", "composition.jsonl"] if cfg.data is None else [cfg.data]
    for file in files:
        data, images = question_file(folder, cfg.data, cfg.images, file)
        reading = Reading(images, labels, cfg.split, cfg.style, cfg.ocr, cfg.region)
        loaded = load_benchmark(bench, data, reading)
        stem = Path(loaded.files[0]).stem if bench == "own" else bench      # of the folder in `out`
        place = f"{stem}-{cfg.split}" if cfg.split else stem

        # Shuffled images are the control: the score of a model that ignores the image.
        versions = [(stem, place, loaded.samples)]
        if cfg.shuffle_images or cfg.data is None:
            versions.append((f"{stem}, images shuffled", f"{place}-shuffled", shuffle_images(loaded.samples)))
        for name, place, samples in versions:
            # What the numbers depend on: answers made with other settings are not mixed in.
            settings = {**loaded.settings, "questions": questions_digest(samples), **source}
            if bench == "own":
                settings["metric"] = benchmark.score
            if not cfg.score_only:
                settings["max_new_tokens"] = cfg.max_new_tokens or loaded.max_new
            sets.append(Questions(name, bench, benchmark, loaded, samples[:cfg.limit], settings, out / place))
    return sets


def checkpoint_settings(cfg: "Config", folder: Path, ranks: Ranks) -> dict:
    """Return what a checkpoint's answers depend on. Raises UserError if it has learned captions alone."""
    use, files = read_usage(folder, cfg.vision), all_weights(folder, cfg.vision, cfg.llm)
    template = cfg.template or use.template
    if template == "plain":
        raise UserError(f"{folder} has learned captions (template plain), which leave no place for a question: use "
                        "--template v1 to ask all the same, and expect answers that cannot be parsed")
    return {"checkpoint": files_digest(files), "template": template,
            "pad": use.pad if cfg.pad is None else cfg.pad, "dtype": str(ranks.dtype).removeprefix("torch."),
            "after_special": cfg.after_special or use.after_special,
            "code_version": CODE_VERSION, "plain_specials": cfg.plain_specials}


def open_assistant(cfg: "Config", folder: Path, settings: dict, ranks: Ranks) -> Assistant:
    return Assistant.from_checkpoint(folder, ranks.device, ranks.dtype, settings["template"], cfg.vision, cfg.llm,
                                     settings["after_special"], settings["pad"], cfg.plain_specials)


# ------------------------------------------------------------------------------- asking and scoring
def evaluate(cfg: "Config", ranks: Ranks) -> list[dict]:
    """Ask, score and write. Every rank calls this; the first returns the contents of results.json."""
    # The answers come from a file, or from a model that is asked.
    if cfg.score_only:
        folder, answers = None, Path(cfg.score_only)
        cfg = replace(cfg, images=cfg.images or ".")        # no image is opened
        source, out = {"answers": cfg.score_only, "answers_crc": file_crc(answers)}, answers.with_suffix(".scored")
    else:
        folder = model_folder(cfg.ckpt)
        source, out = checkpoint_settings(cfg, folder, ranks), results_folder(folder)
    sets = load_questions(cfg, folder, Path(cfg.out or out), source)

    # Everything that can go wrong does so before the first question is asked.
    for q in sets:
        check_submission(q.benchmark, q.samples, Path(q.loaded.files[0]).parent)
        if not cfg.score_only:
            check_images_exist(q.samples)
    with contextlib.ExitStack() as stack:
        for q in sets:          # no second command writes there
            stack.enter_context(locked(q.out, ranks.first))
        if cfg.overwrite and ranks.first:
            for q in sets:
                remove([*q.out.glob("pred.*"), q.out / "results.json"])
        ranks.wait()

        # Answers of earlier runs count. The model is loaded only if questions are left to ask.
        done = [read_predictions(q.out, q.settings, len(q.samples))[0] for q in sets]
        assistant = None
        for q, answered in zip(sets, done):
            if not cfg.score_only and any(s.id not in answered for s in q.samples):
                assistant = assistant or open_assistant(cfg, folder, q.settings, ranks)
                answer_share(assistant, q, answered, cfg.batch_size, ranks)
        ranks.wait()            # then the first scores what all have written
        return [score_and_write(cfg, folder, q) for q in sets] if ranks.first else []


def score_and_write(cfg: "Config", folder: Path | None, q: Questions) -> dict:
    """Write pred.jsonl, results.json and the submission. Returns the contents of results.json."""
    settings, counts = {**q.settings, "limit": cfg.limit}, dict(q.loaded.counts)
    if cfg.score_only:
        predictions = read_answers(Path(cfg.score_only), q.samples, q.benchmark.repeats, counts)
    else:
        predictions, settings["batch_size"] = read_predictions(q.out, q.settings, len(q.samples))
    # --limit may cut the groups that MME and MMBench score: such groups are left out.
    partial = len(q.samples) < len(q.loaded.samples)
    rows, results = score(q.benchmark, q.samples, predictions, partial)
    counts["references that are none of the options"] = results["n_no_option"]
    submission = write_submission(q.benchmark, q.samples, rows, Path(q.loaded.files[0]).parent, q.out)
    report = {"benchmark": q.bench, "name": q.name, "checkpoint": folder and str(folder),
              "partial": partial, **results, "settings": settings, "files": q.loaded.files,
              "folder": str(q.out), "submission": submission, "warnings": notes(q, counts, submission),
              "versions": {"torch": torch.__version__, "code": CODE_VERSION}}
    write_json(q.out / "results.json", report)      # first: it says whose folder this is
    write_jsonl(q.out / "pred.jsonl", rows)
    return report


# -------------------------------------------------------------------------------------- the command
@dataclass
class Config:
    """Ask a checkpoint one question, the questions of a file, or a benchmark's; score the answers."""
    ckpt: str = option("out/toy", "folder of a checkpoint, a run (its newest one), or a released LLaVA", "run")
    out: str | None = option(None, "folder for the results (unset: eval/<checkpoint> beside it; released: out/eval)")
    overwrite: bool = option(False, "replace the answers and results in --out")
    batch_size: int = option(64, "questions at a time; with bfloat16 use 1 for numbers to publish", least=1)
    limit: int | None = option(None, "ask only the first N questions (unset: all)", least=1)
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it")
    prompt: str | None = option(None, "the question; the answer is printed", "one question")
    image: str | None = option(None, "the image that it is about (unset: none); without --prompt: talk about it")
    data: str | None = option(None, "JSONL, or --bench's file or folder (unset: the toy's questions)", "many questions")
    images: str | None = option(None, "the folder of their images")
    bench: Literal[tuple(BENCHMARKS)] | None = option(None, "a benchmark (unset: own, your questions)")
    labels: str | None = option(None, "file or folder of the labels (unset: beside --data)")
    split: str | None = option(None, "the benchmark's split (unset: that of the first files found)")
    shuffle_images: bool = option(False, "also ask each question about another one's image")
    template: Literal[tuple(TEMPLATES)] | None = option(None, "conversation (unset: the model's)", "prompts")
    after_special: Literal[RULES] | None = option(None, "spaces after </s>, in later turns (unset: the model's)")
    plain_specials: bool | None = option(None, "read </s> in a question as text (unset: as in training)")
    pad: bool | None = option(None, "pad images to a square, or crop them (unset: as the model was trained)")
    max_new_tokens: int | None = option(None, "tokens an answer (unset: the benchmark's, or 64)", least=1, most=2**16)
    style: Literal["llava", "lmms"] | None = option(None, "whose prompts (unset: lmms for parquet, else llava)")
    ocr: bool | None = option(None, "textvqa: show OCR tokens (unset: on for llava, off for lmms)")
    region: Literal["bbox", "seg"] = option("bbox", "refcoco: how the region is drawn")
    metric: Literal[OWN_RULES] | None = option(None, "rule for your questions (unset: exact)", "scoring")
    score_only: str | None = option(None, "score this file of {question_id, text} lines; no model is loaded")
    compare: list[str] | None = option(None, "print the results in these folders side by side")
    vision: str | None = option(None, "folder of the vision encoder (unset: as in training)", "parts that --ckpt lacks")
    llm: str | None = option(None, "folder of the language model (unset: as in training)")


def check(cfg: Config) -> None:
    """Raise UserError for flags that do not go together."""
    own, one = cfg.bench in (None, "own"), cfg.prompt is not None
    for wrong, text in [
            ((one or cfg.image) and (cfg.data or cfg.bench),
             "--prompt and --image ask about one image, --data and --bench the questions of a file"),
            (cfg.image and not Path(cfg.image).is_file(), f"--image {cfg.image} does not exist"),
            (own and (cfg.labels or cfg.split or cfg.style), "--labels, --split and --style need --bench"),
            (cfg.metric and not own, f"--metric is for your own questions; {cfg.bench} has its own rule"),
            (not own and not cfg.data, f"--bench {cfg.bench} needs --data: its file, or the folder that holds it"),
            (cfg.score_only and not cfg.data, "--score-only needs --data, the questions that were answered"),
            (cfg.score_only and not Path(cfg.score_only).is_file(), f"--score-only {cfg.score_only} is not a file"),
            (cfg.score_only and cfg.shuffle_images, "--shuffle-images asks a model; --score-only loads none")]:
        if wrong:
            raise UserError(text)


def main() -> None:
    cfg = parse(Config)
    check(cfg)
    if cfg.compare:             # no model, no ranks
        print(compare(cfg.compare))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"          # prompts are encoded in a thread of their own
    # Ranks share no step, they meet at the end: one may wait for another for days.
    ranks = start(*choose_device(cfg.device, cfg.dtype), minutes=7 * 24 * 60, gloo=True)
    with explain_lost_ranks(ranks):
        if cfg.prompt is None and cfg.image is None:
            reports = evaluate(cfg, ranks)
            if reports:         # on the first rank
                print(summary(reports))
        elif ranks.first:       # one prompt, or a conversation
            folder, image = model_folder(cfg.ckpt), Path(cfg.image) if cfg.image else None
            assistant = open_assistant(cfg, folder, checkpoint_settings(cfg, folder, ranks), ranks)
            if cfg.prompt is not None:
                print(assistant.answer([(cfg.prompt, image)], cfg.max_new_tokens or 64)[0])
            else:
                talk(assistant, image, cfg.max_new_tokens or 512)
        finish(ranks)           # last: under torchrun the process ends here


if __name__ == "__main__":
    run(main)
