"""python -m hub check FILE --show N: samples as the model gets them, on one HTML page without a script."""
from html import escape
from pathlib import Path

from common.flags import UserError
from common.images import data_uri
from common.text import show_token
from data import IGNORE, Format, Samples
from hub.configs import load_processor, vision_config
from hub.samples import read_samples
from hub.tokenizer import load_tokenizer

HEAD = """<!doctype html>
<!-- The page of `python -m hub check --show`. -->
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; }
body { margin: 1rem auto; padding: 0 1rem; max-width: 1100px; font: 15px/1.6 system-ui, sans-serif; }
h1, h2 { overflow-wrap: anywhere; font-size: 1.2rem; } h2 { font-size: 1rem; margin-bottom: 0; }
article { display: grid; grid-template-columns: 140px minmax(0, 1fr); gap: 1rem; align-items: start; }
article img { width: 100%; }
section { border-top: 1px solid #8886; padding-bottom: 1rem; }
section.vdep { background: #a070d022; }
.token { border: 1px solid #8886; border-radius: 4px; padding: 0 .3em; overflow-wrap: anywhere; white-space: pre-wrap; }
.answer { background: #2fa04f55; } .image { background: #3f7fd055; }
</style>
<h1>TITLE</h1>
<p>Each box is a token. <span class="token answer">Green</span> ones are supervised,
<span class="token image">blue</span> ones are the image. A purple sample is in VDEP mode.</p>
"""


def show_sample(samples: Samples, i: int) -> str:
    """Return one sample in HTML: its picture after preprocessing, and its tokens by kind."""
    example = samples[i]
    boxes, images = [], int(example.image_mask.sum())
    for token, label, image in zip(example.input_ids.tolist(), example.labels.tolist(),
                                   example.image_mask.tolist()):
        if not image:
            kind = "text" if label == IGNORE else "answer"
            text = show_token(samples.tokenizer, token).replace("\n", "↵")
            boxes.append(f'<bdi class="token {kind}">{escape(text)}</bdi>')
        elif images:                            # all tokens of the image are one box
            boxes.append(f'<bdi class="token image">{images} image tokens</bdi>')
            images = 0

    picture = "no image"
    if example.pixel_values is not None:
        uri = data_uri(samples.processor.picture(example.pixel_values))
        picture = f'<img alt="the picture after preprocessing" src="{uri}">'
    notes = [f"{len(example.input_ids)} positions, {int((example.labels != IGNORE).sum())} supervised"]
    if example.reconstruct:
        notes.append("VDEP mode: the image is to be predicted")
    if example.problem:
        notes.append(example.problem)
    kind = ' class="vdep"' if example.reconstruct else ""
    return (f"<section{kind}><h2>{escape(example.id)}</h2><p>{escape('; '.join(notes))}</p>\n"
            f"<article><div>{picture}</div><div>{' '.join(boxes)}</div></article></section>\n")


def sample_page(path: str, cfg) -> str:
    """Return the page of the first --show samples of a file. cfg: hub/check.py's CheckFlags."""
    file = read_samples(path)[0]
    if file.column("image").any() and cfg.images is None:
        raise UserError(f"{path} names images: say with --images in which folder they are")
    text = Format(cfg.template, vision_config(cfg.vision).image_tokens, cfg.max_length,
                  pad=cfg.template != "plain")
    samples = Samples(file, cfg.images or ".", load_tokenizer(cfg.llm), load_processor(cfg.vision), text)
    title = f"{Path(path).name} as the model gets it, template {cfg.template}"
    parts = [HEAD.replace("TITLE", escape(title))]
    for i in range(min(cfg.show, len(samples))):
        parts.append(show_sample(samples, i))
        if cfg.vdep and file[i].get("image") is not None:
            parts.append(show_sample(samples, i + len(samples)))                # the same one in VDEP mode
    return "".join(parts)
