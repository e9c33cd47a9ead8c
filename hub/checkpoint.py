"""Whole models: our checkpoint folders, written and read, and released LLaVA folders.

A checkpoint is a folder: config.json (everything needed to rebuild it), model.safetensors (what was trained in
stage 1; everything after stage 2), state.pt (to resume), tokenizer.json and preprocessor_config.json.
"""
import dataclasses
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from common.files import read_json
from common.flags import UserError
from hub.configs import LLAVA_HF, LLAVA_L, TINY, vision_config
from hub.released import find_tensors, load_llm, load_moca, load_projector, load_vision
from hub.tensors import check_safetensors, save_tensors, weight_files
from hub.tokenizer import load_tokenizer
from model import Llava

CODE_VERSION = 1


# ------------------------------------------------------------------------------------------------ loading
def load_model(folder: str | Path, vision: str | Path | None = None, llm: str | Path | None = None,
               dtype: torch.dtype | None = None, device="cpu") -> Llava:
    """A whole model: a checkpoint of ours, llava-hf's, liuhaotian's (which has no tower: `vision` is CLIP's folder),
    MoCa's or TinyLLaVA's. A stage-1 checkpoint of ours holds the projector alone and names the folders of the rest;
    `vision` and `llm` say where those are now. Raises UserError if a part cannot be found."""
    if is_released(Path(folder)):
        return load_released(Path(folder), vision, dtype, device)
    folder = checkpoint_folder(folder)
    c = read_json(folder / "config.json")
    whole = is_whole(folder)
    vision, llm = (folder, folder) if whole else (vision or c["vision"], llm or c["llm"])
    for flag, base in [("--vision", vision), ("--llm", llm)]:
        if not Path(base).is_dir():
            raise UserError(f"{folder} was trained on {base}, which is not there now: say where it is with {flag}")
    vision, llm = load_vision(vision, dtype, device), load_llm(llm, dtype, device)
    projector = load_projector(folder, vision.config.hidden_size, llm.config.hidden_size, dtype, device)
    if not whole:
        load_moca(folder, llm, dtype, device)
    return Llava(vision, projector, llm, c["vision_layer"])


def is_released(folder: Path) -> bool:
    """Is this a multimodal checkpoint of somebody else's?"""
    if not (folder / "config.json").is_file():
        return False
    return read_json(folder / "config.json").get("model_type") in (LLAVA_HF, LLAVA_L, TINY)


def load_released(folder: Path, vision: str | Path | None, dtype: torch.dtype | None, device) -> Llava:
    """A whole multimodal checkpoint in one of the layouts that RENAMES reads."""
    c = read_json(folder / "config.json")
    inside = any(name.startswith("vision_tower.") for name in find_tensors(folder))
    if not vision and not ("vision_config" in c and inside):
        raise UserError(f"{folder} has no vision tower" + ", or does not say of what shape" * inside
                        + ": give the folder of its CLIP too (--vision)")
    shape = folder if "vision_config" in c else vision
    siglip = not vision_config(shape).class_token
    strategy = c.get("vision_feature_select_strategy", c.get("mm_vision_select_feature", "patch"))
    layer = c.get("vision_feature_layer", c.get("mm_vision_select_layer", -2))
    projector = c.get("connector_type", c.get("mm_projector_type", "mlp2x_gelu")), c.get("projector_hidden_act", "gelu")
    for field, value, ok in [("image features", strategy, siglip or strategy in ("default", "patch")),
                             ("features of layers", layer, isinstance(layer, int)),
                             ("projector", projector, projector == ("mlp2x_gelu", "gelu"))]:
        if not ok:
            raise UserError(f"{folder}/config.json asks for {field} {value!r}, which is not supported")
    # A tower that was trained inside wins over the one it came from, which then only tells its shape.
    config = dataclasses.replace(vision_config(shape), drop_first_patch=siglip and strategy in ("default", "patch"))
    vit = load_vision(folder if inside else vision, dtype, device, config)
    llm = load_llm(folder, dtype, device)
    projector = load_projector(folder, vit.config.hidden_size, llm.config.hidden_size, dtype, device)
    return Llava(vit, projector, llm, layer)


