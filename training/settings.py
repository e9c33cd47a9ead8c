"""The flags of train.py, the recipes that fill what no flag sets, and the checks of what cannot be.

    parse(TrainConfig) ─ check_start ─→ what the user typed ─ settings ─→ a full TrainConfig a stage
"""
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from common.flags import UserError, check_values, flag, option
from common.text import RULES
from data import TEMPLATES
from hub.checkpoint import is_released
from hub.configs import decoder_config
from hub.connectors import read_connector
from hub.tensors import weight_files
from hub.tokenizer import family_template
from hub.usage import read_usage
from losses import LOSSES

ROOT = Path(__file__).resolve().parent.parent

# What --stage fills in where no flag says otherwise: LLaVA-1.5's recipe, or the toy's without
# --data. The toy's runs are short: with the usual beta2 of 0.999 the large gradients of the first
# steps would keep all later steps small, and some seeds never learn to look up a place.
LLAVA = {"pretrain": dict(global_batch=256, micro_batch=32, lr=1e-3, epochs=1, adam_beta2=0.999),
         "finetune": dict(global_batch=128, micro_batch=16, lr=2e-5, epochs=1, adam_beta2=0.999)}
TOY = {"pretrain": dict(global_batch=48, micro_batch=48, lr=1e-2, epochs=4, adam_beta2=0.95,
                        gradient_checkpointing=0),
       "finetune": dict(global_batch=24, micro_batch=24, lr=2e-3, epochs=1, adam_beta2=0.95,
                        gradient_checkpointing=0)}
TOY_PROJECTOR_SCALE = 0.25
TOY_QFORMER = "qformer-4-96x4"                            # 4 queries for 9 patches
LORA = dict(lr=2e-4, projector_lr=2e-5)                   # LLaVA-1.5's, with --unlock-llm lora
RANDOM = "random"                                         # --projector random
START = "the start of a stage"                            # a fingerprint: of --projector, or ckpt


