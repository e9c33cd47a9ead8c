"""LLaVA JSON + a folder of images → batches.

    python data.py --check FILE --images DIR               which samples of a file can be used, before a run finds out

    file   ─ SampleFile ─→ sample, read when it is asked for (index.py)
    sample ─ pieces ─→ text, and which characters are the assistant's ─ encode ─→ input_ids, labels, image_mask
    image  ─ ImageProcessor ─→ pixel_values                            ─ collate ─→ Batch (right-padded)

A text is encoded once, chunk by chunk around <image>, and labels come from the character offsets of the tokens: nothing
is counted twice, so nothing can mismatch. The order of samples is a function of (seed, epoch) alone, cut into global
batches: any number of ranks and accumulation steps sees the same ones, and a run resumes from its step number.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, normalizers
from torch import Tensor
from torch.utils.data import DataLoader

from common.files import read_json
from common.flags import UserError

IGNORE = -100
PLACEHOLDER = 0       # id at image and padding positions; masks, never ids, tell what a position is
IMAGE = "<image>"
SPACE = "▁"       # how SentencePiece writes a space
RULES = "4.31", "4.37", "legacy"                          # for it, after special tokens: see encode_text
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


def bos_ids(tokenizer: Tokenizer) -> list[int]:
    """The id that a sequence begins with: <s> or <bos>; none where the family has none (Phi-2)."""
    return [i for i in map(tokenizer.token_to_id, ("<s>", "<bos>")) if i is not None][:1]


def eos_id(tokenizer: Tokenizer, template: str) -> int:
    """The id that ends an answer in a template (in the plain one, the newline). Raises UserError if there is none."""
    eos = TEMPLATES[template].eos
    i = tokenizer.token_to_id(eos) if eos != "\n" else encode_text(tokenizer, eos)[0][-1]
    if i is None:
        raise UserError(f"the tokenizer has no {eos!r}, which template {template} needs: pick another --template")
    return i


def encode_text(tokenizer: Tokenizer, text: str, after_special: str = "4.31") -> tuple[list[int], list[tuple]]:
    """Ids of a text, no BOS added, and the (start, end) characters of each.

    SentencePiece models put a space in front of a text ("USER" → "▁US" "ER"). What becomes of it in the text after a
    special token depends on the transformers that a model was trained with. Of "</s>USER" they make
        4.31     "</s>" "US" "ER"     cut off the first token again: LLaVA-1.5
        4.37     "</s>" "USER"        never there: LLaVA since February 2024
        legacy   "</s>" "▁US" "ER"    left there: legacy=True of either
    A real space stays in all three. Tokenizers that put no space in front are left alone."""
    assert after_special in RULES
    encoding = tokenizer.encode(text, add_special_tokens=False)
    prefixed = "".join(tokenizer.encode("a", add_special_tokens=False).tokens).startswith(SPACE)
    if after_special == "legacy" or not prefixed:
        return encoding.ids, encoding.offsets
    tokens = list(zip(encoding.ids, encoding.offsets))
    added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
    marks = [n for n, (i, _) in enumerate(tokens) if i in added and not added[i].normalized]    # these split a text
    if marks and after_special == "4.37":
        bare = Tokenizer(tokenizer.model)                               # the same vocabulary, not a copy
        bare.normalizer = normalizers.Replace(" ", SPACE)
        bare.add_tokens(list(added.values()))
    for mark, after in reversed(list(zip(marks, marks[1:] + [len(tokens)]))):      # from the end: numbers before stay
        if after == mark + 1:
            continue
        (_, start), (end, _) = tokens[mark][1], tokens[after][1] if after < len(tokens) else (len(text), 0)
        first = encoding.tokens[mark + 1]
        if after_special == "4.37":
            e = bare.encode(text[start:end], add_special_tokens=False)
            tokens[mark + 1:after] = [(i, (start + a, start + b)) for i, (a, b) in zip(e.ids, e.offsets)]
        elif first.startswith(SPACE) and text[start] not in (" ", SPACE):
            i = tokenizer.token_to_id(first[len(SPACE):])
            i = tokenizer.token_to_id("<unk>") if i is None else i
            tokens[mark + 1:mark + 2] = [(i, tokens[mark + 1][1])] if first != SPACE else []
    return [i for i, _ in tokens], [offsets for _, offsets in tokens]


def encode(conversations: list[dict], tokenizer: Tokenizer, template: str = "v1", image_tokens: int = 576,
           max_length: int | None = None, after_special: str = "4.31",
           image_first: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """One LLaVA sample → input_ids (T,) int64, labels (T,) int64 with -100 where not supervised, image_mask (T,) bool.

    <image> becomes `image_tokens` positions. Longer than max_length: the text is cut at the end; an image that would
    not fit whole is left out with all that follows it. Ids and labels are those of LLaVA-1.5 (trained with transformers
    4.31; after_special picks another version's rule), also for the samples that its code drops with "tokenization
    mismatch"."""
    ids = bos_ids(tokenizer)
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


class Samples(torch.utils.data.Dataset):
    """samples[i] → what `collate` takes. i = -1 is a filler that carries no target: it completes an epoch's last batch;
    i ≥ len(samples) is sample i − len in VDEP mode (methods/vdep.py): its image alone.

    An image that cannot be read makes a filler of its sample and is named in `Batch.bad`: the trainer decides."""
    def __init__(self, samples: Sequence[dict], images: str | Path, tokenizer: Tokenizer,
                 processor: ImageProcessor, template: str, image_tokens: int, max_length: int, pad: bool,
                 after_special: str = "4.31"):
        self.samples, self.images, self.tokenizer, self.processor = samples, Path(images), tokenizer, processor
        self.pad, self.text = pad, (template, image_tokens, max_length, after_special)
        bos = torch.tensor(bos_ids(tokenizer) or [PLACEHOLDER])
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
