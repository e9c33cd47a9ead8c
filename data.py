"""LLaVA samples → batches.

    sample ─ pieces ─→ text, and which characters the assistant wrote ─ encode ─→ input_ids, labels, image_mask
    image  ─ ImageProcessor ─→ pixel_values                            ─ collate ─→ Batch (right-padded)

Each chunk of text around <image> is encoded once. Labels come from the character offsets of the
tokens: no token is counted twice, so nothing can mismatch. The order of samples is a function of
(seed, epoch) alone, cut into global batches. So any number of ranks and accumulation steps sees
the same batches, and a run resumes from its step number.
Shape letters: B samples · T sequence positions · H, W pixels.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from common.flags import UserError
from common.images import open_image
from common.positions import Places, find_places
from common.templates import TEMPLATES
from common.text import bos_ids, encode_text, hide_specials

IGNORE = -100                                             # label of a position that is not supervised
IMAGE = "<image>"
PLACEHOLDER = 0                                           # id at image and padding positions; masks tell them apart


# --------------------------------------------------------------------------------------------- text
@dataclass(frozen=True)
class Format:
    """How a sample becomes ids and pixels. A checkpoint stores it, so that questions are written as training was."""
    template: str = "v1"
    image_tokens: int = 576
    max_length: int | None = 2048   # positions a sample may have; None: any
    pad: bool = True            # images: padded to a square (stage 2), or the centre cropped (stage 1)
    after_special: str = "4.31"
    image_first: bool = True    # move <image> to the front of its turn, as LLaVA does


def pieces(conversations: list[dict], template: str, image_first: bool = True) -> list[tuple[str, bool]]:
    """Write a conversation as LLaVA-1.5 does (phi, gemma: as TinyLLaVA does; from phi3 on: as the
    language model was tuned to). Returns (text, supervised) pieces.

    plain (stage 1): "<image>a cat\\n", the caption alone; the request is dropped.
    v1 (Vicuna): "SYSTEM USER: <image>\\nWhat? ASSISTANT: A cat.</s>USER: …"; supervised from the
    space before an answer through its </s>. If the user has the last turn, the text ends in
    "ASSISTANT:", to be continued.
    image_first: move <image> to the front of its turn, as LLaVA does; else leave it where it is."""
    t = TEMPLATES[template]
    turns = [(turn["from"], turn["value"]) for turn in conversations]
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]                                       # as LLaVA does
    out = []
    if template == "plain":
        if any(IMAGE in text for _, text in turns):
            out.append((IMAGE, False))
        for speaker, text in turns:
            if speaker == "gpt":
                out.append((t.answer.replace("{text}", text), True))
        return out
    for speaker, text in turns:
        if IMAGE in text and image_first:
            text = (IMAGE + "\n" + text.replace(IMAGE, "").strip()).strip()
        if t.strip:
            text = text.strip()
        if speaker == "gpt":
            out.append((t.answer.replace("{text}", text), True))
            if t.after:
                out.append((t.after, False))
        elif out:
            out.append((t.later + t.user.replace("{system}", "").replace("{text}", text), False))
        else:
            out.append((t.user.replace("{system}", t.system).replace("{text}", text), False))
    return out


def eos_id(tokenizer: Tokenizer, template: str) -> int:
    """Return the id that ends an answer (plain: the newline). Raises UserError if it has no id."""
    eos = TEMPLATES[template].eos
    if eos == "\n":
        return encode_text(tokenizer, eos)[0][-1]
    i = tokenizer.token_to_id(eos)
    if i is None:
        raise UserError(f"the tokenizer has no {eos!r}, which template {template} needs: pick another --template")
    return i


def encode(conversations: list[dict], tokenizer: Tokenizer, template: str = "v1", image_tokens: int = 576,
           max_length: int | None = None, after_special: str = "4.31",
           image_first: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """One LLaVA sample → input_ids (T,), labels (T,) with -100 where not supervised, image_mask (T,).

    <image> becomes `image_tokens` positions. A sample longer than max_length is cut at the end; an
    image that does not fit whole is left out with all that follows. Ids and labels are those of
    LLaVA-1.5 (transformers 4.31; after_special picks another version's rule), also for the samples
    that its code drops with "tokenization mismatch"."""
    if tokenizer.encode_special_tokens:                         # --plain-specials: </s> in a turn is text
        conversations = [{**t, "value": hide_specials(tokenizer, t["value"], keep=IMAGE)} for t in conversations]
    text, supervised = "", []                                   # one flag a character
    for piece, is_answer in pieces(conversations, template, image_first):
        text += piece
        supervised += [is_answer] * len(piece)

    text = text[:256 * max_length] if max_length else text      # the rest would be cut: no token has 256 characters
    ids = bos_ids(tokenizer)
    labels, image = [IGNORE] * len(ids), [False] * len(ids)
    start = 0                                                   # of the chunk, in characters of `text`
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
        image += [False] * len(chunk_ids)
        for i, (first, _) in zip(chunk_ids, offsets):
            labels.append(i if supervised[start + first] else IGNORE)
        start += len(chunk)
    cut = slice(max_length)
    return torch.tensor(ids[cut]), torch.tensor(labels[cut]), torch.tensor(image[cut])


# ------------------------------------------------------------------------------------------- images
@dataclass
class ImageProcessor:
    """CLIP's and SigLIP's preprocessing, with Pillow as LLaVA used it."""
    size: int = 224                                             # of the shortest edge, in pixels
    crop_size: int = 224                                        # edge of the result
    stretch: bool = False                                       # SigLIP: both edges to crop_size, no cropping
    image_mean: tuple = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple = (0.26862954, 0.26130258, 0.27577711)
    resample: int = 3                                           # Pillow's number: 3 bicubic, 2 bilinear (SigLIP2)

    def __call__(self, image: Image.Image, pad: bool) -> Tensor:
        """Pillow image → (3,H,W) float32. pad: onto a square of the mean colour first (stage 2), so
        that nothing is cropped; otherwise crop the centre (stage 1)."""
        image = image.convert("RGB")
        w, h = image.size
        if pad and w != h:
            side = max(w, h)
            square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in self.image_mean))
            square.paste(image, ((side - w) // 2, (side - h) // 2))
            image, w, h = square, side, side

        # Resize: to a fixed square, or the shortest edge to `size` with the aspect kept.
        long = self.size if self.stretch else int(self.size * max(w, h) / min(w, h))
        to = (self.size, long) if w <= h else (long, self.size)
        image = image.resize(to, Image.Resampling(self.resample))
        left, top = (image.width - self.crop_size) // 2, (image.height - self.crop_size) // 2
        image = image.crop((left, top, left + self.crop_size, top + self.crop_size))
        x = (np.asarray(image, np.float32) / 255 - np.float32(self.image_mean)) / np.float32(self.image_std)
        return torch.from_numpy(x).permute(2, 0, 1).contiguous()   # (3,H,W)

    def picture(self, pixels: Tensor) -> Image.Image:
        """(3,H,W) as returned above → the picture that the model gets."""
        x = pixels.permute(1, 2, 0) * torch.tensor(self.image_std) + torch.tensor(self.image_mean)
        return Image.fromarray((x.clamp(0, 1) * 255).round().byte().numpy())


# ------------------------------------------------------------------------------ samples and batches
@dataclass
class Example:
    """One sample, ready to be batched."""
    input_ids: Tensor                           # (T,) int64
    labels: Tensor                              # (T,) int64
    image_mask: Tensor                          # (T,) bool
    pixel_values: Tensor | None = None          # (3,H,W) float32
    reconstruct: bool = False                   # VDEP mode
    id: str = ""
    problem: str | None = None                  # why its image cannot be read


@dataclass
class Batch:
    """Right-padded. A sample without an image carries a zero image."""
    input_ids: Tensor         # (B,T) int64
    labels: Tensor            # (B,T) int64, -100: not supervised
    image_mask: Tensor        # (B,T) bool, the positions of the image
    attention_mask: Tensor    # (B,T) bool, False: padding
    pixel_values: Tensor      # (B,3,H,W) float32
    has_image: Tensor         # (B,) bool
    reconstruct: Tensor       # (B,) bool, VDEP mode: the image alone, to be predicted
    ids: list[str] = field(default_factory=list)      # of the samples, for messages
    bad: list[str] = field(default_factory=list)      # images that could not be read
    found: Places | None = field(default=None, init=False)

    def text_after_image(self) -> Tensor:
        """(B,T) bool: the text tokens that see an image."""
        return self.attention_mask & ~self.image_mask & (self.image_mask.cumsum(1) > 0)

    def answer_tokens(self) -> Tensor:
        """(B,T) bool: the supervised tokens that see an image."""
        return (self.labels != IGNORE) & self.text_after_image()

    @property
    def places(self) -> Places:
        return self.found or find_places(self.labels != IGNORE, self.text_after_image(), self.reconstruct)

    def to(self, device) -> "Batch":
        return self.moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        return self.moved(Tensor.pin_memory)

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        batch = replace(self, **{k: move(v) for k, v in vars(self).items() if isinstance(v, Tensor)})
        batch.found = Places(*map(move, self.places))     # found before the move, on the host
        return batch


def collate(examples: list[Example], image_size: int) -> Batch:
    """Pad examples on the right to one length."""
    pad = partial(pad_sequence, batch_first=True)
    zero = torch.zeros(3, image_size, image_size)
    return Batch(
        input_ids=pad([e.input_ids for e in examples], padding_value=PLACEHOLDER),
        labels=pad([e.labels for e in examples], padding_value=IGNORE),
        image_mask=pad([e.image_mask for e in examples]),
        attention_mask=pad([torch.ones(len(e.input_ids), dtype=torch.bool) for e in examples]),
        pixel_values=torch.stack([zero if e.pixel_values is None else e.pixel_values for e in examples]),
        has_image=torch.tensor([bool(e.image_mask.any()) for e in examples]),
        reconstruct=torch.tensor([e.reconstruct for e in examples]),
        ids=[e.id for e in examples],
        bad=[e.problem for e in examples if e.problem])


@dataclass
class Samples(Dataset):
    """samples[i] → Example. i = -1 is a filler that carries no target: it completes the last batch of an epoch.
    i ≥ len(samples) is sample i − len in VDEP mode (methods/vdep.py): its image alone. joint: every sample with an
    image is in both modes at once.
    An image that cannot be read makes a filler of its sample, and `Batch.bad` names it: the trainer decides."""
    samples: Sequence[dict]                     # hub/samples.py's SampleFile, or a list
    images: str | Path                          # the folder that `image` fields are relative to
    tokenizer: Tokenizer
    processor: ImageProcessor
    format: Format
    joint: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def filler(self, name: str = "filler", problem: str | None = None) -> Example:
        ids = torch.tensor(bos_ids(self.tokenizer) or [PLACEHOLDER])
        return Example(ids, torch.full_like(ids, IGNORE), ids < 0, id=name, problem=problem)

    def __getitem__(self, i: int) -> Example:
        if i < 0:
            return self.filler()
        reconstruct, i = i >= len(self), i % len(self)
        sample = self.samples[i]
        name, image, turns = str(sample.get("id", i)), sample.get("image"), sample["conversations"]
        if reconstruct:
            if image is None:
                return self.filler(name)
            turns = [{"from": "human", "value": IMAGE}]
        pixels = None
        if image is not None:
            path = Path(self.images) / image
            try:
                pixels = self.processor(open_image(path), self.format.pad)
            except ValueError as e:
                return self.filler(name, f"{path}: {e}")
        f = self.format
        ids, labels, mask = encode(turns, self.tokenizer, f.template, f.image_tokens, f.max_length, f.after_special,
                                   f.image_first)
        return Example(ids, labels, mask, pixels, reconstruct or (self.joint and pixels is not None), name)


# -------------------------------------------------------------------------------------------- order
@dataclass
class Order:
    """Sample numbers of one micro-batch after another, for one rank, without end.

    Rank r's a-th micro-batch of a step is slice a·ranks + r of the global batch."""
    n: int                              # samples
    global_batch: int
    micro_batch: int
    seed: int
    lengths: np.ndarray | None = None   # (n,) rough length, negative for text alone: batches are then of one modality
    rank: int = 0
    ranks: int = 1
    start: int = 0                      # the step to begin at
    vdep_samples: int = 0               # so many samples of an epoch come a second time, in VDEP mode, as number + n

    @property
    def steps_per_epoch(self) -> int:
        return -(-(self.n + self.vdep_samples) // self.global_batch)

    def fill(self, numbers: np.ndarray) -> np.ndarray:
        """Complete the last global batch with fillers (-1). Returns (steps, global_batch)."""
        fillers = np.full(-len(numbers) % self.global_batch, -1, np.int32)
        return np.append(numbers, fillers).reshape(-1, self.global_batch)

    def epoch(self, epoch: int) -> np.ndarray:
        """Sample numbers of an epoch, (steps, global_batch): each of 0..n-1 once, then fillers.

        With lengths (LLaVA's grouping) a batch is all image or all text, except the one that takes
        both remainders. It is sorted by length, so that a micro-batch needs little padding."""
        rng = np.random.default_rng([self.seed, epoch])
        numbers = np.arange(self.n, dtype=np.int32)             # 4 bytes a sample: there may be millions
        order = rng.permutation(numbers)
        if self.vdep_samples:
            again = self.n + rng.permutation(numbers)[:self.vdep_samples]
            order = rng.permutation(np.append(order, again))
        if self.lengths is None:
            return self.fill(order)

        # Whole batches of each modality, then one batch of what is left, in a random order.
        text_alone = self.lengths[order] < 0
        whole, rest = [], []
        for kind in (order[~text_alone], order[text_alone]):
            size = len(kind) // self.global_batch * self.global_batch
            whole.append(kind[:size].reshape(-1, self.global_batch))
            rest.append(kind[size:])
        batches = rng.permutation(np.concatenate([*whole, self.fill(np.concatenate(rest))]))
        length = np.append(np.abs(self.lengths), 0)             # number -1, the filler, has length 0
        for batch in batches:
            batch[:] = batch[np.argsort(-length[batch], kind="stable")]
        return batches

    def __iter__(self):
        epoch, first = divmod(self.start, self.steps_per_epoch)
        while True:
            for batch in self.epoch(epoch)[first:]:
                for a in range(self.rank, len(batch) // self.micro_batch, self.ranks):
                    yield batch[a * self.micro_batch:(a + 1) * self.micro_batch].tolist()
            epoch, first = epoch + 1, 0


def loader(samples: Samples, order: Order, workers: int, pin: bool = False) -> DataLoader:
    """Batches in that order; `workers` processes decode ahead. What a sample becomes depends on the
    sample alone, so workers need no seeds and any number of them gives the same batches."""
    return DataLoader(samples, batch_sampler=order, num_workers=workers, pin_memory=pin,
                      collate_fn=partial(collate, image_size=samples.processor.crop_size))


if __name__ == "__main__":
    raise SystemExit("data.py is a library. Check a data file: python -m hub check FILE --images DIR")