@dataclass
class TrainConfig:
    """Train a vision-language model. Without --data: the toy, both stages, evaluation and MIR."""
    stage: Literal["both", "pretrain", "finetune"] = option(
        "both", "pretrain: the projector; finetune: also the language model; both: the toy", "run")
    loss: Literal[tuple(LOSSES)] = option("ce", "the objective")
    out: str = option("out/toy", "folder for checkpoints, metrics.jsonl and results.json")
    resume: bool = option(False, "continue the run in --out from its newest checkpoint")
    overwrite: bool = option(False, "replace the run in --out if it has saved no checkpoint")
    seed: int = option(1, "of the projector's start, the order of samples, the toy's pictures")
    max_steps: int | None = option(None, "steps of a stage; unset: as many as --epochs make")
    save_every: int = option(500, "steps between checkpoints; the last step is always saved")
    save_minutes: float | None = option(None, "most minutes between checkpoints; unset: any number")
    keep_last: int = option(1, "checkpoints of a stage to keep")

    vision: str | None = option(
        None, "folder of the vision encoder; unset: of --projector's LLaVA, or the toy's", "model")
    llm: str | None = option(None, "folder of the language model; unset: likewise")
    projector: str | None = option(
        None, "where --stage finetune starts: a stage-1 checkpoint, a released LLaVA, or random. "
        "In stage 1 with --unlock-…, or a Q-Former for --connector qformer")
    connector: str | None = option(
        None, "linear, mlp2x, mlp4x, …: so many linear maps; qformer: 32 queries; qformer-64: 64; "
        "qformer-4-96x2: also width and layers; unset: mlp2x")
    moca: bool = option(False, "calibrate image tokens after every layer (MoCa), in both stages")
    unlock_llm: Literal["none", "lora", "half", "all"] | None = option(
        None, "what to train of the language model; half: its lower layers; unset: all in stage 2")
    unlock_vision: Literal["none", "half", "all"] = option(
        "none", "what to train of the vision encoder; half: its upper layers")
    lora_rank: int = option(128, "rank of --unlock-llm lora", most=2**14)
    lora_alpha: float = option(256.0, "scales the LoRA update by alpha / rank")
    projector_scale: float | None = option(
        None, f"scale of the projector's last layer at start; unset: 1, toy {TOY_PROJECTOR_SCALE}")
    drop_first_patch: bool = option(False, "728 tokens of SigLIP's 729, as the released TinyLLaVA")

    data: str | None = option(None, "LLaVA JSON or JSONL; unset: the toy's, made in --out", "data")
    images: str | None = option(None, "folder of the images that it names")
    skip_bad_images: bool = option(False, "leave out samples whose image cannot be read")
    template: Literal[tuple(TEMPLATES)] | None = option(
        None, "how conversations are written in stage 2; unset: as the language model's family")
    after_special: Literal[RULES] | None = option(
        None, "spaces after </s>: as this version of transformers has them; unset: 4.31, or as a "
        "released LLaVA in --projector was trained")
    plain_specials: bool = option(
        False, "read <s>, </s> and their like in the data as text; LLaVA-1.5: as control tokens")
    max_length: int = option(2048, "positions a sample may have; longer text is cut")
    workers: int | None = option(None, "processes for batches; unset: 4 a GPU, 0 on a CPU", most=256)

    global_batch: int | None = option(
        None, "samples a step on all ranks; unset: 256, in stage 2 128", "optimisation", most=2**20)
    micro_batch: int | None = option(
        None, "samples on a rank at a time; unset: the largest that fits a GPU and divides a "
        "rank's share, up to 32 in stage 1, 16 in stage 2")
    epochs: int | None = option(None, "passes over the data; unset: 1")
    lr: float | None = option(None, "peak learning rate; unset: 1e-3, in stage 2 2e-5, LoRA 2e-4")
    projector_lr: float | None = option(None, "the projector's; unset: --lr, with LoRA 2e-5")
    vision_lr: float | None = option(None, "the vision encoder's; unset: --lr")
    adam_beta2: float | None = option(None, "AdamW's beta2; unset: 0.999, toy 0.95", most=0.9999)
    warmup: float = option(0.03, "share of the steps in which the learning rate rises", most=1)
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "how it falls afterwards")

    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one", "machine")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 if a GPU has it")
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = option(
        "auto", "ddp: every rank holds the model; fsdp: a part of it; hsdp: a part of its node's; "
        "auto: fsdp if more than the projector is trained")
    gradient_checkpointing: int | None = option(
        None, "decoder layers that are recomputed in the backward pass; unset: as few as fit the "
        "GPU; on a CPU all, of the toy none")
    compile: bool = option(False, "compile the layers: minutes at the start, then faster steps")
    timeout: float = option(60.0, "minutes that a rank waits for another", most=10**6)
    plan: bool = option(False, "print memory, steps, hours and disk of this run, and start nothing")
    card: Literal["a100-40", "a100-80", "h100", "h200"] | None = option(
        None, "with --plan: the GPU, if it is not here")
    cards: int | None = option(None, "with --plan: how many; unset: as many as ranks started")

    vdep_alpha: float = option(0.001, "weight of the reconstruction", "VDEP")
    vdep_ratio: float = option(1.0, "samples in VDEP mode for each in LLaVA mode, 0 to 1", most=1)
    vdep_joint: bool = option(False, "every sample in both modes at once, not in hybrid batches")
    vdep_distance: Literal["l2", "inverse", "sigmoid"] = option(
        "l2", "between prediction and target; inverse, sigmoid: d / (1 + d) and 2σ(d) − 1, which "
        "saturate (the paper's 1 / d pushes both apart)")
    vdep_reduce: Literal["mean", "sum"] = option("mean", "over the width; sum: the appendix's")
    vdep_shift: Literal["1", "0"] = option("1", "an image token predicts the next one, or itself")

    vista_weighting: Literal["t/m", "t", "1"] = option("t/m", "f(t): weights of text", "VISTA")
    vista_distance: Literal["l2", "cosine"] = option(
        "l2", "between a text token and the last image token's state")
    vista_reduce: Literal["mean", "sum"] = option("mean", "of l2 over the width; sum: the paper")

    basic_k: int | None = option(None, "shallow layers that refine; unset: half of them", "BASIC")
    basic_weights: Literal["increasing", "constant", "decreasing"] = option(
        "increasing", "of those layers")
    basic_degree: Literal["attention", "equal"] = option(
        "attention", "how much an image token is supervised")
    basic_das: float = option(1.0, "weight of the direction loss; 0: off")
    basic_sds: float = option(0.01, "weight of the semantic loss; 0: off")

    mir_every: int | None = option(None, "steps between measurements; unset: none", "MIR")
    mir_data: str | None = option(
        None, "held-out pairs: questions or LLaVA samples, images in --images; unset: the toy's")


