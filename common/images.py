"""The one place where pictures are opened: files or bytes, of named formats and bounded sizes."""
import base64
import io
import stat
from pathlib import Path

import numpy as np
from PIL import Image

# No other decoder is tried: PostScript's starts ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
MAX_PIXELS = 89_478_485         # Pillow's own bound
MAX_SIDE = 12_000               # a square of 12,000² takes 576 MB
MAX_ASPECT = 200                # longer to shorter side


def read_header(source: Path | bytes) -> Image.Image:
    """Return an image that is not decoded yet. Raises ValueError with the reason in a few words."""
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        if isinstance(source, Path):
            status = source.stat()
            if not stat.S_ISREG(status.st_mode):                # a FIFO may be read for ever
                raise ValueError("not a file")
            if status.st_size == 0:
                raise ValueError("empty file")
        image = Image.open(source, formats=FORMATS)
    except FileNotFoundError:
        raise ValueError("missing") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Exception as e:                                      # decoders raise anything
        raise ValueError(str(e) or type(e).__name__) from None
    w, h = image.size
    if w * h > MAX_PIXELS or max(w, h) > MAX_SIDE or max(w, h) > MAX_ASPECT * min(w, h):
        raise ValueError(f"{w} x {h} pixels; at most {MAX_SIDE:,} a side, {MAX_PIXELS:,} in all "
                         f"and an aspect of {MAX_ASPECT} are read")
    return image


def open_image(source: Path | bytes) -> Image.Image:
    """Return a decoded image. Raises ValueError with the reason in a few words."""
    image = read_header(source)
    try:
        image.load()
    except Exception as e:
        raise ValueError(str(e) or type(e).__name__) from None
    return with_8_bits(image)


def with_8_bits(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits a channel: of 16 the upper 8, as Pillow does with colour. (Its
    `convert` makes all but the darkest grey white.) Raises ValueError for more, and for floats."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels have more than 16 bits: save it with 8 or 16")
    if image.mode != "I" or pixels.max() > 255:     # 32-bit integers may hold 8 or 16 bits
        pixels = pixels >> 8
    return Image.fromarray(pixels.astype(np.uint8))


def data_uri(image: Image.Image) -> str:
    """Return a picture as text that stands inside a page: small ones without loss."""
    file, kind = io.BytesIO(), "PNG" if image.width <= 128 else "JPEG"
    image.save(file, kind, quality=88)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()
