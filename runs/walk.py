"""Trace one batch of `--loss vista` on the toy, and write what happens to docs/walk.md.

    python -m runs.walk        writes docs/walk.md; tests/test_course.py compares it with the code
"""
import math
import random
import sys
import tempfile
from pathlib import Path

import torch

from common.flags import UserError, run
from data import IGNORE, Batch, Format, Samples, collate
from hub.configs import load_processor
from hub.released import load_llm, load_vision
from hub.tokenizer import load_tokenizer
from losses import Objective, count_terms
from model import Llava, Output, Projector
from toy import world
from training.settings import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


def two_samples(folder: Path) -> list[dict]:
    """Two pictures of the toy with one question each, drawn from fixed seeds."""
    samples = []
    for n in range(2):
        rng = random.Random(n)
        scene = world.draw_from("train", rng, count=n + 1)
        world.render(scene, rng).save(folder / f"{n}.png")
        question, answer = world.ask(scene, ("colour", "count")[n], rng)
        samples.append({"id": f"scene-{n}", "image": f"{n}.png", "conversations": [
            world.turn("human", f"<image>\n{question}"), world.turn("gpt", answer)]})
    return samples


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def shape(t: torch.Tensor) -> str:
    return "(" + ",".join(map(str, t.shape)) + ")"


def positions(b: int, batch: Batch, out: Output, tokenizer) -> list[list]:
    """A row a position of sample b: what it is, what it must predict, what VISTA asks of it."""
    last = int(batch.image_mask[b].nonzero()[-1])
    state, marked = out.hidden_states[b, last], batch.answer_tokens()[b]
    m, t, rows = int(marked.sum()), 0, []
    for p in range(int(batch.attention_mask[b].sum())):
        i, label = batch.input_ids[b, p].item(), batch.labels[b, p].item()
        word = "(image)" if batch.image_mask[b, p] else f"`{tokenizer.id_to_token(i)}`"
        cells = [p, i, word, "" if label == IGNORE else label, "", ""]
        if marked[p]:
            t += 1
            d = (out.text_embeds[b, p] - state).pow(2).mean().item()
            cells[4:] = [f"{t}/{m}", f"{d:.3g}"]
        rows.append(cells)
    return rows


def walk() -> str:
    """The page, as text. Numbers have three digits: more would differ between machines."""
    torch.manual_seed(1)
    vision = load_vision(ROOT / "toy/clip", torch.float32)
    llm = load_llm(ROOT / "toy/llm", torch.float32)
    model = Llava(vision, Projector(vision.config.hidden_size, llm.config.hidden_size), llm)
    vision.requires_grad_(False)
    tokenizer, cfg = load_tokenizer(ROOT / "toy/llm"), TrainConfig(loss="vista", stage="finetune")
    with tempfile.TemporaryDirectory() as folder:
        samples = two_samples(Path(folder))
        processor = load_processor(ROOT / "toy/clip")
        text = Format("v1", vision.config.image_tokens)
        data = Samples(samples, folder, tokenizer, processor, text)
        batch = collate([data[0], data[1]], processor.crop_size)

    out = model(batch)
    terms = Objective(model, cfg)(batch)
    counts = count_terms("vista", batch)
    loss = sum(t.weight * t.total / counts[t.name] for t in terms)
    loss.backward()

    rows = positions(1, batch, out, tokenizer)
    words, last = llm.config.vocab_size, int(batch.image_mask[1].nonzero()[-1])
    shapes = [
        ["pixel_values", shape(batch.pixel_values), "data.py", "the pictures"],
        ["input_ids, labels, masks", shape(batch.input_ids), "data.py", "padded on the right"],
        ["patches", shape(out.patches), "model.py, ViT",
         "the last layer but one, without the class token"],
        ["image_embeds", shape(out.image_embeds), "model.py, Projector",
         "image tokens, as wide as words"],
        ["text_embeds", shape(out.text_embeds), "model.py, embed",
         "x of VISTA at answer positions"],
        ["hidden_states", shape(out.hidden_states), "model.py, Decoder",
         "S_n at the last image position"],
        ["logits", f"({int(counts['ce'])},{words})", "methods/ce.py", "supervised positions alone"]]
    states = out.hidden_states[torch.arange(2), batch.image_mask.cumsum(1).argmax(1)]
    norms = {"image tokens, mean norm": out.image_embeds,
             "words, mean norm": out.text_embeds[batch.text_after_image()],
             "S_n, mean norm": states}
    norms = [[name, f"{x.detach().norm(dim=-1).mean():.3g}"] for name, x in norms.items()]
    results = []
    for t in terms:
        total, count = t.total.item(), int(counts[t.name])
        results.append([t.name, f"{total:.3g}", count, f"{total / count:.3g}"])
    trained = {"projector, linear_2.weight": model.multi_modal_projector.linear_2,
               "word embeddings": llm.model["embed_tokens"], "final norm": llm.model["norm"]}
    gradients = [[name, f"{p.weight.grad.norm():.2g}"] for name, p in trained.items()]
    said = []
    for s in samples:
        human, gpt = (turn["value"].replace("\n", "⏎") for turn in s["conversations"])
        said.append([s["id"], human, gpt])
    return f"""# One batch of `--loss vista`, step by step
Written by `python -m runs.walk`; a test compares this page with what the code does. The backbones are the toy's, the
projector is random, as at the first step of training. Read it with the files beside it.

## 1. Two samples
{table(["id", "human", "gpt"], said)}

data.py writes them as conversations, encodes each chunk of text around `<image>`, and labels what the assistant wrote.
The image becomes {out.image_embeds.shape[1]} positions. Sample {samples[1]["id"]}, position by position:

{table(["position", "id", "token", "label", "f(t)", "d(x, S)"], rows)}

A label stands at its own position; the state one position earlier predicts it. f(t) and d are VISTA's: t counts the
answer tokens, d is the mean squared difference to S_n, the state at position {last}.

## 2. Shapes on the way
{table(["tensor", "shape", "made by", ""], shapes)}

Logits exist at {int(counts["ce"])} of {batch.input_ids.numel()} positions, and no (B,T,V) tensor anywhere.

## 3. Scales
{table(["what", "value"], norms)}

## 4. Terms
{table(["term", "total", "count", "total / count"], results)}

Each total is divided by its count over the whole global batch, here this one batch. The loss is {loss.item():.3g}.

## 5. Gradients
{table(["parameter", "norm of its gradient"], gradients)}

The vision encoder has none: it is frozen. Word embeddings get theirs from two sides: as inputs, and as x of VISTA.

## Exercises
1. Compute f(t) · d / m for sample {samples[1]["id"]} by hand, and add the other sample's share from the total.
2. log {words} is {math.log(words):.3g}. Is the model at its first step better or worse than guessing? Why?
3. Which row of the table of positions changes if the template is `plain`? Run it: edit `two_samples` and compare.
"""


def main() -> None:
    if sys.argv[1:]:
        raise UserError(f"python -m runs.walk takes no {sys.argv[1]}: it writes docs/walk.md")
    (ROOT / "docs/walk.md").write_text(walk(), "utf-8")
    print("docs/walk.md")


if __name__ == "__main__":
    run(main)
