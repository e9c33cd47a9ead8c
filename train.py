"""Training: stage 1 (projector), stage 2 (projector + language model), or both on the toy, then evaluated and measured.

    python train.py                                                    the toy, in minutes on a laptop
    torchrun --nproc_per_node=8 train.py --loss ce                     the same job on 8 processes
    torchrun --nproc_per_node=8 train.py --stage pretrain --vision CLIP --llm VICUNA --data FILE --images DIR --out O1
    torchrun --nproc_per_node=8 train.py --stage finetune --projector O1 …

A step: the counts of the loss's terms are summed over ranks and accumulation steps, then each micro-batch adds the
gradient of Σ weight · total / count. The result is the same however the global batch is cut.
"""
import contextlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")    # threads that spin while they wait
                                                                                # stall a machine that others use too
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import evaluate
import lora
import mir
import parallel
import weights
from config import UserError, option, parse, read_json, run
from data import (
    FAMILY_TEMPLATE,
    TEMPLATES,
    Batch,
    ImageProcessor,
    Order,
    Samples,
    end,
    image_problems,
    loader,
    read_jsonl,
)
from index import read_samples
from losses import LOSSES, Objective, Term, counts
from model import Llava, Projector, VisionConfig
from parallel import Ranks
from tokenizer import RULES, load_tokenizer
from toy import world

# What --stage fills in where no flag says otherwise: LLaVA-1.5's recipe, and the toy's when there is no --data. The
# toy's runs are short: with AdamW's usual beta2 of 0.999 the large gradients of the first steps keep all later steps
# small, and some seeds never learn to look up a place.
LLAVA = {"pretrain": dict(global_batch=256, micro_batch=32, lr=1e-3, adam_beta2=0.999, epochs=1,
                          gradient_checkpointing=True),
         "finetune": dict(global_batch=128, micro_batch=16, lr=2e-5, adam_beta2=0.999, epochs=1,
                          gradient_checkpointing=True)}
TOY = {"pretrain": dict(global_batch=24, micro_batch=24, lr=7e-3, adam_beta2=0.95, epochs=4,
                        gradient_checkpointing=False),
       "finetune": dict(global_batch=16, micro_batch=16, lr=2e-3, adam_beta2=0.95, epochs=1,
                        gradient_checkpointing=False)}
LORA = dict(lr=2e-4, projector_lr=2e-5)                   # LLaVA-1.5's, when --unlock-llm lora
TOY_PROJECTOR_SCALE = 0.25
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Config:
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
    adam_beta2: float | None = option(None, "AdamW's memory of squared gradients; unset: 0.999, the toy's 0.95")
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
    workers: int | None = option(None, "processes that prepare batches; unset: 4 a GPU, 1 beside a CPU")
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


def settings(cfg: Config, stage: str, ranks: int) -> Config:
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
    for name, most in [("vdep_alpha", math.inf), ("vdep_ratio", 1), ("basic_das", math.inf), ("basic_sds", math.inf),
                       ("adam_beta2", 0.9999)]:
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


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 % of the steps, then half a cosine towards 0."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------------ a run's folder
def check_out(cfg: Config, out: Path) -> None:
    """Raises UserError if the output folder holds another run than the one to be resumed."""
    holds = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if not cfg.resume and holds:
        raise UserError(f"{out} is not empty (it holds {', '.join(holds[:4])}): --resume to go on with the run in it, "
                        "or another --out")
    if cfg.resume and holds and "run.json" not in holds:
        raise UserError(f"{out} holds no run that could be resumed (no run.json): give another --out")
    if "run.json" in holds:
        old, new = read_json(out / "run.json"), asdict(cfg)
        changed = [k for k in new if k not in FREE_TO_CHANGE and old.get(k) != new[k]]
        if changed:
            raise UserError(f"--resume: the run in {out} was started with " + ", ".join(
                f"--{k.replace('_', '-')} {old.get(k)} (now {new[k]})" for k in changed))


def write_json(path: Path, value) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


