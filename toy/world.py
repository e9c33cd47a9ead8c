"""The toy world: coloured shapes on a 3x3 grid, written in the formats of LLaVA.

    python -m toy.world --out data/toy --seed 1

writes images/*.png, pretrain.json (captions, stage 1), finetune.json (four-turn conversations,
stage 2) and the question files val.jsonl (to choose by), test.jsonl (to report) and
composition.jsonl (pairs that training never shows). The same seed gives the same bytes.

A scene is a tuple of objects (row, column, colour, shape) in reading order. A shape occurs at most
once, so that "the circle" names one object. Every phrase puts the noun last ("top left red
circle"): at the word that names the object, a causal model has read all that it needs.
"""
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from common.files import new_folder, refuse_existing
from common.flags import UserError, option, parse, run

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (220, 50, 47), "green": (60, 180, 75), "blue": (50, 100, 230),
           "yellow": (235, 205, 50)}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")          # no word in common with ROWS
NUMBERS = ("one", "two", "three")              # objects in a scene
HELD_OUT = {("red", "circle"), ("green", "square"), ("blue", "triangle")}     # never trained
CATEGORIES = ("existence", "adversarial", "count", "colour", "row", "column")
MIX = (1, 2, 1, 2, 6, 7)                       # how often stage 2 asks each: the hard ones more
REQUESTS = ("Describe the picture.", "What is in the picture?", "Write a caption.",
            "What do you see?")
CELL = 16                                      # pixels: the tiny CLIP's patch, so one image token
SIZE = 3 * CELL


