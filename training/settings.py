"""The flags of train.py: groups, recipes, checks."""
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from common.files import read_json
from common.flags import UserError, option
from data import FAMILY_TEMPLATE, RULES, TEMPLATES
from losses import LOSSES

# What --stage fills in where no flag says otherwise: LLaVA-1.5's recipe, and the toy's when there is no --data.
LLAVA = {"pretrain": dict(global_batch=256, micro_batch=32, lr=1e-3, epochs=1, gradient_checkpointing=True),
         "finetune": dict(global_batch=128, micro_batch=16, lr=2e-5, epochs=1, gradient_checkpointing=True)}
TOY = {"pretrain": dict(global_batch=48, micro_batch=48, lr=1e-2, epochs=4, gradient_checkpointing=False),
       "finetune": dict(global_batch=48, micro_batch=48, lr=3e-3, epochs=1, gradient_checkpointing=False)}
LORA = dict(lr=2e-4, projector_lr=2e-5)                   # LLaVA-1.5's, when --unlock-llm lora
TOY_PROJECTOR_SCALE = 0.25


@dataclass
class TrainConfig:
    """Train a vision-language model. Without --data: the toy, both stages, then evaluated and measured."""
    stage: Literal["both", "pretrain", "finetune"] = option("both", "both: the toy's two stages in one go")
    loss: Literal[tuple(LOSSES)] = option("ce", "the objective")
    moca: bool = option(False, "calibrate image tokens after every layer, trained in both stages, with any objective")
    vision: str = option("toy/clip", "folder of the vision encoder")
    llm: str = option("toy/llm", "folder of the language model")
    projector: str | None = option(None, "where --stage finetune (or unlocking in stage 1) starts from: a checkpoint")
    data: str | None = option(None, "LLaVA JSON or JSONL; unset: the toy, made in --out")
    images: str | None = option(None, "the folder of its images")
    out: str = option("out/toy", "folder for checkpoints, metrics.jsonl and results.json")
    resume: bool = option(False, "go on with the run in --out from its newest checkpoint")
    skip_bad_images: bool = option(False, "go on without samples whose image cannot be read; bad_images.txt lists them")
    global_batch: int | None = option(None, "samples a step, over all ranks and accumulation steps")
    micro_batch: int | None = option(None, "samples a rank works on at a time: the one memory knob")
    lr: float | None = option(None, "peak learning rate")
    projector_lr: float | None = option(None, "the projector's; unset: --lr")
    vision_lr: float | None = option(None, "the vision encoder's, if it is trained; unset: --lr")
    unlock_llm: Literal["none", "lora", "half", "all"] | None = option(
        None, "what of the language model is trained; half: its lower layers; unset: all in stage 2, none in stage 1")
    unlock_vision: Literal["none", "half", "all"] = option("none", "what of the vision encoder; half: its upper layers")
    lora_rank: int = option(128, "of --unlock-llm lora")
    lora_alpha: float = option(256.0, "its update is scaled by alpha / rank")
    epochs: int | None = option(None, "passes over the data")
    max_steps: int | None = option(None, "steps of a stage, instead of epochs")
    template: Literal[tuple(TEMPLATES)] | None = option(None, "of stage 2; unset: by the language model's family")
    after_special: Literal[RULES] = option("4.31", "spaces after </s>: as this transformers has them, see tokenizer.py")
    drop_first_patch: bool = option(False, "728 tokens of SigLIP's 729, as the released TinyLLaVA")
    max_length: int = option(2048, "positions a sample may have; longer text is cut")
    compile: bool = option(False, "compile the layers: minutes at the start, then faster steps on a GPU")
    gradient_checkpointing: bool | None = option(None, "recompute activations instead of keeping them")
    projector_scale: float | None = option(None, "factor on the projector's last layer at its start")
    parallel: Literal["auto", "ddp", "fsdp"] = option("auto", "ddp: every rank holds the model; fsdp: a part of it. "
                                                      "auto: fsdp in stage 2, and where stage 1 unlocks more")
    timeout: float = option(60.0, "minutes that a rank waits for another before the run ends")
    save_every: int = option(500, "steps between checkpoints; the last step is always saved")
    keep_last: int = option(1, "checkpoints of a stage that are kept")
    mir_every: int | None = option(None, "steps between measurements of MIR on pairs held out; unset: none")
    mir_data: str | None = option(None, "those pairs: questions or LLaVA's samples, with images in --images")
    workers: int | None = option(None, "processes that prepare batches; unset: 4 a GPU, none beside a CPU")
    vdep_alpha: float = option(0.001, "weight of VDEP's reconstruction")
    vdep_ratio: float = option(1.0, "samples in VDEP mode for each in LLaVA mode, 0 to 1")
    vdep_distance: Literal["l2", "inverse", "sigmoid"] = option("l2", "between prediction and target")
    vista_weighting: Literal["t/m", "t", "1"] = option("t/m", "f(t), a text token's weight in VISTA")
    vista_distance: Literal["l2", "cosine"] = option("l2", "between a text token and the last image token's state")
    vista_reduce: Literal["mean", "sum"] = option("mean", "of l2 over the width; sum is the paper to the letter")
    basic_k: int | None = option(None, "shallow layers that refine for BASIC; unset: half of them")
    basic_weights: Literal["increasing", "constant", "decreasing"] = option("increasing", "of those layers")
    basic_degree: Literal["attention", "equal"] = option("attention", "how much an image token is supervised")
    basic_das: float = option(1.0, "weight of BASIC's direction loss; 0: off")
    basic_sds: float = option(0.01, "weight of BASIC's semantic loss; 0: off")
    seed: int = option(1, "of the projector's start, the order of samples, the toy's pictures")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of computing; auto: bfloat16 where the GPU has it")


