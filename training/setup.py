"""What a stage trains, from which folders, on which samples."""
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from common.files import read_json
from common.flags import UserError
from common.parallel import Ranks, shard
from data import Batch, ImageProcessor, Samples, eos_id
from hub.check import image_problems
from hub.checkpoint import checkpoint_folder, is_released, is_whole
from hub.configs import decoder_config, vision_config
from hub.released import load_llm, load_moca, load_projector, load_vision
from hub.samples import read_samples
from hub.tokenizer import load_tokenizer
from methods.lora import lora_start
from mir import held_out
from model import Llava, Projector, VisionConfig
from training.settings import TrainConfig, stores_all


def is_trained(name: str, cfg: TrainConfig, vision_layers: int, llm_layers: int) -> bool:
    """Is a parameter, by its name in `Llava`, trained? half: as the MIR paper's code unlocks in stage 1, the upper half
    of the vision encoder's layers (ShareGPT4V's choice) and the lower half of the language model's, and nothing beside
    layers. Of the vision encoder only what is used can be trained: not the last layer, nor the norm behind it."""
    part, rest = name.split(".", 1)
    layer = re.search(r"\.layers\.(\d+)\.", rest)
    layer = int(layer[1]) if layer else None
    if part == "vision_tower":
        used = not rest.startswith("post_layernorm") and layer != vision_layers - 1
        upper = layer is not None and layer >= vision_layers // 2
        return used and {"none": False, "half": upper, "all": True}[cfg.unlock_vision]
    if part == "language_model":
        lower = layer is not None and layer < llm_layers // 2
        return cfg.moca and rest.startswith("moca.") or {
            "none": False, "lora": "lora_" in rest, "half": lower, "all": True}[cfg.unlock_llm]
    return True


