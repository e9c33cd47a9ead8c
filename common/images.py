"""The one place where pictures are opened: of files and of bytes, of named formats, of bounded sizes."""
import io
import stat
from pathlib import Path

from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")   # no other decoder is tried: PostScript's starts ghostscript
MAX_PIXELS, MAX_SIDE, MAX_ASPECT = 89_478_485, 12_000, 200      # Pillow's bound; a square of 12,000² takes 576 MB


def read_header(source: Path | bytes) -> Image.Image:
    """Return an image that is not decoded yet. Raises ValueError with the reason in a few words."""
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        if isinstance(source, Path):
            status = source.stat()
            if not stat.S_ISREG(status.st_mode):                # a FIFO or a device would be read for ever
                raise ValueError("not a file")
            if status.st_size == 0:
                raise ValueError("empty file")
        image = Image.open(source, formats=FORMATS)
    except FileNotFoundError:
        raise ValueError("missing") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Exception as e:                                      # a decoder of a spoiled file raises anything
        raise ValueError(str(e) or type(e).__name__) from None
    w, h = image.size
    if w * h > MAX_PIXELS or max(w, h) > MAX_SIDE or max(w, h) > MAX_ASPECT * min(w, h):
        raise ValueError(f"{w} x {h} pixels; at most {MAX_SIDE:,} a side, {MAX_PIXELS:,} in all and an aspect of "
                         f"{MAX_ASPECT} are read")
    return image


def open_image(source: Path | bytes) -> Image.Image:
    """Return a decoded image. Raises ValueError with the reason in a few words."""
    image = read_header(source)
    try:
        image.load()
    except Exception as e:
        raise ValueError(str(e) or type(e).__name__) from None
    return image
