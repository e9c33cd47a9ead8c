"""Image-text pairs to measure a model on: pairs of one file, or images and texts mixed at random.

    read_pairs, mix_pairs, choose_pairs     files → samples as LLaVA writes them
    pair_batches                            samples → batches as a checkpoint reads them (`PairBatches`)

MIR's paper (§2.2) says that any image and any text will do; its numbers are of 100 images of
TextVQA and 100 articles of CNN/DailyMail. `python mir.py --images … --texts …` tests that claim.
"""
import random
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from common.files import read_json, read_jsonl, refuse_device
from common.flags import UserError
from data import IMAGE, Batch, Format, Samples, collate
from hub.configs import load_processor
from hub.samples import question_file, read_questions, read_samples
from hub.tokenizer import load_tokenizer
from hub.usage import read_usage

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
TEXT_FILES = (".story", ".txt")


# -------------------------------------------------------------------------------- samples → batches
@dataclass
class PairBatches:
    """A sequence of batches, each prepared on access: memory does not grow with their number."""
    samples: Samples
    batch_size: int = 20

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        """Return batch i. Raises UserError naming an image that cannot be read."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        numbers = range(len(self.samples))[i * self.batch_size:(i + 1) * self.batch_size]
        batch = collate([self.samples[j] for j in numbers], self.samples.processor.crop_size)
        if batch.bad:
            raise UserError(f"{batch.bad[0]}: repair it, or take it out of the pairs")
        return batch


def pair_batches(folder: Path, samples: list[dict], images: Path, template: str | None = None,
                 batch_size: int = 20, vision: Path | None = None, as_released: bool = False) -> PairBatches:
    """Return samples as the model in `folder` reads them. vision: its vision encoder's folder, if
    elsewhere. template None: the model's; v1 instead of plain (stage 1).

    as_released: as the script of MIR's paper does. Images are treated as in training (centre crop
    after stage 1), text is never cut, an empty question keeps its newline: "<image>\\n ASSISTANT:".
    Otherwise images are padded to a square, text is cut at max_length, that newline is stripped."""
    use = read_usage(folder, vision)
    if template is None:
        template = "v1" if use.template == "plain" else use.template
    text = Format(template, use.image_tokens, use.max_length, True, use.after_special)
    if as_released:
        samples = [image_in_front(s) for s in samples]
        text = replace(text, max_length=None, pad=use.pad, image_first=False)
    tokenizer, processor = load_tokenizer(folder), load_processor(folder, vision)
    return PairBatches(Samples(samples, images, tokenizer, processor, text), batch_size)


def held_out(data: Samples, path: Path, images: str | Path) -> list[Batch]:
    """Return a file's first 100 pairs as batches, written as `data` is; in v1 if that is plain."""
    template = "v1" if data.format.template == "plain" else data.format.template
    text = replace(data.format, template=template, pad=True)
    pairs = read_pairs(path, Path(images), 100)
    return list(PairBatches(Samples(pairs, images, data.tokenizer, data.processor, text)))


# ---------------------------------------------------------------------------------- files → samples
def sample(image: str, answer: str, question: str = "") -> dict:
    """Return one pair as LLaVA writes it."""
    question, answer = (t.replace(IMAGE, "").strip() for t in (question, answer))
    return {"id": image, "image": image, "conversations": [
        {"from": "human", "value": f"{IMAGE}\n{question}"}, {"from": "gpt", "value": answer}]}


def image_in_front(s: dict) -> dict:
    """Return the sample with "<image>\\n" in front of its question, which may be empty."""
    turns = []
    for turn in s["conversations"]:
        if IMAGE in turn["value"]:
            turn = {**turn, "value": IMAGE + "\n" + turn["value"].replace(IMAGE, "").strip()}
        turns.append(turn)
    return {**s, "conversations": turns}


def choose_pairs(folder: Path, data: str | None, images: str | None, texts: str | None, n: int,
                 seed: int | None) -> tuple[list[dict], Path]:
    """Return (samples, image folder). folder: a checkpoint; the toy's has its data beside it."""
    if texts is None:
        path, root = question_file(folder, data, images, "val.jsonl")
        return read_pairs(path, root, n, seed), root
    if data or not images:
        raise UserError("--texts is paired with --images DIR|JSON, and stands in the place "
                        "of --data")
    for path in (images, texts):
        if not Path(path).exists():
            raise UserError(f"{path} does not exist")
    return mix_pairs(Path(images), Path(texts), n, seed or 0)


