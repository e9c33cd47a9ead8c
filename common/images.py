"""The one place where image files are opened."""
from pathlib import Path

import numpy as np
from PIL import Image


def open_image(path: Path) -> Image.Image:
    """Return a decoded image. Raises ValueError with the reason in a few words."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("empty file")
        image = Image.open(path)
        image.load()
        return with_8_bits(image)
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        reason = "not an image" if isinstance(e, Image.UnidentifiedImageError) else str(e) or type(e).__name__
        raise ValueError(reason) from None


def with_8_bits(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits a channel: of 16 the upper 8 are kept, as Pillow does with colour.
    Its `convert` would make all but the darkest grey white. 32-bit integers may hold 8 or 16 bits.
    Raises ValueError for more, and for floats."""
    if image.mode == "F":
        raise ValueError("its pixels are floats of unknown range: save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("its pixels have more than 16 bits: save it with 8 or 16")
    if image.mode != "I" or pixels.max() > 255:
        pixels = pixels >> 8
    return Image.fromarray(pixels.astype(np.uint8))
