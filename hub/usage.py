"""What a whole model expects: a checkpoint says it, of a released one its family does."""
from dataclasses import dataclass
from pathlib import Path

from hub.checkpoint import checkpoint_folder, is_released, is_whole, released_tower
from hub.configs import OURS, TINY, image_settings, read_config, vision_config
from hub.connectors import configured, image_tokens
from hub.tensors import weight_files
from hub.tokenizer import family_template


@dataclass
class Usage:
    """How a model's prompts and images are prepared."""
    template: str
    after_special: str          # see common.text.encode_text
    pad: bool                   # images: padded to a square, or the centre cropped
    max_length: int
    layer: int                  # of the vision encoder, which the projector reads
    image_tokens: int           # that the projector makes of an image


def model_folder(path: str | Path) -> Path:
    """Return `path` if it is a released model, else the checkpoint that it means."""
    return Path(path) if is_released(path) else checkpoint_folder(path)


def results_folder(folder: Path) -> Path:
    """Return where results go without --out: beside our checkpoints, not beside other weights."""
    if is_released(folder):
        return Path("out/eval") / folder.resolve().name
    return folder.parent / "eval" / folder.name


def all_weights(folder: Path, vision: str | Path | None, llm: str | Path | None) -> list[Path]:
    """Return the files of a model's weights, with those of the parts that lie elsewhere."""
    files, bases = weight_files(folder), [vision]
    if not is_released(folder) and not is_whole(folder):
        c = read_config(folder, "vision", "llm")
        bases = [vision or c["vision"], llm or c["llm"]]
    for base in bases:
        if base:
            files += weight_files(Path(base))
    return files


def read_usage(folder: Path, vision: str | Path | None = None) -> Usage:
    """Return what a model expects. vision: the folder of its vision encoder, for one that holds no
    tower or no image settings. Raises UserError if it is needed and not given."""
    c = read_config(folder)
    if c.get("model_type") == OURS:
        c = read_config(folder, "template", "after_special", "pad", "vision_layer")
        return Usage(c["template"], c["after_special"], c["pad"], c.get("max_length", 2048),
                     c["vision_layer"], image_tokens(configured(c), vision_config(folder)))
    tower, layer = released_tower(folder, vision)

    # Padding: as the image settings say (llava-hf's may), else LLaVA's own key.
    pad = image_settings(folder, vision)[1].get("do_pad")
    if pad is None:
        pad = c.get("image_aspect_ratio", "pad") == "pad"
    # LLaVA-1.5 was trained with transformers 4.31, MoCa with 4.37, TinyLLaVA with 4.40.
    later = c.get("use_moca") or c["model_type"] == TINY
    after_special = c.get("after_special", "4.37" if later else "4.31")
    longest = c.get("tokenizer_model_max_length", 2048)
    return Usage(family_template(folder), after_special, pad, longest, layer,
                 image_tokens(configured(c), tower))
