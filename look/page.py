"""Numbers → one HTML file, JSON, or pictures.

The page holds its data: tensors as 8-bit numbers between the least and the largest of each row, so that 576 patches of
33 layers fit. That changes a number by 1/510 of its row's range at most. --json has them unrounded.
"""
import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import write_text

TEMPLATE = Path(__file__).with_name("page.html")
HEAD_NUMBERS = 600_000              # attention of single heads in a page: as many tokens as fit, the question's last first


# ------------------------------------------------------------------------------------------------ into the page
def base64_of(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def pack(t: Tensor) -> dict:
    """A tensor for the page. Whole numbers as they are; others in 8 bits between the bounds of each last-axis row. NaN
    becomes the row's least number: the page knows where there is none."""
    if not t.is_floating_point():
        kind = np.uint16 if t.numel() == 0 or t.max() < 2 ** 16 else np.uint32
        array = t.cpu().numpy().astype(kind)
        return {"shape": list(t.shape), "type": array.dtype.name, "data": base64_of(array)}
    x = t.cpu().float().numpy()
    low, high = np.nanmin(x, axis=-1), np.nanmax(x, axis=-1)
    scale = np.where(high > low, high - low, 1)[..., None]
    steps = np.nan_to_num((x - low[..., None]) / scale * 255).round().astype(np.uint8)
    return {"shape": list(t.shape), "type": "scaled", "data": base64_of(steps),
            "low": base64_of(low.astype(np.float32)), "high": base64_of(high.astype(np.float32))}


def data_uri(image: Image.Image) -> str:
    """A picture inside the page: small ones without loss."""
    file = io.BytesIO()
    if image.width <= 128:
        image.save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    image.save(file, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def for_page(value):
    """A gathered value with its tensors packed and its pictures written out."""
    if isinstance(value, Tensor):
        return pack(value)
    if isinstance(value, Image.Image):
        return data_uri(value)
    if isinstance(value, dict):
        return {k: for_page(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_page(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def with_fewer_heads(look: dict) -> dict:
    """The same, with single heads of so many tokens as a page may hold. `head_rows` says which."""
    L, H, M, N = look["heads"].shape
    last = max(look["prompt_rows"] - 1, 0)
    order = [last, *range(last + 1, M), *range(last)]
    rows = sorted(order[:max(1, HEAD_NUMBERS // (L * H * N))])
    return {**look, "heads": look["heads"][:, :, rows], "head_rows": rows}


def write_page(path: Path, title: str, looks=(), run: dict | None = None, samples=(), refresh: int | None = None) -> None:
    """Write one self-contained page. Each of its three parts is shown where there is something to show. refresh:
    seconds after which a browser reads the file again."""
    data = for_page({"title": title, "looks": [with_fewer_heads(look) for look in looks], "run": run,
                     "samples": list(samples)})
    # "</" inside a string would end the script element early.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", text)
    meta = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page.replace("<!--REFRESH-->", meta))


# ------------------------------------------------------------------------------------------------ JSON and pictures
def as_lists(value):
    """A gathered value as plain JSON: tensors as nested lists, pictures left out, NaN as null."""
    if isinstance(value, Tensor):
        value = value.cpu().tolist()
    if isinstance(value, dict):
        return {k: as_lists(v) for k, v in value.items() if not isinstance(v, Image.Image)}
    if isinstance(value, (list, tuple)):
        return [as_lists(v) for v in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value


def overlay(picture: Image.Image, values: Tensor, side: int, first: int = 0, size: int = 336) -> Image.Image:
    """The picture, darker where a map (N,) is small. first: patches of the grid (side,side) that are no token."""
    grid = torch.cat([torch.zeros(first), values.cpu().float()]).nan_to_num().view(side, side)
    light = (grid / grid.max().clamp(min=1e-12) * 0.85 + 0.15).clamp(0, 1)
    veil = Image.fromarray((light * 255).byte().numpy()).resize((size, size), Image.Resampling.NEAREST)
    smooth = Image.Resampling.NEAREST if picture.width <= 128 else Image.Resampling.BICUBIC
    return Image.composite(picture.resize((size, size), smooth), Image.new("RGB", (size, size)), veil)


def write_pictures(folder: Path, look: dict) -> None:
    """Attention and similarity of the question's last token as PNG files, one a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    row = max(look["prompt_rows"] - 1, 0)
    look["picture"].save(folder / "picture.png")
    for kind in ("attention", "similarity"):
        for k, values in enumerate(look[kind], int(kind == "attention")):
            picture = overlay(look["picture"], values[row].clamp(min=0), look["side"], look["first"])
            picture.save(folder / f"{kind}-layer{k:02d}.png")