# ------------------------------------------------------------------------------------------------ a run's checkpoints
def checkpoints(run: str | Path, stage: str = "*") -> list[Path]:
    """Complete checkpoints of a run's folder, oldest first: <stage>-<step>, stage 1 before stage 2."""
    found = [p for p in Path(run).glob(f"{stage}-*") if re.fullmatch(r"(pretrain|finetune)-\d+", p.name)]
    return sorted(found, key=lambda p: (p.name.startswith("finetune"), int(p.name.split("-")[1])))


def checkpoint_folder(path: str | Path) -> Path:
    """A checkpoint's folder, or the newest in a run's folder. Raises UserError if it is neither."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a checkpoint's folder, or the --out folder of a run")
    if not (path / "config.json").is_file() and checkpoints(path):
        return checkpoints(path)[-1]
    if read_json(path / "config.json").get("model_type") != "nanoalign":
        raise UserError(f"{path} is not a checkpoint of a run (its config.json has no model_type nanoalign)")
    return path


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be gone on from, or None: every file is looked at, at its ends."""
    try:
        read_json(folder / "config.json")
        for path in weight_files(folder):
            check_safetensors(path)
    except UserError as e:
        return str(e)
    state = folder / "state.pt"
    return None if state.is_file() and zipfile.is_zipfile(state) else f"{state} is missing or cut off"


def is_whole(folder: Path) -> bool:
    """Does a checkpoint of ours hold the whole model? Stage 1 stores the projector alone, unless more was trained."""
    return any(n.startswith("language_model.model.") for n in find_tensors(folder))


def save_checkpoint(folder: Path, model: Llava, trained: set[str], config: dict, state, write: bool = True) -> None:
    """Writes a checkpoint folder under a temporary name and renames it, so that a killed run leaves no half of one.

    trained: names of the parameters to store; config: goes into config.json with the shapes of the parts;
    state: tensors and plain values for `torch.load(weights_only=True)`. write=False: of a rank that only gives its
    share of what is cut. Raises UserError where the disk is full; what was saved before stays."""
    tensors = {n: p for n, p in model.named_parameters() if n in trained}
    if not write:
        save_tensors(folder, tensors, write=False)
        return
    temporary = folder.parent / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_checkpoint(temporary, model, tensors, config, state)
        os.replace(temporary, folder)
    except (OSError, RuntimeError, SafetensorError) as e:         # each library has its own word for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(e, RuntimeError) and "inline_container" not in str(e):
            raise                                                 # not torch.save's: a rank was lost while gathering
        reason = "writing failed" if isinstance(e, RuntimeError) else " ".join(str(e).split())[:160]
        raise UserError(f"{folder} could not be saved ({reason}; {shutil.disk_usage(folder.parent).free / 1e9:.1f} GB "
                        "are free there): what was saved before is as it was; make room, then --resume") from None


def write_checkpoint(temporary: Path, model: Llava, tensors: dict, config: dict, state) -> None:
    """The files of a checkpoint, all on the disk when this returns."""
    shutil.copyfile(Path(config["vision"]) / "preprocessor_config.json", temporary / "preprocessor_config.json")
    (temporary / "tokenizer.json").write_text(load_tokenizer(config["llm"]).to_str(pretty=True), encoding="utf-8")
    config = {"model_type": "nanoalign", "code_version": CODE_VERSION, **config, "vision_layer": model.vision_layer,
              "vision_config": dataclasses.asdict(model.vision_tower.config),
              "text_config": dataclasses.asdict(model.language_model.config)}
    (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_tensors(temporary, tensors)
    torch.save(state, temporary / "state.pt")
    for path in temporary.iterdir():
        with open(path, "rb") as f:
            os.fsync(f.fileno())                          # a rename must not overtake the data on its way to the disk
