"""LLaVA JSON + a folder of images → batches.

    python data.py --check FILE --images DIR               which samples of a file can be used, before a run finds out

    file   ─ SampleFile ─→ sample, read when it is asked for (index.py)
    sample ─ pieces ─→ text, and which characters are the assistant's ─ encode ─→ input_ids, labels, image_mask
    image  ─ ImageProcessor ─→ pixel_values                            ─ collate ─→ Batch (right-padded)

A text is encoded once, chunk by chunk around <image>, and labels come from the character offsets of the tokens: nothing
is counted twice, so nothing can mismatch. The order of samples is a function of (seed, epoch) alone, cut into global
batches: any number of ranks and accumulation steps sees the same ones, and a run resumes from its step number.
"""
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import UserError, option, parse, read_json, run
from index import IMAGE, SampleFile, sample_problem
from tokenizer import encode_text, load_tokenizer

IGNORE = -100
PLACEHOLDER = 0       # id at image and padding positions; masks, never ids, tell what a position is
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
LLAMA_2_SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual content that "
                  "the user provides, and assist the user with a variety of tasks using natural language.")


@dataclass(frozen=True)
class Template:
    """How a conversation is written. {system} stands where the first turn has the system prompt, {text} for the turn's
    text; an answer is supervised from its first character to its last, a question is not."""
    user: str
    answer: str
    eos: str                    # the token that ends an answer
    system: str = ""
    later: str = ""             # before every question but the first


TEMPLATES = {
    "plain": Template("", "{text}\n", "\n"),                                 # stage 1: <image> and the caption alone
    "v1": Template("{system}USER: {text} ASSISTANT:", " {text}</s>", "</s>", SYSTEM + " "),                # Vicuna
    "phi": Template("{system}USER: {text} ASSISTANT:", " {text}<|endoftext|>", "<|endoftext|>", SYSTEM + " "),
    "gemma": Template("{system}USER: {text} ASSISTANT:", " {text}<eos>", "<eos>", SYSTEM + " "),
    "llama_2": Template("[INST] {system}{text} [/INST]", " {text} </s>", "</s>",
                        f"<<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n", "<s>"),
    "mistral": Template("[INST] {text} [/INST]", " {text} </s>", "</s>"),
    "phi3": Template("<|user|>\n{text}<|end|>\n<|assistant|>\n", "{text}<|end|>", "<|end|>", "", "\n"),
}
FAMILY_TEMPLATE = {"mistral": "mistral", "phi": "phi", "phi3": "phi3", "gemma": "gemma"}      # of the others: v1


# ------------------------------------------------------------------------------------------------ text
def pieces(conversations: list[dict], template: str, image_first: bool = True) -> list[tuple[str, bool]]:
    """(text, is it supervised?) pieces of a conversation, as LLaVA-1.5 (phi, gemma: TinyLLaVA) writes it.

    plain (stage 1): the caption alone, "<image>a cat\\n"; the request is thrown away.
    v1 (Vicuna): "SYSTEM USER: <image>\\nWhat? ASSISTANT: A cat.</s>USER: …"; supervised: from the space before an
    answer through its </s>. Where the last turn is the user's, the text ends in "ASSISTANT:", to be answered.
    image_first: <image> moves to the front of its turn, as LLaVA has it; else it stays where it is."""
    t = TEMPLATES[template]
    turns = [(turn["from"], turn["value"]) for turn in conversations]
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]                                       # as LLaVA does
    if template == "plain":
        image = [(IMAGE, False)] * any(IMAGE in text for _, text in turns)
        return image + [(t.answer.replace("{text}", text), True) for who, text in turns if who == "gpt"]
    out = []
    for who, text in turns:
        if IMAGE in text and image_first:
            text = (IMAGE + "\n" + text.replace(IMAGE, "").strip()).strip()
        if who == "human":
            frame = t.later + t.user.replace("{system}", "") if out else t.user.replace("{system}", t.system)
            out.append((frame.replace("{text}", text), False))
        else:
            out.append((t.answer.replace("{text}", text), True))
    return out


def begin(tokenizer: Tokenizer) -> list[int]:
    """The id that a sequence begins with: <s> or <bos>; none where the family has none (Phi-2)."""
    return [i for i in map(tokenizer.token_to_id, ("<s>", "<bos>")) if i is not None][:1]


def end(tokenizer: Tokenizer, template: str) -> int:
    """The id that ends an answer in a template (in the plain one, the newline). Raises UserError if there is none."""
    eos = TEMPLATES[template].eos
    i = tokenizer.token_to_id(eos) if eos != "\n" else encode_text(tokenizer, eos)[0][-1]
    if i is None:
        raise UserError(f"the tokenizer has no {eos!r}, which template {template} needs: pick another --template")
    return i


