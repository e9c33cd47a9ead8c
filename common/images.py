"""The one place where image files are opened."""
from pathlib import Path

from PIL import Image


def open_image(path: Path) -> Image.Image:
    """Return a decoded image. Raises ValueError with the reason in a few words."""
    try:
        if path.stat().st_size == 0:
            raise ValueError("empty file")
        image = Image.open(path)
        image.load()
        return image
    except FileNotFoundError:
        raise ValueError("missing") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        reason = "not an image" if isinstance(e, Image.UnidentifiedImageError) else str(e) or type(e).__name__
        raise ValueError(reason) from None