class Log:
    """metrics.jsonl: a line a step. Resuming drops the lines after the checkpoint: those steps are made again."""
    def __init__(self, path: Path, stage: str, step: int):
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if (r := json.loads(line)).get("stage") != stage or r.get("step", 0) <= step]
            temporary = path.with_name(".metrics.tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, path)
        self.file = open(path, "a")

    def write(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


# ------------------------------------------------------------------------------------------------ one stage
def is_trained(name: str, cfg: Config, vision_layers: int, llm_layers: int) -> bool:
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


def stores_all(cfg: Config) -> bool:
    """Do checkpoints hold the whole model? In stage 1 only if more than projector and MoCa is trained."""
    return cfg.stage == "finetune" or cfg.unlock_llm not in (None, "none") or cfg.unlock_vision != "none"


def build(cfg: Config, ckpt: Path | None, ranks: Ranks) -> Llava:
    """The model of a stage from released folders, or from the checkpoint to resume. What is trained is float32 and
    asks for gradients; what is frozen is in the dtype of computing. On the meta device, before anything is read, it is
    decided what is trained, and where ranks share the model the blocks are cut."""
    whole = ckpt is not None and stores_all(cfg)
    folders = (ckpt, ckpt) if whole else (cfg.vision, cfg.llm)
    v, t = vision_config(cfg), weights.decoder_config(folders[1])
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
                parallel.shard(block, ranks)

    def options(part: str) -> dict:
        return dict(device=ranks.device, dtype=lambda n: torch.float32 if trained(part, n) else ranks.dtype,
                    prepare=partial(prepare, part))
    vision = weights.load_vision(folders[0], config=v, **options("vision_tower"))
    llm = weights.load_llm(folders[1], config=t, **options("language_model"),
                           new=lambda name, shape: None if whole else lora.start(name, shape, cfg.seed))
    source = ckpt or (cfg.projector and stage_checkpoint(cfg.projector, "pretrain"))
    if source:
        projector = weights.load_projector(source, v.hidden_size, t.hidden_size, torch.float32, ranks.device)
    else:
        torch.manual_seed(cfg.seed)
        projector = Projector(v.hidden_size, t.hidden_size).to(ranks.device)
        projector.linear_2.weight.data *= cfg.projector_scale
    if source and not whole:
        weights.load_moca(source, llm, torch.float32, ranks.device)
    if cfg.moca and not llm.config.moca:
        llm.add_moca()
    if cfg.moca:
        llm.moca.to(ranks.device, torch.float32).requires_grad_(True)
    llm.gradient_checkpointing = cfg.gradient_checkpointing
    return Llava(vision, projector, llm)


def vision_config(cfg: Config) -> VisionConfig:
    return replace(weights.vision_config(cfg.vision), drop_first_patch=cfg.drop_first_patch)


def stage_checkpoint(folder: str | Path, stage: str) -> Path:
    """The checkpoint in a folder, if it is of that stage. Stage 2 may begin with a released LLaVA's projector too."""
    if (Path(folder) / "mm_projector.bin").is_file() or weights.is_released(Path(folder)):
        return Path(folder)
    path = weights.checkpoint_folder(folder)
    found = read_json(path / "config.json")["stage"]
    if found != stage:
        raise UserError(f"{path} is a {found} checkpoint; a {stage} one is wanted here")
    return path


def check_projector(cfg: Config) -> None:
    """Raises UserError if --projector cannot be that, or if more was trained with it than would come along."""
    path = stage_checkpoint(cfg.projector, "pretrain")
    released = (path / "mm_projector.bin").is_file() or weights.is_released(path)
    if not released and weights.is_whole(path):
        others = [Path(p).resolve() for p in (cfg.vision, cfg.llm) if Path(p).resolve() != path.resolve()]
        if others:
            raise UserError(f"{path} trained more than its projector, which {others[0]} would leave behind: add "
                            f"--vision {path} --llm {path}")


def newest(out: Path, stage: str, ranks: Ranks) -> Path | None:
    """The newest checkpoint of a stage that is whole, or None if there is none at all. One that is not whole is renamed
    *.broken. Raises UserError if all are: starting anew is for somebody to decide."""
    found = None
    if ranks.first:
        problems = []
        for path in reversed(weights.checkpoints(out, stage)):
            problem = weights.checkpoint_problem(path)
            if problem is None:
                found = path
                break
            problems.append((path, problem))
        if problems and not found:
            raise UserError(f"{problems[0][1]}, and there is no older checkpoint: move {problems[0][0]} away, "
                            "and --resume starts the stage anew")
        for path, problem in problems:
            shutil.rmtree(f"{path}.broken", ignore_errors=True)
            os.replace(path, f"{path}.broken")
            print(f"{problem}: it is {path.name}.broken now, and {stage} goes on from {found.name}")
    return ranks.gather(found)[0]


def load_data(cfg: Config, out: Path, ranks: Ranks) -> tuple[Samples, list[str]]:
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
    tokenizer, processor, vision = load_tokenizer(cfg.llm), ImageProcessor.from_folder(cfg.vision), vision_config(cfg)
    end(tokenizer, cfg.template)                          # else the template is another family's
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


def held_out(cfg: Config, data: Samples, out: Path) -> list[Batch]:
    """The pairs that --mir-every measures on; none without it. The toy's are the first validation questions."""
    if not cfg.mir_every:
        return []
    images = out / "data" / "images" if cfg.data is None and cfg.images is None else cfg.images
    return mir.held_out(data, Path(cfg.mir_data or out / "data" / "val.jsonl"), images)


def begin(cfg: Config, out: Path, bad: list[str], ranks: Ranks) -> None:
    """Makes the run's folder: what it was asked to do, the toy's data, the images it does without."""
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", asdict(cfg))
        if cfg.data is None and not (out / "data").exists():
            shutil.rmtree(out / ".data.tmp", ignore_errors=True)
            world.make(out / ".data.tmp", cfg.seed)
            os.replace(out / ".data.tmp", out / "data")
        if bad:
            (out / "bad_images.txt").write_text("".join(line + "\n" for line in bad))
    ranks.wait()


def train(cfg: Config, ckpt: Path | None, model: Llava, data: Samples, out: Path, ranks: Ranks,
          pairs: list[Batch]) -> None:
    """One stage, from step 0 or from the checkpoint `ckpt` that `model` was built of, to its last step. MIR is measured
    on `pairs`, if there are any."""
    step = int(ckpt.name.split("-")[1]) if ckpt else 0
    lengths = data.samples.lengths() if cfg.stage == "finetune" else None
    hybrid = cfg.loss == "vdep" and cfg.stage == "pretrain" and cfg.vdep_alpha > 0
    again = round(cfg.vdep_ratio * len(data)) if hybrid else 0
    order = Order(len(data), cfg.global_batch, cfg.micro_batch, cfg.seed, lengths, ranks.rank, ranks.ranks, step, again)
    steps = cfg.max_steps or cfg.epochs * order.steps_per_epoch
    accumulation = cfg.global_batch // (ranks.ranks * cfg.micro_batch)
    objective = parallel.wrap(Objective(model, cfg), ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups(model, cfg), betas=(0.9, cfg.adam_beta2), weight_decay=0.0, fused=True)
    if ckpt:
        load_optimizer(optimizer, ckpt)
    hold = parallel.holds_gradients(trained, ranks)
    if ranks.first:
        print(f"{cfg.stage}: global batch {cfg.global_batch} = {ranks.ranks} ranks × {accumulation} accumulation × "
              f"{cfg.micro_batch} micro-batch; {steps} steps, lr {cfg.lr:g}, {cfg.loss}, {ranks.dtype} on "
              f"{ranks.device}; {sum(p.numel() for p in trained):,} parameters trained"
              + ", sharded" * (ranks.mesh is not None) + ", gradients after every micro-batch" * (not hold))
        log = Log(out / "metrics.jsonl", cfg.stage, step)

    gpu, shown = ranks.device.type == "cuda", ""
    with (signals_noted() as stop,
          tqdm(total=steps, initial=step, desc=cfg.stage, unit="step", disable=not ranks.first) as bar):
        batches = iter(loader(data, order, (4 if gpu else 1) if cfg.workers is None else cfg.workers, pin=gpu))
        while step < steps:
            began = time.perf_counter()
            micro = [next(batches) for _ in range(accumulation)]
            unreadable(micro, cfg, out)
            wanted = [counts(b) for b in micro]
            names = list(wanted[0])
            count = dict(zip(names, ranks.sum([sum(w[n] for w in wanted) for n in names]).float()))

            terms = backward(objective, micro, count, ranks, hold)
            norm = parallel.gradient_norm(trained, ranks)
            parallel.clip(trained, norm, 1.0)
            sums = ranks.sum([*(t.total for t in terms), sum(b.attention_mask.sum() for b in micro), len(stop)])
            # The one place where a step waits for the device: what is checked and logged is read in one piece.
            *numbers, gradient = torch.cat([torch.stack([*count.values()]), sums, norm[None]]).tolist()
            counted, (*totals, tokens, stopping) = dict(zip(names, numbers)), numbers[len(names):]
            values = {t.name: total / max(counted[t.name], 1) for t, total in zip(terms, totals)}
            loss = sum(t.weight * values[t.name] for t in terms)
            check_finite(loss, gradient, step + 1, terms, micro, ranks)

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, group["peak"])
            lr = learning_rate(step, steps, cfg.lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if ranks.first:
                rate = tokens / (time.perf_counter() - began)
                named = " ".join(f"{n} {v:.3f}" for n, v in values.items())
                bar.set_postfix_str(f"{named}{shown} lr {lr:.1e} {rate / 1000:.1f}k tok/s", refresh=False)
                bar.update()
                log.write(stage=cfg.stage, step=step, loss=loss, **values, lr=lr, grad_norm=gradient,
                          tokens_per_s=round(rate), supervised=int(counted["ce"]),
                          peak_gib=round(peak_gib(ranks.device), 3))
            if pairs and step % cfg.mir_every == 0:
                m = measure(objective, pairs, step, cfg, ranks)
                shown = f" MIR {m['mir']:.3f}"
                if ranks.first:
                    log.write(stage=cfg.stage, step=step, kind="mir", **m)
            if step == steps or step % cfg.save_every == 0 or stopping:
                save(out, cfg, model, optimizer, step, steps, ranks)
            if stopping and step < steps:
                raise UserError(f"stopped by a signal after step {step} of {cfg.stage}; it is saved: --resume goes on")

@contextlib.contextmanager
def signals_noted():
    """SIGTERM and SIGINT only fill the list that this gives: the step is finished and saved, and then the run ends.
    Processes that prepare batches, begun inside, do not die of them either."""
    stop = []
    before = [signal.signal(s, lambda number, frame: stop.append(number)) for s in SIGNALS]
    try:
        yield stop
    finally:
        for s, handler in zip(SIGNALS, before):
            signal.signal(s, handler)


def backward(objective: nn.Module, micro: list[Batch], count: dict[str, Tensor], ranks: Ranks,
             hold: bool) -> list[Term]:
    """Adds the gradient of Σ weight · total / count of a step's micro-batches; count is over the global batch. hold:
    gradients travel once a step. Returns the terms with their totals over this rank's micro-batches."""
    summed = {}
    for i, batch in enumerate(micro):
        with parallel.gradients(objective, travel=not hold or i == len(micro) - 1):
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.dtype == torch.bfloat16):
                terms = objective(batch.to(ranks.device))
            loss = sum(t.weight * t.total / count[t.name].clamp(min=1) for t in terms)
            (loss * ranks.ranks).backward()               # gradients are averaged over ranks; the loss is a sum
        for t in terms:
            total = t.total.detach()
            summed[t.name] = t._replace(total=total + summed[t.name].total if t.name in summed else total)
    return list(summed.values())


def measure(objective: nn.Module, pairs: list[Batch], step: int, cfg: Config, ranks: Ranks) -> dict:
    """MIR in between two steps, every rank its share; nothing of the training is touched."""
    try:
        with (parallel.gathered(objective),
              torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.dtype == torch.bfloat16)):
            return mir.measure(getattr(objective, "module", objective).model, pairs)
    except ValueError as e:
        raise UserError(f"--mir-every, step {step} of {cfg.stage}: {e}") from None


