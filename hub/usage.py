"""What a whole model expects: a checkpoint says it, of a released one its family does."""
from dataclasses import dataclass
from pathlib import Path

from hub.checkpoint import checkpoint_folder, is_released, released_tower
from hub.configs import OURS, TINY, family_template, image_settings, read_config
from model import VisionConfig


@dataclass
class Usage:
    """How a model's prompts and images are prepared."""
    template: str
    after_special: str          # see common.text.encode_text
    pad: bool                   # images: padded to a square, or the centre cropped
    max_length: int
    tower: VisionConfig
    layer: int                  # of the tower, which the projector reads


def model_folder(path: str | Path) -> Path:
    """Return `path` if it is a released model, else the checkpoint that it means."""
    return Path(path) if is_released(path) else checkpoint_folder(path)


def read_usage(folder: Path, vision: str | Path | None = None) -> Usage:
    """Return what a checkpoint or a released model expects. vision: the folder of its vision encoder, for a model
    that holds no tower or no image settings. Raises UserError if it is needed and not given."""
    c = read_config(folder)
    if c.get("model_type") == OURS:
        return Usage(c["template"], c["after_special"], c["pad"], c.get("max_length", 2048),
                     VisionConfig(**c["vision_config"]), c["vision_layer"])
    tower, layer = released_tower(folder, vision)

    # Padding: as the image settings say (llava-hf's may), else LLaVA's own key.
    pad = image_settings(folder, vision)[1].get("do_pad")
    if pad is None:
        pad = c.get("image_aspect_ratio", "pad") == "pad"
    # LLaVA-1.5 was trained with transformers 4.31, MoCa with 4.37, TinyLLaVA with 4.40.
    later = c.get("use_moca") or c["model_type"] == TINY
    after_special = c.get("after_special", "4.37" if later else "4.31")
    return Usage(family_template(c), after_special, pad, c.get("tokenizer_model_max_length", 2048), tower, layer)
