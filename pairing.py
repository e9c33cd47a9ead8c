"""Image-text pairs to measure a model on: as a file pairs them, or images and texts from anywhere, paired at random.

Any pair of image and text will do for MIR, says its paper (§2.2); its numbers are of 100 images of TextVQA and 100
articles of CNN/DailyMail. Whether it is so for a model at hand is easily tried: this is what `mir.py` reads.
"""
import random
from pathlib import Path

from common.files import read_json, read_jsonl
from common.flags import UserError
from data import IMAGE, Batch, Samples, collate
from hub.samples import read_questions, read_samples

IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
TEXT_FILES = (".story", ".txt")


class Batches:
    """A sequence of batches, each prepared when it is asked for: any number of pairs takes the memory of a few."""
    def __init__(self, samples: Samples, batch_size: int):
        self.samples, self.batch_size = samples, batch_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __getitem__(self, i: int) -> Batch:
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = range(i * self.batch_size, min((i + 1) * self.batch_size, len(self.samples)))
        batch = collate([self.samples[j] for j in part], self.samples.processor.crop_size)
        if batch.bad:
            raise UserError(f"{batch.bad[0]}: mend it, or take it out")
        return batch


def sample(image: str, answer: str, question: str = "") -> dict:
    """One pair as LLaVA writes it."""
    question, answer = (t.replace(IMAGE, "").strip() for t in (question, answer))
    return {"id": image, "image": image, "conversations": [
        {"from": "human", "value": f"{IMAGE}\n{question}"}, {"from": "gpt", "value": answer}]}


def read_pairs(path: Path, images: Path | None, n: int, seed: int | None = None) -> list[dict]:
    """n samples with an image and an answer of a question file or of LLaVA's JSON or JSONL: the first n, or with a seed
    any n; all of them where they are fewer. Raises UserError if they are fewer than 2."""
    rows = read_rows(path)
    if rows and isinstance(rows[0], dict) and "conversations" in rows[0]:
        samples = [s for s in read_samples(path)[0] if s.get("image") is not None]
        if samples and images is None:
            raise UserError(f"{path} names images: say with --images in which folder they are")
    else:
        samples = [sample(r["image"], str(r["answer"]), r["text"]) for r in read_questions(path, images)
                   if r["image"] is not None and r["answer"] is not None]
    if len(samples) < 2:
        raise UserError(f"{path} has {len(samples)} samples with an image and an answer; MIR needs 2 at least")
    return samples[:n] if seed is None else random.Random(seed).sample(samples, min(n, len(samples)))


def mix_pairs(images: Path, texts: Path, n: int, seed: int) -> tuple[list[dict], Path]:
    """(n samples, their image folder): n images and n texts, drawn and paired as a function of the seed alone.

    images: a folder, or JSON or JSONL with an `image` each, relative to the file's folder or to images/ in it.
    texts: a folder of .story (CNN/DailyMail, cut before the first @highlight) and .txt files; one .txt, a text a line;
    JSON or JSONL of strings, of {"text"}, or of LLaVA's samples, of which the first answer is taken.
    Raises UserError if either has fewer than n."""
    rng = random.Random(seed)
    root, names = find_images(images)
    sources = find_texts(texts)
    rng.shuffle(names)
    rng.shuffle(sources)
    kept = []
    for source in sources:                                  # files are read only as far as they are needed
        text = read_text(source).strip()
        kept += [text] if text else []
        if len(kept) == n:
            break
    for path, there, what in ((images, len(names), "images"), (texts, len(kept), "texts that are not empty")):
        if there < n:
            raise UserError(f"{path} has {there} {what}; -n {n} wants as many: give it more, or a smaller -n")
    return [sample(image, text) for image, text in zip(names, kept)], root


def find_images(path: Path) -> tuple[Path, list[str]]:
    """(folder, names relative to it), in an order that does not depend on the disk."""
    if path.is_dir():
        return path, sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.suffix.lower() in IMAGE_FILES)
    names = {r.get("image") for r in read_rows(path) if isinstance(r, dict)}
    names = sorted(name for name in names if isinstance(name, str))
    folders = (path.parent, path.parent / "images")
    root = next((f for f in folders if names and (f / names[0]).is_file()), None)
    if names and root is None:
        raise UserError(f"{path} names {names[0]}, which is neither in {folders[0]} nor in {folders[1]}: give the "
                        "folder of the images instead")
    return root or path.parent, names


def find_texts(path: Path) -> list[Path | str]:
    """Texts, or files that hold one each."""
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
    text = source.read_text(encoding="utf-8", errors="replace")
    return text.split("@highlight")[0] if source.suffix == ".story" else text


def read_rows(path: Path) -> list:
    rows = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path} is not a list: JSON of a list, or a line of JSON each, is wanted")
    return rows


def text_of(row, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if isinstance(row, dict) and isinstance(row.get("conversations"), list):
        text = next((t.get("value") for t in row["conversations"] if t.get("from") == "gpt"), None)
    if not isinstance(text, str):
        raise UserError(f'{where} is no text: a string, {{"text": …}} or a sample of LLaVA is wanted')
    return text