def read_pairs(path: Path, images: Path | None, n: int, seed: int | None = None) -> list[dict]:
    """Return samples with an image and an answer, of a question file or of LLaVA's JSON or JSONL:
    the first n, or n drawn by `seed`. Raises UserError for fewer than 2."""
    rows = read_rows(path)
    if rows and isinstance(rows[0], dict) and "conversations" in rows[0]:
        samples = [s for s in read_samples(path)[0] if s.get("image") is not None]
        if samples and images is None:
            raise UserError(f"{path} names images: say with --images in which folder they are")
    else:
        samples = []
        for r in read_questions(path, images):
            if r["image"] is not None and r["answer"] is not None:
                samples.append(sample(r["image"], str(r["answer"]), r["text"]))
    if len(samples) < 2:
        raise UserError(f"{path} has {len(samples)} samples with an image and an answer; MIR "
                        "needs 2 at least")
    return samples[:n] if seed is None else random.Random(seed).sample(samples, min(n, len(samples)))


def mix_pairs(images: Path, texts: Path, n: int, seed: int) -> tuple[list[dict], Path]:
    """Return (n samples, their image folder): images and texts drawn and paired by the seed alone.

    images: a folder, or JSON or JSONL with an `image` each, relative to the file's folder or to
    images/ in it. texts: a folder of .story (CNN/DailyMail, cut before the first @highlight) and
    .txt files; one .txt, a text a line; JSON or JSONL of strings, of {"text"}, or of LLaVA's
    samples (their first answer). Raises UserError if either has fewer than n."""
    rng = random.Random(seed)
    root, names = find_images(images)
    sources = find_texts(texts)
    rng.shuffle(names)
    rng.shuffle(sources)
    contents = (read_text(source).strip() for source in sources)
    kept = list(islice(filter(None, contents), n))          # no more files are read than needed
    for path, there, what in ((images, len(names), "images"),
                              (texts, len(kept), "texts that are not empty")):
        if there < n:
            raise UserError(f"{path} has {there} {what}; -n {n} wants as many: give it more, or a "
                            "smaller -n")
    return [sample(image, text) for image, text in zip(names, kept)], root


def find_images(path: Path) -> tuple[Path, list[str]]:
    """Return (folder, names relative to it), in an order that does not depend on the disk."""
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.suffix.lower() in IMAGE_FILES]
        return path, sorted(str(p.relative_to(path)) for p in files)
    names = [r.get("image") for r in read_rows(path) if isinstance(r, dict)]
    names = sorted({name for name in names if isinstance(name, str)})
    folders = (path.parent, path.parent / "images")
    root = next((f for f in folders if names and (f / names[0]).is_file()), None)
    if names and root is None:
        raise UserError(f"{path} names {names[0]}, which is neither in {folders[0]} nor in "
                        f"{folders[1]}: give the folder of the images instead")
    return root or path.parent, names


def find_texts(path: Path) -> list[Path | str]:
    """Return texts, or files that hold one each."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_FILES)
    if path.suffix == ".story":
        return [path]
    if path.suffix == ".txt":
        return read_text(path).splitlines()
    return [text_of(row, f"{path}, entry {i}") for i, row in enumerate(read_rows(path), 1)]


def read_text(source: Path | str) -> str:
    if isinstance(source, str):
        return source
    refuse_device(source)
    text = source.read_text(encoding="utf-8", errors="replace")
    return text.split("@highlight")[0] if source.suffix == ".story" else text


def read_rows(path: Path) -> list:
    rows = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list: give a JSON list, or one JSON value a line")
    return rows


def text_of(row, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if isinstance(row, dict) and isinstance(row.get("conversations"), list):
        turns = [t for t in row["conversations"] if isinstance(t, dict)]
        text = next((t.get("value") for t in turns if t.get("from") == "gpt"), None)
    if not isinstance(text, str):
        raise UserError(f'{where} is no text: give a string, {{"text": …}} or a sample of LLaVA')
    return text