# ------------------------------------------------------------------------------------------- scenes
def draw_scene(rng, count=None):
    """Draw a random scene of `count` objects (1 to 3 if None)."""
    count = count or rng.randint(1, 3)
    cells = sorted(rng.sample(range(9), count))
    shapes = rng.sample(SHAPES, count)
    return tuple((ROWS[c // 3], COLUMNS[c % 3], rng.choice(list(COLOURS)), s)
                 for c, s in zip(cells, shapes))


def split_of(scene):
    """Return the split of a scene. It depends on the scene alone, so splits never overlap."""
    if any((colour, shape) in HELD_OUT for _, _, colour, shape in scene):
        return "composition"
    part = hashlib.md5(repr(scene).encode()).digest()[0]       # 0 to 255: about 10, 10 and 80 %
    if part < 26:
        return "test"
    return "val" if part < 52 else "train"


def draw_from(split, rng, count=None):
    """Draw a random scene of one split."""
    while split_of(scene := draw_scene(rng, count)) != split:
        pass
    return scene


def render(scene, rng):
    """Draw the picture, SIZE x SIZE RGB, from one twice as large. Sizes, places, colours vary."""
    image = Image.new("RGB", (2 * SIZE, 2 * SIZE), tuple(rng.randint(25, 45) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for row, column, colour, shape in scene:
        r = rng.uniform(9, 13)
        x = (2 * COLUMNS.index(column) + 1) * CELL + rng.uniform(-2.5, 2.5)
        y = (2 * ROWS.index(row) + 1) * CELL + rng.uniform(-2.5, 2.5)
        fill = tuple(max(0, min(255, c + rng.randint(-20, 20))) for c in COLOURS[colour])
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        elif shape == "square":
            pen.rectangle((x - r * .85, y - r * .85, x + r * .85, y + r * .85), fill)
        elif shape == "triangle":
            pen.polygon(((x, y - r), (x - r, y + r * .8), (x + r, y + r * .8)), fill)
        else:
            pen.rectangle((x - r, y - r * .3, x + r, y + r * .3), fill)
            pen.rectangle((x - r * .3, y - r, x + r * .3, y + r), fill)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


# --------------------------------------------------------------------------------------------- text
def short_caption(scene, rng):
    things = rng.sample(scene, len(scene))
    return " and ".join(f"a {colour} {shape}" for _, _, colour, shape in things)


def long_caption(scene, rng):
    """Return everything there is to say, the objects in any order."""
    return ", ".join(" ".join(thing) for thing in rng.sample(scene, len(scene)))


def caption(scene, rng):
    """Return a caption for stage 1: two in three are long."""
    return short_caption(scene, rng) if rng.random() < 1 / 3 else long_caption(scene, rng)


def questions(scene, category, hard=True, avoid=HELD_OUT):
    """Return all that can be asked about a scene in one category, {answer: [questions]}. A pair of
    `avoid` is named only if the scene shows it. Existence denies an absent shape; adversarial, as
    POPE, what is likely: a shape that is there, in another colour, and if `hard` (where the scene
    allows) in the colour of a neighbour."""
    if category == "count":
        return {NUMBERS[len(scene) - 1]: ["How many objects are there?"]}
    shapes = {shape: {"row": row, "column": column, "colour": colour}
              for row, column, colour, shape in scene}
    if category in ("existence", "adversarial"):
        shown = [(colour, shape) for _, _, colour, shape in scene]
        taken = set(shown) | set(avoid)
        others = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in taken]
        absent = [(c, s) for c, s in others if s not in shapes]
        if category == "adversarial":
            absent = [(c, s) for c, s in others if s in shapes]
            swapped = [(c, s) for c, s in absent if c in [colour for colour, _ in shown]]
            if hard and swapped:
                absent = swapped
        return {"Yes": [f"Is there a {c} {s}?" for c, s in shown],
                "No": [f"Is there a {c} {s}?" for c, s in absent]}
    texts = {"colour": "What colour is the", "row": "Which row has the",
             "column": "Which column has the"}
    answers = {}
    for shape, thing in shapes.items():
        answers.setdefault(thing[category], []).append(f"{texts[category]} {shape}?")
    return answers


def ask(scene, category, rng, avoid=HELD_OUT):
    """Draw a (question, answer) to learn from. Existence is affirmed more often in fuller scenes:
    with Yes and No equally likely in every picture, neither picture nor question alone would tell
    anything, and learning stalls."""
    options = questions(scene, category, hard=rng.random() < .5, avoid=avoid)
    answer = rng.choice(sorted(options))
    if category == "existence":
        answer = "Yes" if rng.random() < len(scene) / 4 else "No"
    return rng.choice(options[answer]), answer


def conversation(scene, turns, rng):
    """Draw `turns` different (question, answer) pairs."""
    asked = {}
    while len(asked) < turns:
        asked.update([ask(scene, rng.choices(CATEGORIES, MIX)[0], rng)])
    return list(asked.items())


# -------------------------------------------------------------------------------------------- files
def turn(speaker, text):
    return {"from": speaker, "value": text}


def write_samples(path, samples):
    """Write a JSON list, one sample a line: five times as fast as json.dumps with an indent."""
    path.write_text("[\n" + ",\n".join(json.dumps(s) for s in samples) + "\n]\n", "utf-8")


def make_training(out, rng, images, conversations):
    pretrain, finetune = [], []
    for i in range(images):
        scene, name = draw_from("train", rng), f"train_{i:06d}"
        render(scene, rng).save(out / "images" / f"{name}.png", compress_level=1)
        pretrain.append({"id": name, "image": f"{name}.png", "conversations": [
            turn("human", "<image>\n" + rng.choice(REQUESTS)), turn("gpt", caption(scene, rng))]})
        for j in range(conversations):
            turns = []
            for question, answer in conversation(scene, 4, rng):
                turns += [turn("human", question), turn("gpt", answer)]
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            finetune.append({"id": f"{name}_{j}", "image": f"{name}.png", "conversations": turns})
    write_samples(out / "pretrain.json", pretrain)
    write_samples(out / "finetune.json", finetune)


def make_questions(out, rng, split, scenes):
    """Ask every scene one question of every category, for the answer that was right least often."""
    lines, seen = [], {category: {} for category in CATEGORIES}
    for i in range(scenes):
        scene, name = draw_from(split, rng, count=i % 3 + 1), f"{split}_{i:06d}"
        render(scene, rng).save(out / "images" / f"{name}.png", compress_level=1)
        for category, counts in seen.items():
            options = questions(scene, category)
            if split == "composition" and category != "count":
                options = about_unseen(scene, category, options)
            answer = min(sorted(options), key=lambda a: (counts.get(a, 0), rng.random()))
            counts[answer] = counts.get(answer, 0) + 1
            text = rng.choice(options[answer])
            lines.append({"question_id": f"{name}_{category}", "image": f"{name}.png", "text": text,
                          "answer": answer, "category": category})
    (out / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def about_unseen(scene, category, options):
    """Keep the questions about the pair that training never shows, and existence's No."""
    unseen = tuple(f" {shape}?" for _, _, colour, shape in scene if (colour, shape) in HELD_OUT)
    kept = {}
    for answer, texts in options.items():
        if (answer, category) != ("No", "existence"):
            texts = [text for text in texts if text.endswith(unseen)]
        if texts:
            kept[answer] = texts
    return kept


def make(out, seed=1, images=12000, conversations=4, scenes=300):
    """Write one data set to the folder `out`: `images` training pictures, each with a caption and
    `conversations` conversations; `scenes` pictures for each question file."""
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    print(f"making the toy: {images:,} pictures with captions and conversations", flush=True)
    make_training(out, random.Random(f"train {seed}"), images, conversations)
    for split in ("val", "test", "composition"):
        make_questions(out, random.Random(f"{split} {seed}"), split, scenes)


@dataclass
class ToyFlags:
    """Write the toy's data: pictures, samples of both stages, questions."""
    out: str | None = option(None, "a new folder")
    seed: int = option(1, "draws the scenes")


def main():
    flags = parse(ToyFlags)
    if flags.out is None:
        raise UserError("--out is missing: give the name of a new folder")
    refuse_existing(flags.out)
    with new_folder(Path(flags.out)) as folder:
        make(folder, flags.seed)


if __name__ == "__main__":
    run(main)