# Flags that may change on --resume: they change no number, or only where the run goes from here.
FREE_TO_CHANGE = ("resume", "overwrite", "out", "save_every", "save_minutes", "keep_last",
                  "micro_batch", "workers", "device", "gradient_checkpointing", "compile",
                  "parallel", "timeout", "mir_every", "mir_data", "plan", "card", "cards")


def in_checkout(path: str) -> str:
    """Return a path below this checkout's toy/ as one for any working directory; others as is."""
    if Path(path).parts[:1] == ("toy",) and not Path(path).exists() and (ROOT / path).exists():
        return str(ROOT / path)
    return path


def starts_qformer(cfg: TrainConfig) -> bool:
    """True if --projector holds a Q-Former to begin stage 1 with."""
    qformer = (cfg.connector or "").startswith("qformer")
    return qformer and cfg.stage != "finetune" and cfg.projector is not None


def fill_parts(cfg: TrainConfig) -> TrainConfig:
    """Return cfg with --vision, --llm and --after-special; what is unset is of a released LLaVA in
    --projector, else the toy's. Raises UserError if that LLaVA holds no vision encoder."""
    vision, llm, rule = "toy/clip", "toy/llm", "4.31"
    if cfg.projector not in (None, RANDOM) and is_released(cfg.projector):
        folder = Path(cfg.projector)
        if weight_files(folder)[0].name != "mm_projector.bin":
            vision = llm = cfg.projector
            rule = read_usage(folder, cfg.vision).after_special
    return replace(cfg, vision=in_checkout(cfg.vision or vision), llm=in_checkout(cfg.llm or llm),
                   after_special=cfg.after_special or rule)


def is_sharded(cfg: TrainConfig, ranks: int) -> bool:
    """True if the ranks share one model (FSDP)."""
    if cfg.parallel == "auto":
        return ranks > 1 and stores_all(cfg)
    return ranks > 1 and cfg.parallel != "ddp"


def second_samples(cfg: TrainConfig, samples: int) -> int:
    """Return how many samples VDEP's stage 1 shows a second time, in VDEP mode."""
    if cfg.loss == "vdep" and cfg.stage == "pretrain" and cfg.vdep_alpha > 0 and not cfg.vdep_joint:
        return round(cfg.vdep_ratio * samples)
    return 0


def stores_all(cfg: TrainConfig) -> bool:
    """True if checkpoints hold the whole model: if more than the projector is trained."""
    unlocked = cfg.unlock_llm not in (None, "none") or cfg.unlock_vision != "none"
    return unlocked or cfg.stage == "finetune"


# ------------------------------------------------------------------------------------------- checks
def check_start(cfg: TrainConfig) -> None:
    """Raise UserError for flags that contradict each other, before any file is read."""
    toy = cfg.data is None
    if cfg.stage == "both" and not toy:
        raise UserError("--data belongs to one stage: add --stage pretrain or --stage finetune")
    unlocked = cfg.unlock_llm or cfg.unlock_vision != "none"
    if cfg.stage == "both" and (cfg.lr or cfg.epochs or unlocked):
        raise UserError("--lr, --epochs and --unlock-… belong to one stage: add --stage pretrain "
                        "or --stage finetune")
    if cfg.stage == "finetune" and cfg.projector is None and not cfg.resume:
        raise UserError("--stage finetune starts from a projector: give --projector with stage "
                        "1's --out folder, or --projector random to start from an untrained one")
    if cfg.connector is not None:
        read_connector(cfg.connector)
    if cfg.projector not in (None, RANDOM) and not stores_all(cfg) and not starts_qformer(cfg):
        raise UserError(f"--projector is the start of --stage finetune; --stage {cfg.stage} does "
                        "not use it")
    if (cfg.card or cfg.cards) and not cfg.plan:
        raise UserError("--card and --cards belong to --plan")
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume continues a run, --overwrite replaces it: give one of the two")
    for name in ("data", "mir_data"):
        path = getattr(cfg, name)
        if path and not Path(path).is_file():
            raise UserError(f"{flag(name)} {path} does not exist")
    if cfg.images and not Path(cfg.images).is_dir():
        raise UserError(f"--images {cfg.images} is not a folder")


