"""Draw the two pictures of README: the data path, and what the toy answers and where it looks.

    python -m runs.pictures --ckpt out/toy --out docs

Needs a finished run of the toy (`python train.py`). Makes data-path.png and toy.png in --out.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from common.files import read_jsonl
from common.flags import UserError, option, parse, run
from evaluate import Assistant
from hub.checkpoint import checkpoint_folder
from look.gather import answer
from toy.world import CATEGORIES, COLUMNS, ROWS

# The colours of image, text, both, losses.
BLUE, AMBER, VIOLET, GREEN = (37, 99, 235), (217, 119, 6), (109, 40, 217), (5, 122, 85)
INK, GREY, LINE = (30, 41, 59), (100, 116, 139), (203, 213, 225)
WHITE, RED = (255, 255, 255), (185, 28, 28)
SCALE = 2                       # drawn this much larger than saved, so that edges are smooth


@dataclass
class Config:
    """Draw README's pictures from a toy run."""
    ckpt: str = option("out/toy", "the run's folder, or a checkpoint in it")
    out: str = option("docs", "folder for data-path.png and toy.png")
    layer: int = option(4, "the decoder layer whose attention is shown", least=1)


# ------------------------------------------------------------------------------------------ drawing
class Canvas:
    """A white picture, drawn SCALE times larger than saved. Coordinates: of the saved one."""
    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (SCALE * width, SCALE * height), WHITE)
        self.pen = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, size: int = 15, colour=INK, anchor: str = "mm") -> None:
        self.pen.text((SCALE * x, SCALE * y), text, colour, ImageFont.load_default(SCALE * size),
                      anchor)

    def box(self, x: float, y: float, w: float, h: float, colour, fill=None, radius: int = 8, width: int = 2) -> None:
        self.pen.rounded_rectangle([SCALE * v for v in (x, y, x + w, y + h)], SCALE * radius, fill,
                                   colour, SCALE * width)

    def module(self, x: float, y: float, w: float, h: float, colour, name: str, *notes: str) -> None:
        """A box that computes something: its name, and smaller lines below."""
        self.box(x, y, w, h, colour, pale(colour))
        top = y + h / 2 - 9 * len(notes)
        self.text(x + w / 2, top, name, 20, colour)
        for i, note in enumerate(notes, 1):
            self.text(x + w / 2, top + 4 + 19 * i, note, 15, GREY)

    def tensor(self, x: float, y: float, name: str, shape: str, colour=INK) -> None:
        """The name of a tensor with its shape below."""
        self.text(x, y - 10, name, 17, colour)
        self.text(x, y + 11, shape, 15, GREY)

    def arrow(self, *points: tuple[float, float], colour=GREY) -> None:
        """A line through points, with a head at the last one."""
        scaled = [(SCALE * x, SCALE * y) for x, y in points]
        self.pen.line(scaled, colour, 2 * SCALE, joint="curve")
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        back_x, back_y = x1 - 10 * dx, y1 - 10 * dy
        head = [(x1, y1), (back_x - 5 * dy, back_y + 5 * dx), (back_x + 5 * dy, back_y - 5 * dx)]
        self.pen.polygon([(SCALE * x, SCALE * y) for x, y in head], colour)

    def paste(self, image: Image.Image, x: float, y: float, size: int) -> None:
        self.image.paste(image.resize((SCALE * size, SCALE * size), Image.Resampling.NEAREST),
                         (SCALE * x, SCALE * y))

    def save(self, path: Path, colours: int | None = None) -> None:
        """Save a PNG at its own size; with `colours`, as a palette of so many, which is smaller."""
        small = self.image.resize([v // SCALE for v in self.image.size], Image.Resampling.BOX)
        if colours:
            small = small.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        small.save(path, optimize=True)


def pale(colour: tuple, share: float = 0.10) -> tuple:
    """The colour mixed into white."""
    return tuple(round(255 - share * (255 - c)) for c in colour)


# ------------------------------------------------------------------------------------ the data path
def draw_data_path(path: Path) -> None:
    """One batch: image and text enter Llava, hidden states leave it, a loss reads them."""
    c = Canvas(1200, 480)
    # The rows of the image, of the text, and of both.
    top, bottom, middle = 100, 284, 192

    c.tensor(84, top, "pixel_values", "(B, 3, H, W)", BLUE)
    c.arrow((150, top), (184, top))
    c.module(186, top - 46, 132, 92, BLUE, "ViT", "frozen", "layer -2, no CLS")
    c.arrow((318, top), (398, top))
    c.text(357, top - 14, "(B, N, Dv)", 15, GREY)
    c.module(400, top - 46, 132, 92, BLUE, "Projector", "trained in", "stages 1 and 2")
    c.arrow((532, top), (672, top), (672, middle - 48), colour=BLUE)
    c.tensor(601, top - 26, "image_embeds", "(B, N, D)", BLUE)

    c.tensor(84, bottom, "input_ids", "(B, T)", AMBER)
    c.arrow((150, bottom), (298, bottom))
    c.module(300, bottom - 37, 232, 74, AMBER, "embed_tokens", "the decoder's word vectors")
    c.arrow((532, bottom), (672, bottom), (672, middle + 48), colour=AMBER)
    c.tensor(601, bottom + 26, "text_embeds", "(B, T, D)", AMBER)

    c.module(606, middle - 46, 132, 92, VIOLET, "merge", "image where", "image_mask is")
    c.arrow((738, middle), (766, middle))
    notes = "L causal layers,", "MoCa after each;", "trained in stage 2"
    c.module(768, middle - 62, 150, 124, VIOLET, "Decoder", *notes)
    c.arrow((918, middle), (1050, middle))
    c.tensor(984, middle - 28, "hidden_states", "(B, T, D)", VIOLET)
    c.module(1052, middle - 62, 128, 124, GREEN, "losses.py", "ce, vdep,", "vista, das, sds:",
             "a sum each")
    # The losses read embeddings too: VDEP and BASIC those of the image, VISTA those of the text.
    c.arrow((672, top), (672, 34), (1116, 34), (1116, middle - 64), colour=BLUE)
    c.arrow((672, bottom), (672, 344), (1116, 344), (1116, middle + 64), colour=AMBER)

    # One sample, token by token: what image_mask and labels mark.
    words = "<s> ... USER: v1 v2 v3 ... vN Which row ... ASSISTANT: top </s>".split()
    x, y, h = 128, 392, 38
    c.text(64, y + h / 2, "one sample", 16, GREY)
    for i, word in enumerate(words):
        image, w = 3 <= i <= 7, 112 if word == "ASSISTANT:" else 71
        colour, share = AMBER, 0.10
        if image or i >= 12:
            colour, share = BLUE if image else GREEN, 0.28
        c.box(x, y, w - 5, h, colour, pale(colour, share), radius=5, width=1)
        c.text(x + (w - 5) / 2, y + h / 2, word, 15)
        if i in (3, 12):
            c.text(x, y + h + 20, "image_mask: N positions" if image else "labels: supervised", 15, colour, "lm")
        x += w
    c.save(path, 128)


# ------------------------------------------------------------------------------------------ the toy
def ask(assistant: Assistant, image: Image.Image, question: str, layer: int) -> tuple[str, torch.Tensor]:
    """Ask about an image. Returns the answer, and how the attention of the prompt's last token in a
    layer, averaged over heads, divides over the image tokens: (N,), sum 1."""
    inside = answer(assistant, image, question, 8)
    if layer > len(inside.attention):
        raise UserError(f"--layer {layer}: the decoder has layers 1 to {len(inside.attention)}")
    last = int((inside.rows < inside.answer).sum()) - 1
    attention = inside.attention[layer - 1, :, last].mean(0)[inside.image]                  # (N,)
    said = assistant.tokenizer.decode(inside.ids[inside.answer:].tolist()).strip()
    return said, attention / attention.sum()


def draw_card(c: Canvas, x: int, y: int, image: Image.Image, row: dict, answer: str, attention: torch.Tensor) -> None:
    """A scene, again under a veil that is thin where the model looks; question and answer below."""
    size, cells, shares = 144, len(ROWS), attention.tolist()
    most, right = max(shares), answer == row["answer"]
    c.box(x, y, 2 * size + 40, size + 96, LINE, radius=10, width=1)
    c.paste(image, x + 14, y + 14, size)

    veil = Image.new("RGB", image.size, WHITE)
    strength = Image.new("L", (cells, cells))
    strength.putdata([round(205 * (1 - a / most)) for a in shares])
    mask = strength.resize(image.size, Image.Resampling.NEAREST)
    left = x + size + 26
    c.paste(Image.composite(veil, image, mask), left, y + 14, size)
    step = size / cells
    for i, share in enumerate(shares):
        cell_x, cell_y = left + step * (i % len(COLUMNS)), y + 14 + step * (i // len(COLUMNS))
        c.box(cell_x, cell_y, step, step, LINE, radius=0, width=1)
        if share >= 0.1:
            c.box(cell_x + step - 38, cell_y + step - 18, 35, 15, LINE, WHITE, radius=4, width=1)
            c.text(cell_x + step - 20, cell_y + step - 10, f"{share:.0%}", 12)

    c.text(x + 16, y + size + 40, row["text"], 18, INK, "lm")
    c.text(x + 16, y + size + 70, answer, 20, GREEN if right else RED, "lm")
    note = row["category"] if right else f"{row['category']}: wrong, it is {row['answer']}"
    c.text(x + 2 * size + 24, y + size + 70, note, 15, GREY, "rm")


def draw_toy(path: Path, ckpt: Path, layer: int) -> None:
    """Six test scenes, one for each category, each another picture."""
    folder = checkpoint_folder(ckpt)
    run_folder = ckpt if (ckpt / "data").is_dir() else folder.parent
    data = run_folder / "data"
    assistant = Assistant.from_checkpoint(folder)
    rows = read_jsonl(data / "test.jsonl")
    c = Canvas(1056, 588)
    title = ("Test scenes of the toy. Left: the picture, 48 by 48 pixels. Right: how the attention "
             f"of the prompt's last token divides over the 9 image tokens (layer {layer}).")
    c.text(24, 28, title, 14, GREY, "lm")
    for n, category in enumerate(CATEGORIES):
        found = [row for row in rows if row["category"] == category]
        row = found[n * len(found) // len(CATEGORIES)]
        image = Image.open(data / "images" / row["image"]).convert("RGB")
        said, attention = ask(assistant, image, row["text"], layer)
        draw_card(c, 24 + 340 * (n % 3), 52 + 260 * (n // 3), image, row, said, attention)
    c.save(path)


def main() -> None:
    cfg = parse(Config)
    out, ckpt = Path(cfg.out), Path(cfg.ckpt)
    checkpoint_folder(ckpt)
    out.mkdir(parents=True, exist_ok=True)
    draw_data_path(out / "data-path.png")
    draw_toy(out / "toy.png", ckpt, cfg.layer)
    for name in ("data-path.png", "toy.png"):
        print(f"{out / name}: {(out / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run(main)