def groups(model: Llava, cfg: Config) -> list[dict]:
    """What is trained, by its peak learning rate. The order is the same on any number of ranks."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            own = {"vision_tower": cfg.vision_lr, "multi_modal_projector": cfg.projector_lr}.get(name.split(".")[0])
            found.setdefault(own or cfg.lr, []).append(p)
    return [{"params": ps, "peak": peak, "lr": peak} for peak, ps in found.items()]


def load_optimizer(optimizer: torch.optim.Optimizer, ckpt: Path) -> None:
    """The optimizer's state of a checkpoint, whoever wrote it; of what is cut over ranks, this rank's rows. The file is
    mapped: no rank holds it whole."""
    try:
        state = torch.load(ckpt / "state.pt", map_location="cpu", mmap=True, weights_only=True)["optimizer"]
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(f"{ckpt}/state.pt cannot be read ({str(e).splitlines()[0][:60]}): move {ckpt} away; --resume "
                        "goes on from what was saved before it") from None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, kept in state["state"].items():
        for name, t in kept.items():
            if t.dim():                                   # the moments; the step is a number
                kept[name] = parallel.placed(t, parameters[i], parameters[i].device, t.dtype)
    optimizer.load_state_dict(state)


def gather_optimizer(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict:
    """The optimizer's whole state in the first rank's memory (8 bytes a trained parameter). Every rank must call."""
    state = optimizer.state_dict()
    out = {}
    for i, kept in state["state"].items():
        out[i] = {}
        for name, t in kept.items():
            full = parallel.whole(t)
            if ranks.first:
                out[i][name] = full.cpu()
    return {**state, "state": out}


def unreadable(micro: list[Batch], cfg: Config, out: Path) -> None:
    """Images that broke only when they were decoded: stop, or with --skip-bad-images write them down."""
    bad = [problem for b in micro for problem in b.bad]
    if bad and not cfg.skip_bad_images:
        raise UserError(f"{bad[0]}: mend it, or go on without such samples with --skip-bad-images")
    if bad:
        with open(out / "bad_images.txt", "a") as f:
            f.write("".join(line + "\n" for line in bad))


def check_finite(loss: float, gradient: float, step: int, terms: list[Term], micro: list[Batch], ranks: Ranks) -> None:
    """Stops every rank before a non-finite number reaches the weights, naming step, ranks and samples."""
    if math.isfinite(loss) and math.isfinite(gradient):
        return
    own = all(t.total.isfinite() for t in terms)
    found = ranks.gather([] if own else [i for b in micro for i in b.ids])
    where = "; ".join(f"rank {r}, samples {', '.join(ids[:8])}{', …' * (len(ids) > 8)}" for r, ids in enumerate(found)
                      if ids) or "every loss was finite"
    raise UserError(f"step {step}: loss {loss}, gradient norm {gradient}; {where}. The last checkpoint is as it was: "
                    "lower --lr, or look at those samples")


def peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20           # KiB on Linux


def save(out: Path, cfg: Config, model: Llava, optimizer, step: int, steps: int, ranks: Ranks) -> None:
    """Checkpoint <out>/<stage>-<step>, written by the first rank; when it is there, all but --keep-last go."""
    if not ranks.first and ranks.mesh is None:
        return
    names = {n for n, p in model.named_parameters() if p.requires_grad or stores_all(cfg)}
    config = {"stage": cfg.stage, "step": step, "steps": steps, "loss": cfg.loss, "template": cfg.template,
              "after_special": cfg.after_special, "pad": cfg.stage == "finetune", "max_length": cfg.max_length,
              "vision": str(Path(cfg.vision).resolve()), "llm": str(Path(cfg.llm).resolve()), "settings": asdict(cfg)}
    path = out / f"{cfg.stage}-{step}"
    state = {"optimizer": gather_optimizer(optimizer, ranks), "step": step}
    weights.save_checkpoint(path, model, names, config, state, write=ranks.first)
    if ranks.first:
        for older in weights.checkpoints(out, cfg.stage)[:-cfg.keep_last]:
            shutil.rmtree(older)


# ------------------------------------------------------------------------------------------------ the toy's report
def report(out: Path, stages: list[str], device: str, dtype: str) -> None:
    """MIR after each stage, accuracy on the toy's test sets, a few answers; all of it in results.json too."""
    data, images = out / "data", out / "data" / "images"
    results = {"stages": {}, "mir": {}, "accuracy": {}, "shuffled": {}}
    steps = read_jsonl(out / "metrics.jsonl")
    where, kind = weights.choose_device(device, dtype)
    for stage in stages:
        folder = weights.checkpoints(out, stage)[-1]
        model = weights.load(folder, dtype=kind, device=where)
        m = mir.measure(model, mir.pairs(folder, data / "val.jsonl", images, 100))
        losses = [line["ce"] for line in steps if line["stage"] == stage and "ce" in line]
        last = losses[-max(1, len(losses) // 10):]        # of samples that were not seen before, in one epoch
        results["stages"][stage] = {**m, "ce": sum(last) / len(last)}
        results["mir"][stage] = m["mir"]
    if "finetune" in stages:
        assistant = evaluate.Assistant.from_checkpoint(folder, device=device, dtype=dtype)
        answers = out / "eval" / folder.name
        for name in ("test", "composition"):
            r = evaluate.evaluate(assistant, data / f"{name}.jsonl", images, answers, 256, 16)
            results["accuracy"][name], results["shuffled"][name] = r["accuracy"], r["shuffled"]
        rows = {"test": results["accuracy"]["test"], "unseen pairs": results["accuracy"]["composition"],
                "test, images shuffled": results["shuffled"]["test"]}
        print("\naccuracy, %\n" + evaluate.table(rows) + "\n")
        lines = read_jsonl(answers / "test.predictions.jsonl")
        for r in lines[::len(lines) // 6 + 1]:            # six: one of every category, of different pictures
            print(f"{r['image']}  {r['text']}  → {r['prediction']}  ({'right' if r['correct'] else r['answer']})")
    print()
    for stage, m in results["stages"].items():
        print(f"after {stage:9} MIR {m['mir']:.3f}   CE {m['ce']:.3f}   |V| {m['V_norm']:.1f}   var V {m['V_var']:.0f}"
              f"   |text| {m['text_norm']:.1f}   |h| {m['h_norm']:.1f}")
    results["checkpoint"] = str(folder)
    write_json(out / "results.json", results)
    Log(out / "metrics.jsonl", "report", -1).write(stage="report", step=0, **results)
    print(f"checkpoint {folder}; all numbers in {out / 'results.json'}")


def run_stage(cfg: Config, plan: Config, out: Path, ranks: Ranks) -> None:
    """A stage of the run `cfg`, as `plan` says, from where it was left. Returns when its last checkpoint is there."""
    ckpt = newest(out, plan.stage, ranks)
    if ckpt and (c := read_json(ckpt / "config.json"))["step"] == c["steps"]:
        return                                            # --resume: this stage is done
    if plan.stage == "finetune" and cfg.stage == "both":
        plan = replace(plan, projector=str(weights.checkpoints(out, "pretrain")[-1]))
    ranks = parallel.over(ranks, cfg.parallel == "fsdp" or cfg.parallel == "auto" and stores_all(plan))
    # What is wrong with weights or data shows before anything is written. (The toy's data is made here.)
    model = build(plan, ckpt, ranks)
    if cfg.data is None:
        begin(cfg, out, [], ranks)
    data, bad = load_data(plan, out, ranks)
    pairs = held_out(plan, data, out)
    begin(cfg, out, bad, ranks)
    train(plan, ckpt, model, data, out, ranks, pairs)
    ranks.wait()


def main() -> None:
    began = time.perf_counter()
    cfg = parse(Config)
    ranks_wanted = int(os.environ.get("WORLD_SIZE", 1))
    toy, out = cfg.data is None, Path(cfg.out)
    if cfg.stage == "both" and not toy:
        raise UserError("--data is of one stage: say which with --stage pretrain or --stage finetune")
    if cfg.stage == "both" and (cfg.lr or cfg.epochs or cfg.unlock_llm or cfg.unlock_vision != "none"):
        raise UserError("--lr, --epochs and --unlock-… are of one stage: say which with --stage pretrain or finetune")
    if cfg.projector and not stores_all(cfg):
        raise UserError("--projector is where --stage finetune starts from; it has no use in --stage " + cfg.stage)
    stages = ["pretrain", "finetune"] if cfg.stage == "both" else [cfg.stage]
    plans = [settings(cfg, stage, ranks_wanted) for stage in stages]
    check_out(cfg, out)
    for folder, check in [(cfg.vision, weights.vision_config), (cfg.llm, weights.decoder_config)]:
        check(folder)
    layers = weights.decoder_config(cfg.llm).num_hidden_layers
    if cfg.basic_k and cfg.basic_k > layers:
        raise UserError(f"--basic-k {cfg.basic_k}, but {cfg.llm} has {layers} layers")
    if cfg.projector:
        check_projector(cfg)
    if not toy and not Path(cfg.data).is_file():
        raise UserError(f"--data {cfg.data} does not exist")
    if cfg.mir_data and not Path(cfg.mir_data).is_file():
        raise UserError(f"--mir-data {cfg.mir_data} does not exist")
    if cfg.images and not Path(cfg.images).is_dir():
        raise UserError(f"--images {cfg.images} is not a folder")

    os.environ["TOKENIZERS_PARALLELISM"] = "false"        # batches are prepared in processes of their own
    ranks = parallel.start_ranks(*weights.choose_device(cfg.device, cfg.dtype), cfg.timeout)
    with parallel.losses_explained(ranks):
        for plan in plans:
            run_stage(cfg, plan, out, ranks)
    if ranks.ranks > 1:
        dist.destroy_process_group()
    if toy and ranks.first:
        report(out, stages, cfg.device, cfg.dtype)
        print(f"{time.perf_counter() - began:.0f} s in all")
    if ranks.ranks > 1:
        # A thread of gloo that lets go of a collective's Python tensor while the interpreter is being taken down aborts
        # the process (seen about once in 40 runs). Everything is written: leave without taking it down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    run(main)
