"""Whole models: our checkpoints, written and read, and released LLaVA folders, read.

    config.json                 all that is needed to rebuild the model
    model.safetensors           stage 1: what was trained; stage 2: everything
    digests.json                a checksum of every tensor
    optimizer.safetensors       to resume; with tokenizer.json and preprocessor_config.json
"""
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

from common.files import read_json, write_json, write_text
from common.flags import UserError
from hub.configs import OURS, RELEASED, check_supported, image_settings, read_config, refuse_hub_id, vision_config
from hub.connectors import name_of
from hub.released import find_tensors, load_llm, load_moca, load_projector, load_vision
from hub.tensors import CODE_VERSION, DIGESTS, open_tensors, save_tensors, weight_files, write_tensors
from hub.tokenizer import load_tokenizer
from model import Llava, VisionConfig

OPTIMIZER = "optimizer.safetensors"


# ------------------------------------------------------------------------------------------ loading
def load_model(folder: str | Path, vision: str | Path | None = None, llm: str | Path | None = None,
               dtype: torch.dtype | None = None, device="cpu") -> Llava:
    """Load a whole model: a checkpoint or a released LLaVA. dtype None: as stored.

    vision, llm: folders of parts that `folder` does not hold: the CLIP of liuhaotian's LLaVA; both
    of a stage-1 checkpoint, if they have moved. Raises UserError if a part is missing."""
    for base in (vision, llm):
        if base:
            refuse_hub_id(base)
    if is_released(folder):
        return load_released(Path(folder), vision, dtype, device)
    folder = checkpoint_folder(folder)
    c, found = read_config(folder, "vision", "llm", "vision_layer"), find_tensors(folder)
    if is_whole(folder, found):
        vit = load_vision(folder, dtype, device, found=found)
        decoder = load_llm(folder, dtype, device, found=found)
    else:
        vision, llm = vision or c["vision"], llm or c["llm"]
        for flag, base in [("--vision", vision), ("--llm", llm)]:
            if not Path(base).is_dir():
                raise UserError(f"{folder} was trained on {base}, which is not there now: say where it is with {flag}")
        vit, decoder = load_vision(vision, dtype, device), load_llm(llm, dtype, device)
        load_moca(folder, decoder, dtype, device, found)
    projector = load_projector(folder, vit.config.hidden_size, decoder.config.hidden_size, dtype,
                               device, found)
    return Llava(vit, projector, decoder, checked_layer(folder, c["vision_layer"], vit.config))


def checked_layer(folder: Path, layer, tower: VisionConfig) -> int:
    """Return the vision layer of a config.json. Raises UserError if the tower has no such layer."""
    most = tower.num_hidden_layers
    there = type(layer) is int and -most - 1 <= layer <= most
    check_supported(folder / "config.json", [("features of vision layer", layer, there)])
    return layer


def is_released(folder: str | Path) -> bool:
    """True if a folder holds a multimodal model in a layout other than our checkpoints'."""
    path = Path(folder) / "config.json"
    return path.is_file() and read_config(folder).get("model_type") in RELEASED


def released_tower(folder: Path, vision: str | Path | None) -> tuple[VisionConfig, int]:
    """Return the config of a released model's vision tower, and which layer the projector reads."""
    c = read_config(folder)
    described = "vision_config" in c
    if not (vision or described):
        raise UserError(f"{folder} has no vision tower: give the folder of its CLIP too (--vision)")
    config = vision_config(folder if described else vision)
    siglip = not config.class_token
    strategy = c.get("vision_feature_select_strategy", c.get("mm_vision_select_feature", "patch"))
    patches_only = strategy in ("default", "patch")
    layer = c.get("vision_feature_layer", c.get("mm_vision_select_layer", -2))
    activation = c.get("projector_hidden_act", "gelu")
    check_supported(folder / "config.json", [
        ("image features", strategy, siglip or patches_only),
        ("projector_hidden_act", activation, activation == "gelu")])

    # "patch" drops the first position: CLIP's class token, but a patch of TinyLLaVA's SigLIP.
    layer = checked_layer(folder, layer, config)
    return replace(config, drop_first_patch=siglip and patches_only), layer