def build(cfg: TrainConfig, ckpt: Path | None, ranks: Ranks) -> Llava:
    """The model of a stage from released folders, or from the checkpoint to resume. What is trained is float32 and
    asks for gradients; what is frozen is in the dtype of computing. On the meta device, before anything is read, it is
    decided what is trained, and where ranks share the model the blocks are cut."""
    whole = ckpt is not None and stores_all(cfg)
    folders = (ckpt, ckpt) if whole else (cfg.vision, cfg.llm)
    v, t = tower_config(cfg), decoder_config(folders[1])
    if cfg.unlock_llm == "lora" and not t.lora_rank:
        t = replace(t, lora_rank=cfg.lora_rank, lora_alpha=cfg.lora_alpha)

    def trained(part: str, name: str) -> bool:
        return is_trained(f"{part}.{name}", cfg, v.num_hidden_layers, t.num_hidden_layers)

    def prepare(part: str, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            p.requires_grad_(trained(part, name))
        for block in (module.encoder if part == "vision_tower" else module.model)["layers"]:
            if cfg.compile:
                block.compile()
            if ranks.mesh is not None:
                shard(block, ranks)

    def options(part: str) -> dict:
        return dict(device=ranks.device, dtype=lambda n: torch.float32 if trained(part, n) else ranks.dtype,
                    prepare=partial(prepare, part))
    vision = load_vision(folders[0], config=v, **options("vision_tower"))
    llm = load_llm(folders[1], config=t, **options("language_model"),
                           new=lambda name, shape: None if whole else lora_start(name, shape, cfg.seed))
    source = ckpt or (cfg.projector and stage_checkpoint(cfg.projector, "pretrain"))
    if source:
        projector = load_projector(source, v.hidden_size, t.hidden_size, torch.float32, ranks.device)
    else:
        torch.manual_seed(cfg.seed)
        projector = Projector(v.hidden_size, t.hidden_size).to(ranks.device)
        projector.linear_2.weight.data *= cfg.projector_scale
    if source and not whole:
        load_moca(source, llm, torch.float32, ranks.device)
    if cfg.moca and not llm.config.moca:
        llm.add_moca()
    if cfg.moca:
        llm.moca.to(ranks.device, torch.float32).requires_grad_(True)
    llm.gradient_checkpointing = cfg.gradient_checkpointing
    return Llava(vision, projector, llm)


def tower_config(cfg: TrainConfig) -> VisionConfig:
    return replace(vision_config(cfg.vision), drop_first_patch=cfg.drop_first_patch)


def stage_checkpoint(folder: str | Path, stage: str) -> Path:
    """The checkpoint in a folder, if it is of that stage. Stage 2 may begin with a released LLaVA's projector too."""
    if (Path(folder) / "mm_projector.bin").is_file() or is_released(Path(folder)):
        return Path(folder)
    path = checkpoint_folder(folder)
    found = read_json(path / "config.json")["stage"]
    if found != stage:
        raise UserError(f"{path} is a {found} checkpoint; a {stage} one is wanted here")
    return path


def check_projector(cfg: TrainConfig) -> None:
    """Raises UserError if --projector cannot be that, or if more was trained with it than would come along."""
    path = stage_checkpoint(cfg.projector, "pretrain")
    released = (path / "mm_projector.bin").is_file() or is_released(path)
    if not released and is_whole(path):
        others = [Path(p).resolve() for p in (cfg.vision, cfg.llm) if Path(p).resolve() != path.resolve()]
        if others:
            raise UserError(f"{path} trained more than its projector, which {others[0]} would leave behind: add "
                            f"--vision {path} --llm {path}")


def load_data(cfg: TrainConfig, out: Path, ranks: Ranks) -> tuple[Samples, list[str]]:
    """The samples of a stage, read and checked, and the images that cannot be used. Raises UserError before any step
    if there are such images and they are not to be skipped."""
    toy = out / "data"
    path, images = (toy / f"{cfg.stage}.json", toy / "images") if cfg.data is None else (cfg.data, cfg.images)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        read_samples(path)                                # its index is made once a machine
    ranks.wait()
    samples, without = read_samples(path)
    if images is None and samples.column("image").any():
        raise UserError(f"{path} names images: say with --images in which folder they are")
    tokenizer, processor, vision = load_tokenizer(cfg.llm), ImageProcessor.from_folder(cfg.vision), tower_config(cfg)
    eos_id(tokenizer, cfg.template)                          # else the template is another family's
    if processor.crop_size != vision.image_size:
        raise UserError(f"{cfg.vision}: preprocessor_config.json makes images of {processor.crop_size} pixels, but "
                        f"config.json wants {vision.image_size}: they are not of one model")
    data = Samples(samples, images or ".", tokenizer, processor, cfg.template, vision.image_tokens,
                   cfg.max_length, cfg.stage == "finetune", cfg.after_special)
    found = ranks.gather(image_problems(samples, images or ".") if ranks.first else None)[0]
    bad = [f"{images}/{name}: {why}" for name, why in found.items()]
    if bad and not cfg.skip_bad_images:
        raise UserError(f"{len(bad)} images cannot be used ({'; '.join(bad[:5])}{'; …' if len(bad) > 5 else ''}): mend "
                        "them, or go on without them with --skip-bad-images")
    bad_image = samples.with_image(list(found))
    left_out = int(bad_image.sum())
    samples.keep(~bad_image)
    if not len(data):
        raise UserError(f"{path}: no samples left ({without} have no answer, {left_out} no usable image)")
    if ranks.first:
        print(f"{cfg.stage}: {len(data)} samples from {path}"
              + f", {without} without an answer left out" * bool(without)
              + f", {left_out} left out for {len(bad)} bad images" * bool(bad))
    return data, bad


def mir_pairs(cfg: TrainConfig, data: Samples, out: Path) -> list[Batch]:
    """The pairs that --mir-every measures on; none without it. The toy's are the first validation questions."""
    if not cfg.mir_every:
        return []
    images = out / "data" / "images" if cfg.data is None and cfg.images is None else cfg.images
    return held_out(data, Path(cfg.mir_data or out / "data" / "val.jsonl"), images)


def groups(model: Llava, cfg: TrainConfig) -> list[dict]:
    """What is trained, by its peak learning rate. The order is the same on any number of ranks."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            own = {"vision_tower": cfg.vision_lr, "multi_modal_projector": cfg.projector_lr}.get(name.split(".")[0])
            found.setdefault(own or cfg.lr, []).append(p)
    return [{"params": ps, "peak": peak, "lr": peak} for peak, ps in found.items()]