def check_numbers(cfg: TrainConfig) -> None:
    """Raise UserError for numbers out of range, and for flags of another objective."""
    for name in ("global_batch", "micro_batch", "lr", "epochs", "max_steps", "max_length",
                 "save_every", "save_minutes", "keep_last", "timeout", "basic_k", "projector_lr",
                 "vision_lr", "lora_rank", "lora_alpha", "mir_every"):
        value = getattr(cfg, name)
        if value is not None and not value > 0:
            raise UserError(f"{flag(name)} must be more than 0, not {value}")
    check_values(cfg)
    for f in fields(cfg):
        loss = f.name.split("_")[0]
        if loss in LOSSES and loss != cfg.loss and getattr(cfg, f.name) != f.default:
            raise UserError(f"{flag(f.name)} is a setting of --loss {loss}; this is --loss {cfg.loss}")
    if cfg.vdep_joint and cfg.vdep_ratio != 1:
        raise UserError("--vdep-ratio belongs to hybrid batches: leave it out with --vdep-joint")
    toy = cfg.data is None
    if (cfg.mir_data and not cfg.mir_every) or (cfg.mir_every and not cfg.mir_data and not toy):
        raise UserError("--mir-every N and --mir-data FILE go together: MIR is measured on pairs "
                        "outside the training data")


# ------------------------------------------------------------------------------------------ recipes
def settings(cfg: TrainConfig, stage: str, ranks: int) -> TrainConfig:
    """Return cfg for one stage, with what is unset filled in. Raises UserError if it cannot be."""
    toy, cfg = cfg.data is None, fill_parts(cfg)
    recipe = dict((TOY if toy else LLAVA)[stage])
    largest_micro = recipe.pop("micro_batch")
    if cfg.unlock_llm == "lora" and cfg.lr is None and not toy:
        recipe.update(LORA)
    recipe["unlock_llm"] = "none" if stage == "pretrain" else "all"
    recipe["projector_scale"] = TOY_PROJECTOR_SCALE if toy else 1.0
    if toy and cfg.connector == "qformer":
        cfg = replace(cfg, connector=TOY_QFORMER)
    unset = {name: value for name, value in recipe.items() if getattr(cfg, name) is None}
    cfg = replace(cfg, stage=stage, **unset)

    if stage == "pretrain":
        cfg = replace(cfg, template="plain")
    elif cfg.template is None:
        decoder_config(cfg.llm)                               # raises if that is no language model
        family = family_template(cfg.llm)
        cfg = replace(cfg, template="v1" if family == "plain" else family)
    check_numbers(cfg)
    return cut_batch(cfg, ranks, largest_micro)


def micro_batches(share: int, largest: int) -> list[int]:
    """Return the micro-batches that divide a rank's share of the global batch, largest first."""
    return [m for m in range(min(share, largest), 0, -1) if share % m == 0]


def cut_batch(cfg: TrainConfig, ranks: int, largest: int) -> TrainConfig:
    """Return cfg with a micro-batch that divides a rank's share of the global batch, or raise."""
    if cfg.global_batch % ranks:
        raise UserError(f"--global-batch {cfg.global_batch} is not divisible by the {ranks} ranks")
    share = cfg.global_batch // ranks
    if cfg.micro_batch is None:
        return replace(cfg, micro_batch=micro_batches(share, largest)[0])
    if share % cfg.micro_batch:
        raise UserError(f"--global-batch {cfg.global_batch} is not divisible by {ranks} ranks × "
                        f"--micro-batch {cfg.micro_batch}: a rank's share is {share}")
    return cfg