def load_released(folder: Path, vision: str | Path | None, dtype: torch.dtype | None, device) -> Llava:
    """Load a released LLaVA in one of the layouts that hub/released.py renames. See load_model."""
    c, found = read_config(folder), find_tensors(folder)
    stored = any(name.startswith("vision_tower.") for name in found)
    if not vision and not (stored and "vision_config" in c):
        what = "does not say of what shape its vision tower is" if stored else "has no vision tower"
        raise UserError(f"{folder} {what}: give the folder of its CLIP too (--vision)")
    config, layer = released_tower(folder, vision)
    # A tower stored inside was trained further: it wins over the folder it once came from.
    if stored:
        vit = load_vision(folder, dtype, device, config, found=found)
    else:
        vit = load_vision(vision, dtype, device, config)
    llm = load_llm(folder, dtype, device, found=found)
    projector = load_projector(folder, vit.config.hidden_size, llm.config.hidden_size, dtype,
                               device, found)
    return Llava(vit, projector, llm, layer)


# ------------------------------------------------------------------------------ a run's checkpoints
def checkpoints(run: str | Path, stage: str = "*") -> list[Path]:
    """Return a run's complete checkpoints <stage>-<step>: of stage 1, then of 2, oldest first."""
    found = [p for p in Path(run).glob(f"{stage}-*")
             if re.fullmatch(r"(pretrain|finetune)-\d+", p.name)]
    return sorted(found, key=lambda p: (p.name.startswith("finetune"), int(p.name.split("-")[1])))


def checkpoint_folder(path: str | Path) -> Path:
    """Return a checkpoint itself, of a run the newest. Raises UserError if `path` is neither."""
    path = Path(path)
    if not path.is_dir():
        refuse_hub_id(path)
        raise UserError(f"{path} does not exist: give a checkpoint's folder, or the --out folder "
                        "of a run")
    if not (path / "config.json").is_file() and checkpoints(path):
        return checkpoints(path)[-1]
    if read_config(path).get("model_type") != OURS:
        raise UserError(f"{path} is not a checkpoint of a run (its config.json has no model_type {OURS})")
    return path


def checkpoint_problem(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed, or None. Compares each tensor with its digest."""
    try:
        read_json(folder / "config.json", dict)
        if not (folder / OPTIMIZER).is_file():
            return f"{folder / OPTIMIZER} is missing (the two newest checkpoints of a stage have one)"
        for path in [*weight_files(folder), folder / OPTIMIZER]:
            with open_tensors(path) as file:
                for name in file.keys():
                    file.get_tensor(name)
    except UserError as e:
        return str(e)
    return None


def is_whole(folder: Path, found=None) -> bool:
    """True if a checkpoint stores the whole model. After stage 1 it may be the projector alone."""
    return any(name.startswith("language_model.model.") for name in found or find_tensors(folder))


def save_checkpoint(folder: Path, model: Llava, trained: set[str], config: dict, state: dict,
                    write: bool = True) -> None:
    """Write a checkpoint whole or not at all: under a temporary name, then renamed.

    trained: names of the parameters to store. config: goes into config.json, with the configs of
    the parts. state: the optimizer's tensors by name. write=False: this rank only contributes its
    share of sharded tensors. Raises UserError if it cannot be written, as on a full disk."""
    tensors = {n: p for n, p in model.named_parameters() if n in trained}
    if not write:
        save_tensors(folder, tensors, write=False)
        write_tensors(folder / OPTIMIZER, state, write=False)
        return
    temporary = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_checkpoint(temporary, model, tensors, config, state)
        os.replace(temporary, folder)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = " ".join(str(e).split())[:160]
        free = shutil.disk_usage(folder.parent).free / 1e9
        raise UserError(f"{folder} could not be saved ({reason}; {free:.1f} GB are free there). "
                        "Earlier checkpoints are intact: make room, then --resume") from None


def write_checkpoint(folder: Path, model: Llava, tensors: dict, config: dict, state: dict) -> None:
    """Write the files of a checkpoint. All of them are on the disk when this returns."""
    write_json(folder / "preprocessor_config.json", image_settings(config["vision"])[1])
    tokenizer = load_tokenizer(config["llm"], fits=False)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(folder / "config.json", {
        "model_type": OURS, "code_version": CODE_VERSION, **config,
        "vision_layer": model.vision_layer, "connector": name_of(model.multi_modal_projector),
        "vision_config": asdict(model.vision_tower.config),
        "text_config": asdict(model.language_model.config)})
    digests = save_tensors(folder, tensors)
    write_json(folder / DIGESTS, {**digests, **write_tensors(folder / OPTIMIZER, state)})
    for path in folder.iterdir():       # the rename must not reach the disk before the data
        with open(path, "rb") as f:
            os.fsync(f.fileno())
