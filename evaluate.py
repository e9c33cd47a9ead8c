"""Answers of a checkpoint to the questions of a file, scored: accuracy per category, beside that with shuffled images.

    python evaluate.py --ckpt out/toy                                     the toy's test questions
    python evaluate.py --ckpt DIR --data questions.jsonl --images DIR     your own: {question_id, image, text, answer}
    python evaluate.py --ckpt DIR --image photo.jpg --prompt "What is this?"
"""
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

import weights
from config import UserError, option, parse, read_json, run
from data import IMAGE, ImageProcessor, encode, end, open_image, question_file, read_questions
from metrics import accuracy, exact
from model import Llava
from tokenizer import load_tokenizer


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
    def from_checkpoint(cls, ckpt, vision=None, llm=None, device: str = "auto", dtype: str = "auto") -> "Assistant":
        folder = weights.checkpoint_folder(ckpt)
        c = read_json(folder / "config.json")
        device, dtype = weights.choose_device(device, dtype)
        model = weights.load(folder, vision, llm, dtype, device).eval()
        return cls(model, load_tokenizer(folder), ImageProcessor.from_folder(folder), c["template"], c["after_special"],
                   c["pad"])

    def answer(self, questions: list[tuple[str, Path | None]], max_new_tokens: int = 64) -> list[str]:
        """One batch of (text, image file or None) → greedy answers. Raises UserError for an unreadable image."""
        device = next(self.model.parameters()).device
        size, tokens = self.processor.crop_size, self.model.vision_tower.config.image_tokens
        prompts, pixels = [], []
        for text, path in questions:
            text = ("" if path is None else IMAGE + "\n") + text.replace(IMAGE, "").strip()
            ids, _, mask = encode([{"from": "human", "value": text}], self.tokenizer, self.template, tokens,
                                  after_special=self.after_special)
            prompts.append((ids, mask))
            try:
                image = torch.zeros(3, size, size) if path is None else self.processor(open_image(path), self.pad)
            except ValueError as e:
                raise UserError(f"{path}: {e}") from None
            pixels.append(image)
        ids, masks = zip(*prompts)
        eos = end(self.tokenizer, self.template)
        out = self.model.generate(list(ids), torch.stack(pixels).to(device), max_new_tokens, list(masks), eos)
        return [self.tokenizer.decode(o).strip() for o in out]


def predict(assistant: Assistant, rows: list[dict], images: Path | None, batch_size: int, max_new_tokens: int,
            shuffle: bool = False, name: str = "questions") -> list[str]:
    """Answers to rows of `read_questions`, in their order. shuffle: every question gets another one's image (a fixed
    permutation), which is what a model that does not look would score."""
    files = [None if r["image"] is None else images / r["image"] for r in rows]
    if shuffle:
        asked = [i for i, f in enumerate(files) if f is not None]
        for i, f in zip(asked, random.Random(0).sample([files[i] for i in asked], len(asked))):
            files[i] = f
    answers = []
    with tqdm(total=len(rows), desc=name, unit="q", leave=False) as bar:
        for s in range(0, len(rows), batch_size):
            part = range(s, min(s + batch_size, len(rows)))
            answers += assistant.answer([(rows[i]["text"], files[i]) for i in part], max_new_tokens)
            bar.update(len(part))
    return answers


def evaluate(assistant: Assistant, data: Path, images: Path | None, out: Path, batch_size: int = 64,
             max_new_tokens: int = 64, limit: int | None = None) -> dict:
    """Accuracy per category on a question file, and with shuffled images; writes <name>.predictions.jsonl to `out`."""
    rows = read_questions(data, images)[:limit]
    answers = predict(assistant, rows, images, batch_size, max_new_tokens, name=data.stem)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{data.stem}.predictions.jsonl", "w", encoding="utf-8") as f:
        for r, a in zip(rows, answers):
            hit = None if r["answer"] is None else exact(a, str(r["answer"]))
            f.write(json.dumps({**r, "prediction": a, "correct": hit}, ensure_ascii=False) + "\n")
    scored = [i for i, r in enumerate(rows) if r["answer"] is not None]

    def score(predictions):
        return accuracy([(rows[i]["category"], predictions[i], str(rows[i]["answer"])) for i in scored])
    result = {"n": len(rows), "n_scored": len(scored), "accuracy": score(answers)}
    if scored and any(r["image"] is not None for r in rows):
        shuffled = predict(assistant, rows, images, batch_size, max_new_tokens, True, data.stem + ", images shuffled")
        result["shuffled"] = score(shuffled)
    return result


def table(results: dict[str, dict[str, float]]) -> str:
    """Rows of accuracies by name, as aligned text."""
    columns = list(dict.fromkeys(c for r in results.values() for c in r))
    width = max(len(name) for name in results) + 2
    lines = [" " * width + "".join(f"{c:>{max(len(c), 5) + 2}}" for c in columns)]
    for name, r in results.items():
        cells = (f"{r[c]:.1f}" if c in r else "" for c in columns)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>{max(len(c), 5) + 2}}" for c, cell in zip(columns, cells)))
    return "\n".join(lines)


@dataclass
class Config:
    """Ask a checkpoint the questions of a file and score the answers, or ask it one question."""
    ckpt: str = option("out/toy", "a checkpoint's folder, or a run's (its newest checkpoint)")
    data: str | None = option(None, "questions, JSONL: {question_id, image, text, answer, category}; unset: the toy's")
    images: str | None = option(None, "the folder of their images")
    image: str | None = option(None, "one image, to be asked about with --prompt")
    prompt: str | None = option(None, "one question, answered on the terminal")
    out: str | None = option(None, "folder for predictions and results.json (default: eval/ beside the checkpoint)")
    overwrite: bool = option(False, "replace the results that are in --out")
    batch_size: int = option(64, "questions at a time")
    max_new_tokens: int = option(64, "longest answer, in tokens")
    limit: int | None = option(None, "only the first questions of the file")
    vision: str | None = option(None, "where the vision encoder of a stage-1 checkpoint is now")
    llm: str | None = option(None, "where its language model is now")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it")


def main() -> None:
    cfg = parse(Config)
    for name in ("batch_size", "max_new_tokens", "limit"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(cfg, name)}")
    one = cfg.image is not None or cfg.prompt is not None
    if one and cfg.data is not None:
        raise UserError("--data asks a file's questions, --image and --prompt ask one: give one or the other")
    if one and cfg.prompt is None:
        raise UserError('--image wants a question with it: --prompt "What is this?"')
    if cfg.image is not None and not Path(cfg.image).is_file():
        raise UserError(f"--image {cfg.image} does not exist")
    folder = weights.checkpoint_folder(cfg.ckpt)
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
    assistant = Assistant.from_checkpoint(folder, cfg.vision, cfg.llm, cfg.device, cfg.dtype)
    if one:
        print(assistant.answer([(cfg.prompt, cfg.image and Path(cfg.image))], cfg.max_new_tokens)[0])
        return
    results = {f.stem: evaluate(assistant, f, images, out, cfg.batch_size, cfg.max_new_tokens, cfg.limit)
               for f, images in files}
    report = {"checkpoint": str(folder), "settings": vars(cfg), "dtype": str(next(assistant.model.parameters()).dtype),
              **results}
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
