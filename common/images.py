"""The one place where pictures are opened: files or bytes, of named formats and bounded sizes."""
import io
import stat
from pathlib import Path

from PIL import Image

# No other decoder is tried: PostScript's starts ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
# Pillow's own bound; the longer side, as a square of 12,000² takes 576 MB; longer to shorter side.
MAX_PIXELS, MAX_SIDE, MAX_ASPECT = 89_478_485, 12_000, 200


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
        raise ValueError(f"{w} x {h} pixels; at most {MAX_SIDE:,} a side, {MAX_PIXELS:,} in all and an "
                         f"aspect of {MAX_ASPECT} are read")
    return image


def open_image(source: Path | bytes) -> Image.Image:
    """Return a decoded image. Raises ValueError with the reason in a few words."""
    image = read_header(source)
    try:
        image.load()
    except Exception as e:
        raise ValueError(str(e) or type(e).__name__) from None
    return image
