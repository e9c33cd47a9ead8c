"""Numbers → one HTML file, JSON, or pictures. The page holds tensors in 8 bits, JSON unrounded."""
import base64
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import write_text
from common.images import data_uri


def text_of(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def pack(t: Tensor) -> dict:
    """A tensor for the page: whole numbers as they are, others in 8 bits between the bounds of each
    row (last axis), off by 1/510 of that range at most. NaN becomes the row's least number."""
    if not t.is_floating_point():
        whole = t.cpu().numpy().astype(np.uint32)
        return {"shape": list(t.shape), "type": "uint32", "data": text_of(whole)}
    x = t.cpu().float().numpy()
    low, high = np.nanmin(x, axis=-1, keepdims=True), np.nanmax(x, axis=-1, keepdims=True)
    steps = np.nan_to_num((x - low) / np.where(high > low, high - low, 1) * 255).round()
    return {"shape": list(t.shape), "type": "uint8", "data": text_of(steps.astype(np.uint8)),
            "low": text_of(low), "high": text_of(high)}


def convert(value, tensor, picture):
    """A gathered value as JSON takes it. tensor, picture: what they become. Not finite: null."""
    if isinstance(value, Tensor):
        return convert(tensor(value), tensor, picture)
    if isinstance(value, Image.Image):
        return picture(value)
    if isinstance(value, dict):
        return {k: convert(v, tensor, picture) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [convert(v, tensor, picture) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_page(path: Path, title: str, looks=(), run=None, refresh: int | None = None) -> None:
    """Write one self-contained page of the given parts. refresh: seconds until it is read again."""
    data = {"title": title, "looks": looks, "run": run}
    text = json.dumps(convert(data, pack, data_uri), ensure_ascii=False, separators=(",", ":"))
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    if refresh:
        page = page.replace("<!--REFRESH-->", f'<meta http-equiv="refresh" content="{refresh}">')
    path.parent.mkdir(parents=True, exist_ok=True)
    text = text.replace("<", "\\u003c")                  # "</script>" would end the data early
    write_text(path, page.replace("{{DATA}}", text))


def overlay(picture: Image.Image, values: Tensor, side: int, first: int = 0, size: int = 336) -> Image.Image:
    """The picture, darker where a map (N,) is small; its cells begin at `first` of the grid."""
    grid = torch.zeros(side * side)
    grid[first:first + len(values)] = values.cpu().float().clamp(min=0)
    light = (grid / grid.max().clamp(min=1e-12) * 0.82 + 0.18) * 255
    veil = Image.fromarray(light.view(side, side).byte().numpy())
    veil = veil.resize((size, size), Image.Resampling.NEAREST)
    sharp = Image.Resampling.NEAREST if picture.width <= 128 else Image.Resampling.BICUBIC
    return Image.composite(picture.resize((size, size), sharp), Image.new("RGB", (size, size)), veil)


def write_pictures(folder: Path, look: dict) -> None:
    """Attention and similarity of the question's last token as PNG files, one a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    row = max(look["prompt_rows"] - 1, 0)
    look["picture"].save(folder / "picture.png")
    for kind, first_layer in (("attention", 1), ("similarity", 0)):
        for k, values in enumerate(look[kind], first_layer):
            picture = overlay(look["picture"], values[row], look["side"], look["first"])
            picture.save(folder / f"{kind}-layer{k:02d}.png")