def encode(conversations: list[dict], tokenizer: Tokenizer, template: str = "v1", image_tokens: int = 576,
           max_length: int | None = None, after_special: str = "4.31",
           image_first: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """One LLaVA sample → input_ids (T,) int64, labels (T,) int64 with -100 where not supervised, image_mask (T,) bool.

    <image> becomes `image_tokens` positions. Longer than max_length: the text is cut at the end; an image that would
    not fit whole is left out with all that follows it. Ids and labels are those of LLaVA-1.5 (trained with transformers
    4.31; after_special picks another version's rule), also for the samples that its code drops with "tokenization
    mismatch"."""
    ids = begin(tokenizer)
    labels, image = [IGNORE] * len(ids), [False] * len(ids)
    text = ""
    supervised = []                                             # per character
    for piece, target in pieces(conversations, template, image_first):
        text += piece
        supervised += [target] * len(piece)
    start = 0
    for n, chunk in enumerate(text.split(IMAGE)):
        if n:
            if max_length and len(ids) + image_tokens > max_length:
                break
            ids += [PLACEHOLDER] * image_tokens
            labels += [IGNORE] * image_tokens
            image += [True] * image_tokens
            start += len(IMAGE)
        chunk_ids, offsets = encode_text(tokenizer, chunk, after_special)
        ids += chunk_ids
        labels += [i if supervised[start + first] else IGNORE for i, (first, _) in zip(chunk_ids, offsets)]
        image += [False] * len(chunk_ids)
        start += len(chunk)
    cut = slice(max_length)
    return torch.tensor(ids[cut]), torch.tensor(labels[cut]), torch.tensor(image[cut])


# ------------------------------------------------------------------------------------------------ images
@dataclass
class ImageProcessor:
    """CLIP's and SigLIP's preprocessing, with Pillow as LLaVA used it."""
    size: int = 224                                             # of the shortest edge, in pixels
    crop_size: int = 224                                        # what comes out
    stretch: bool = False                                       # SigLIP: both edges to crop_size, no cropping
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ImageProcessor":
        c = read_json(Path(folder) / "preprocessor_config.json")
        absent = [k for k in ("size", "image_mean", "image_std") if k not in c]
        if absent:
            raise UserError(f"{folder}/preprocessor_config.json lacks {', '.join(absent)}: it is of another kind")

        def edge(size) -> int:                                  # 336, {"shortest_edge": 336} or {"height": 336, …}
            return size if isinstance(size, int) else size.get("shortest_edge") or size["height"]
        stretch = "crop_size" not in c or c.get("do_center_crop") is False
        if c.get("resample", 3) != 3:
            raise UserError(f"{folder}/preprocessor_config.json resamples by {c['resample']}; 3, bicubic, is supported")
        return cls(edge(c["size"]), edge(c["size"] if stretch else c["crop_size"]), stretch, tuple(c["image_mean"]),
                   tuple(c["image_std"]))

    def __call__(self, image: Image.Image, pad: bool) -> Tensor:
        """Pillow image → (3,H,W) float32. pad: onto a square of the mean colour first (stage 2), so that nothing is
        cropped; otherwise the centre is cropped (stage 1)."""
        image = image.convert("RGB")
        w, h = image.size
        if pad and w != h:
            side = max(w, h)
            square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in self.image_mean))
            square.paste(image, ((side - w) // 2, (side - h) // 2))
            image, w, h = square, side, side
        short, long = min(w, h), int(self.size * max(w, h) / min(w, h))
        to = (self.size,) * 2 if self.stretch else (self.size, long) if w == short else (long, self.size)
        image = image.resize(to, Image.Resampling.BICUBIC)
        left, top = (image.width - self.crop_size) // 2, (image.height - self.crop_size) // 2
        image = image.crop((left, top, left + self.crop_size, top + self.crop_size))
        x = (np.asarray(image, np.float32) / 255 - np.float32(self.image_mean)) / np.float32(self.image_std)
        return torch.from_numpy(x).permute(2, 0, 1).contiguous()   # (3,H,W)


def open_image(path: Path) -> Image.Image:
    """A decoded image. Raises ValueError with the reason in a few words."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("empty file")
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        reason = "not an image" if isinstance(e, Image.UnidentifiedImageError) else str(e) or type(e).__name__
        raise ValueError(reason) from None


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


# ------------------------------------------------------------------------------------------------ samples and batches
@dataclass
class Batch:
    """Right-padded. B samples, T positions; a sample without an image carries a zero one."""
    input_ids: Tensor         # (B,T) int64
    labels: Tensor            # (B,T) int64, -100: not supervised
    image_mask: Tensor        # (B,T) bool, the positions of the image
    attention_mask: Tensor    # (B,T) bool, False: padding
    pixel_values: Tensor      # (B,3,H,W) float32
    has_image: Tensor         # (B,) bool
    reconstruct: Tensor       # (B,) bool, VDEP mode: the image alone, to be predicted
    ids: list[str] = field(default_factory=list)      # of the samples, for messages
    bad: list[str] = field(default_factory=list)      # images that could not be read

    def text_after_image(self) -> Tensor:
        """(B,T) bool: the text tokens that see an image."""
        return self.attention_mask & ~self.image_mask & (self.image_mask.cumsum(1) > 0)

    def answer_tokens(self) -> Tensor:
        """(B,T) bool: the supervised tokens that see an image."""
        return (self.labels != IGNORE) & self.text_after_image()

    def to(self, device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Batch(**moved, ids=self.ids, bad=self.bad)

    def pin_memory(self) -> "Batch":
        return Batch(**{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in vars(self).items()})


def collate(samples: list[tuple], image_size: int) -> Batch:
    """samples: (input_ids, labels, image_mask, pixel_values or None, reconstruct, id, problem or None) each."""
    ids, labels, masks, pixels, reconstruct, names, problems = zip(*samples)

    def pad(rows, value):
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
    zero = torch.zeros(3, image_size, image_size)
    return Batch(pad(ids, PLACEHOLDER), pad(labels, IGNORE), pad(masks, False),
                 pad([torch.ones(len(i), dtype=torch.bool) for i in ids], False),
                 torch.stack([zero if p is None else p for p in pixels]),
                 torch.tensor([bool(m.any()) for m in masks]), torch.tensor(reconstruct), list(names),
                 [p for p in problems if p])


def read_jsonl(path: Path) -> list:
    """A value a line. Raises UserError with the line's number."""
    out = []
    try:
        with open(path, encoding="utf-8") as f:
            for n, line in enumerate(f, 1):            # noqa: B007, for the message below
                if line.strip():
                    out.append(json.loads(line))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} line {n}: not JSON ({e})") from None
    return out


def read_questions(path: str | Path, images: str | Path | None) -> list[dict]:
    """Rows of an evaluation file: JSONL of {question_id, image, text, answer, category}. All but `text` may be absent:
    the line's number, no image, no answer, category "all". Raises UserError naming the line."""
    rows, seen = [], set()
    for n, r in enumerate(read_jsonl(Path(path)), 1):
        if not isinstance(r, dict) or not isinstance(r.get("text"), str):
            raise UserError(f"{path} line {n} lacks a text, the question")
        r = {"question_id": n, "image": None, "answer": None, "category": "all", **r}
        if r["question_id"] in seen:
            raise UserError(f"{path} line {n}: question_id {r['question_id']!r} is there twice")
        seen.add(r["question_id"])
        if r["image"] is not None and images is None:
            raise UserError(f"{path} line {n} names an image: say with --images in which folder it is")
        rows.append(r)
    if not rows:
        raise UserError(f"{path} is empty: it holds no question")
    missing = [r["image"] for r in rows if r["image"] is not None and not (Path(images) / r["image"]).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of the images that {path} names are not in {images}, such as {missing[0]}")
    return rows


def question_file(ckpt: Path, data: str | None, images: str | None, default: str) -> tuple[Path, Path | None]:
    """(question file, image folder): those given, or the toy's beside a toy run's checkpoint."""
    if data is not None:
        return Path(data), None if images is None else Path(images)
    toy = ckpt.parent / "data"
    if not (toy / default).is_file():
        raise UserError(f"say with --data FILE.jsonl --images DIR what to ask: {ckpt} has no toy data beside it")
    return toy / default, toy / "images"


class Samples(torch.utils.data.Dataset):
    """samples[i] → what `collate` takes. i = -1 is a filler that carries no target: it completes an epoch's last batch;
    i ≥ len(samples) is sample i − len in VDEP mode (methods/vdep.py): its image alone. joint: every sample with an
    image is in both modes at once.

    An image that cannot be read makes a filler of its sample and is named in `Batch.bad`: the trainer decides."""
    def __init__(self, samples: SampleFile | list[dict], images: str | Path, tokenizer: Tokenizer,
                 processor: ImageProcessor, template: str, image_tokens: int, max_length: int, pad: bool,
                 after_special: str = "4.31", joint: bool = False):
        self.joint = joint
        self.samples, self.images, self.tokenizer, self.processor = samples, Path(images), tokenizer, processor
        self.pad, self.text = pad, (template, image_tokens, max_length, after_special)
        bos = torch.tensor(begin(tokenizer) or [PLACEHOLDER])
        self.filler = bos, torch.full_like(bos, IGNORE), torch.zeros_like(bos, dtype=torch.bool), None, False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple:
        if i < 0:
            return *self.filler, "filler", None
        reconstruct = i >= len(self)
        i -= len(self) * reconstruct
        s = self.samples[i]
        name = str(s.get("id", i))
        if reconstruct and s.get("image") is None:
            return *self.filler, name, None
        pixels = None
        if s.get("image") is not None:
            path = self.images / s["image"]
            try:
                pixels = self.processor(open_image(path), self.pad)
            except ValueError as e:
                return *self.filler, name, f"{path}: {e}"
        turns = [{"from": "human", "value": IMAGE}] if reconstruct else s["conversations"]
        reconstruct = reconstruct or self.joint and pixels is not None
        return *encode(turns, self.tokenizer, *self.text), pixels, reconstruct, name, None


# ------------------------------------------------------------------------------------------------ order
def epoch_order(n: int, global_batch: int, seed: int, epoch: int, lengths: np.ndarray | None = None,
                again: int = 0) -> np.ndarray:
    """Global batches of an epoch, (steps, global_batch) sample numbers: each of 0..n-1 once, then fillers (-1).

    again (without lengths): so many samples, drawn anew every epoch, come a second time in VDEP mode, as number + n.

    With lengths (negative: text alone) a batch is all image or all text, but for the one that takes both remainders,
    and its samples are sorted by length, so that those of a micro-batch need little padding (LLaVA's grouping)."""
    rng = np.random.default_rng([seed, epoch])
    numbers = np.arange(n, dtype=np.int32)                      # 4 bytes a sample: there may be millions
    order = rng.permutation(numbers)
    if again:
        order = rng.permutation(np.append(order, n + rng.permutation(numbers)[:again]))
    if lengths is None:
        return np.append(order, np.full(-len(order) % global_batch, -1, np.int32)).reshape(-1, global_batch)
    text = lengths[order] < 0
    kinds = order[~text], order[text]
    whole = [k[:len(k) // global_batch * global_batch].reshape(-1, global_batch) for k in kinds]
    rest = np.concatenate([k[w.size:] for k, w in zip(kinds, whole)])
    rest = np.append(rest, np.full(-len(rest) % global_batch, -1, np.int32)).reshape(-1, global_batch)
    batches = rng.permutation(np.concatenate([*whole, rest]))
    longest = np.append(np.abs(lengths), 0)                     # number -1, the filler, has length 0
    for batch in batches:
        batch[:] = batch[np.argsort(-longest[batch], kind="stable")]
    return batches


class Order:
    """Yields, for one rank, the sample numbers of one micro-batch after another, from step `start` on, without end.

    Rank r's a-th micro-batch of a step is slice a·ranks + r of the global batch: who computes it does not matter."""
    def __init__(self, n: int, global_batch: int, micro_batch: int, seed: int, lengths: np.ndarray | None = None,
                 rank: int = 0, ranks: int = 1, start: int = 0, again: int = 0):
        self.args, self.kinds = (n, global_batch, seed), (lengths, again)
        self.micro_batch, self.rank, self.ranks, self.start = micro_batch, rank, ranks, start
        self.steps_per_epoch = -(-(n + again) // global_batch)

    def __iter__(self):
        epoch, first = divmod(self.start, self.steps_per_epoch)
        while True:
            for batch in epoch_order(*self.args, epoch, *self.kinds)[first:]:
                for a in range(self.rank, len(batch) // self.micro_batch, self.ranks):
                    yield batch[a * self.micro_batch:(a + 1) * self.micro_batch].tolist()
            epoch, first = epoch + 1, 0


def loader(samples: Samples, order: Order, workers: int, pin: bool = False) -> DataLoader:
    """Batches in that order; `workers` processes decode ahead. Workers need no seeds: what a sample becomes depends on
    the sample alone, so that any number of them gives the same batches."""
    return DataLoader(samples, batch_sampler=order, num_workers=workers, pin_memory=pin,
                      collate_fn=partial(collate, image_size=samples.processor.crop_size))


# ------------------------------------------------------------------------------------------------ a look before a run
@dataclass
class Config:
    """Look through a file of samples before a run: exit code 0 if every sample can be used, 2 if not."""
    check: str | None = option(None, "LLaVA JSON or JSONL")
    images: str | None = option(None, "the folder of its images")
    llm: str | None = option(None, "a language model's folder: to find samples of which --max-length leaves no answer")
    template: Literal[tuple(TEMPLATES)] = option("v1", "with --llm: how a conversation is written")
    image_tokens: int = option(576, "with --llm: positions of an image")
    max_length: int = option(2048, "with --llm: positions a sample may have")
    out: str | None = option(None, "file for the list of the samples that cannot be used")


def check(cfg: Config) -> tuple[dict[str, int], dict[int, str]]:
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
        end(tokenizer, cfg.template)                            # else the template is another family's
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
    cfg = parse(Config)
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


if __name__ == "__main__":
    run(main)