FREE_TO_CHANGE = ("resume", "micro_batch", "workers", "save_every", "keep_last", "mir_every", "mir_data", "device",
                  "gradient_checkpointing", "compile", "parallel", "timeout")                      # on --resume


def settings(cfg: TrainConfig, stage: str, ranks: int) -> TrainConfig:
    """cfg with what is unset filled in for a stage. Raises UserError for settings that cannot be."""
    cfg = replace(cfg, stage=stage, template="plain" if stage == "pretrain" else cfg.template)
    toy = cfg.data is None
    if cfg.unlock_llm is None:
        cfg = replace(cfg, unlock_llm="none" if stage == "pretrain" else "all")
    if cfg.unlock_llm == "lora" and cfg.lr is None and not toy:
        cfg = replace(cfg, lr=LORA["lr"], projector_lr=cfg.projector_lr or LORA["projector_lr"])
    if cfg.template is None:
        family = read_json(Path(cfg.llm) / "config.json").get("model_type")
        cfg = replace(cfg, template=FAMILY_TEMPLATE.get(family, "v1"))
    for name, value in (TOY if toy else LLAVA)[stage].items():
        if getattr(cfg, name) is None and name != "micro_batch":
            cfg = replace(cfg, **{name: value})
    if cfg.projector_scale is None:
        cfg = replace(cfg, projector_scale=TOY_PROJECTOR_SCALE if toy else 1.0)
    for name in ("global_batch", "micro_batch", "lr", "epochs", "max_steps", "max_length", "save_every", "keep_last",
                 "timeout", "basic_k", "projector_lr", "vision_lr", "lora_rank", "lora_alpha", "mir_every"):
        if getattr(cfg, name) is not None and not getattr(cfg, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0, not {getattr(cfg, name)}")
    for name, most in [("vdep_alpha", math.inf), ("vdep_ratio", 1), ("basic_das", math.inf), ("basic_sds", math.inf)]:
        if not 0 <= getattr(cfg, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} must be from 0 to {most}, not {getattr(cfg, name)}")
    for f in fields(cfg):
        loss = f.name.split("_")[0]
        if loss in LOSSES and loss != cfg.loss and getattr(cfg, f.name) != f.default:
            raise UserError(f"--{f.name.replace('_', '-')} is a setting of --loss {loss}; this is --loss {cfg.loss}")
    if cfg.mir_data and not cfg.mir_every or cfg.mir_every and not cfg.mir_data and not toy:
        raise UserError("--mir-every N and --mir-data FILE go together: measured on pairs that training does not see")
    if cfg.global_batch % ranks:
        raise UserError(f"--global-batch {cfg.global_batch} is not divisible by the {ranks} ranks")
    share = cfg.global_batch // ranks
    if cfg.micro_batch is None:
        most = (TOY if toy else LLAVA)[stage]["micro_batch"]
        cfg = replace(cfg, micro_batch=max(m for m in range(1, min(share, most) + 1) if share % m == 0))
    if share % cfg.micro_batch:
        raise UserError(f"--global-batch {cfg.global_batch} is not divisible by {ranks} ranks × --micro-batch "
                        f"{cfg.micro_batch}: a rank's share is {share}")
    return cfg


def stores_all(cfg: TrainConfig) -> bool:
    """Do checkpoints hold the whole model? In stage 1 only if more than projector and MoCa is trained."""
    return cfg.stage == "finetune" or cfg.unlock_llm not in (None, "none") or cfg.unlock_vision != "none"
