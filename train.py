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
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")    # threads that spin while they wait
                                                                                # stall a machine that others use too
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import evaluate
import mir
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
    loader,
    read_jsonl,
    read_samples,
)
from losses import LOSSES, Objective, Term, counts
from model import Llava, Projector, VisionConfig
from tokenizer import RULES, load_tokenizer
from toy import world

# What --stage fills in where no flag says otherwise: LLaVA-1.5's recipe, and the toy's when there is no --data.
LLAVA = {"pretrain": dict(global_batch=256, micro_batch=32, lr=1e-3, epochs=1, gradient_checkpointing=True),
         "finetune": dict(global_batch=128, micro_batch=16, lr=2e-5, epochs=1, gradient_checkpointing=True)}
TOY = {"pretrain": dict(global_batch=48, micro_batch=48, lr=1e-2, epochs=4, gradient_checkpointing=False),
       "finetune": dict(global_batch=48, micro_batch=48, lr=3e-3, epochs=1, gradient_checkpointing=False)}
TOY_PROJECTOR_SCALE = 0.25
SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Config:
    """Train a vision-language model. Without --data: the toy, both stages, then evaluated and measured."""
    stage: Literal["both", "pretrain", "finetune"] = option("both", "both: the toy's two stages in one go")
    loss: Literal[tuple(LOSSES)] = option("ce", "the objective")
    vision: str = option("toy/clip", "folder of the vision encoder")
    llm: str = option("toy/llm", "folder of the language model")
    projector: str | None = option(None, "for --stage finetune: the checkpoint of stage 1")
    data: str | None = option(None, "LLaVA JSON or JSONL; unset: the toy, made in --out")
    images: str | None = option(None, "the folder of its images")
    out: str = option("out/toy", "folder for checkpoints, metrics.jsonl and results.json")
    resume: bool = option(False, "go on with the run in --out from its newest checkpoint")
    skip_bad_images: bool = option(False, "go on without samples whose image cannot be read; bad_images.txt lists them")
    global_batch: int | None = option(None, "samples a step, over all ranks and accumulation steps")
    micro_batch: int | None = option(None, "samples a rank works on at a time: the one memory knob")
    lr: float | None = option(None, "peak learning rate")
    epochs: int | None = option(None, "passes over the data")
    max_steps: int | None = option(None, "steps of a stage, instead of epochs")
    template: Literal[tuple(TEMPLATES)] | None = option(None, "of stage 2; unset: by the language model's family")
    after_special: Literal[RULES] = option("4.31", "spaces after </s>: as this transformers has them, see tokenizer.py")
    drop_first_patch: bool = option(False, "728 tokens of SigLIP's 729, as the released TinyLLaVA")
    max_length: int = option(2048, "positions a sample may have; longer text is cut")
    gradient_checkpointing: bool | None = option(None, "recompute activations instead of keeping them")
    projector_scale: float | None = option(None, "factor on the projector's last layer at its start")
    save_every: int = option(500, "steps between checkpoints; the last step is always saved")
    mir_every: int | None = option(None, "steps between measurements of MIR on pairs held out; unset: none")
    mir_data: str | None = option(None, "those pairs: questions or LLaVA's samples, with images in --images")
    workers: int | None = option(None, "processes that prepare batches; unset: 4 a GPU, none beside a CPU")
    seed: int = option(1, "of the projector's start, the order of samples, the toy's pictures")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of computing; auto: bfloat16 where the GPU has it")


FREE_TO_CHANGE = ("resume", "micro_batch", "workers", "save_every", "mir_every", "mir_data", "device",
                  "gradient_checkpointing")               # on --resume


def settings(cfg: Config, stage: str, ranks: int) -> Config:
    """cfg with what is unset filled in for a stage. Raises UserError for settings that cannot be."""
    cfg = replace(cfg, stage=stage, template="plain" if stage == "pretrain" else cfg.template)
    toy = cfg.data is None
    if cfg.template is None:
        family = read_json(Path(cfg.llm) / "config.json").get("model_type")
        cfg = replace(cfg, template=FAMILY_TEMPLATE.get(family, "v1"))
    for name, value in (TOY if toy else LLAVA)[stage].items():
        if getattr(cfg, name) is None and name != "micro_batch":
            cfg = replace(cfg, **{name: value})
    if cfg.projector_scale is None:
        cfg = replace(cfg, projector_scale=TOY_PROJECTOR_SCALE if toy else 1.0)
    for name in ("global_batch", "micro_batch", "lr", "epochs", "max_steps", "max_length", "save_every", "mir_every"):
        if getattr(cfg, name) is not None and not getattr(cfg, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be more than 0, not {getattr(cfg, name)}")
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


# ------------------------------------------------------------------------------------------------ ranks
@dataclass
class Ranks:
    """This process among those of torchrun; alone without it."""
    rank: int
    ranks: int
    device: torch.device
    dtype: torch.dtype

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: list) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        t = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.ranks > 1:
            dist.all_reduce(t)
        return t.tolist()

    def gather(self, value) -> list:
        """Every rank's value, on every rank."""
        if self.ranks == 1:
            return [value]
        out = [None] * self.ranks
        dist.all_gather_object(out, value)
        return out


    def wait(self) -> None:
        """Until every rank is here."""
        if self.ranks > 1:
            dist.barrier()


def start_ranks(cfg: Config) -> Ranks:
    device, dtype = weights.choose_device(cfg.device, cfg.dtype)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if ranks > 1:
        # The first rank alone looks at the images of a data set: the others may have to wait for long.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    return Ranks(rank, ranks, device, dtype)


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
def build(cfg: Config, ckpt: Path | None, ranks: Ranks) -> Llava:
    """The model of a stage from released folders, or from the checkpoint to resume. What is trained is float32 and
    asks for gradients; what is frozen is in the dtype of computing."""
    whole = ckpt is not None and cfg.stage == "finetune"
    trained_llm = cfg.stage == "finetune"
    vision = weights.load_vision(ckpt if whole else cfg.vision, ranks.dtype, ranks.device, vision_config(cfg))
    llm = weights.load_llm(ckpt if whole else cfg.llm, torch.float32 if trained_llm else ranks.dtype, ranks.device)
    sizes = vision.config.hidden_size, llm.config.hidden_size
    source = ckpt or (cfg.projector and stage_checkpoint(cfg.projector, "pretrain"))
    if source:
        projector = weights.load_projector(source, *sizes, torch.float32, ranks.device)
    else:
        torch.manual_seed(cfg.seed)
        projector = Projector(*sizes).to(ranks.device)
        projector.linear_2.weight.data *= cfg.projector_scale
    model = Llava(vision, projector, llm)
    model.vision_tower.requires_grad_(False)
    model.language_model.requires_grad_(trained_llm)
    llm.gradient_checkpointing = cfg.gradient_checkpointing
    return model


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


def load_data(cfg: Config, out: Path, ranks: Ranks) -> tuple[Samples, list[str]]:
    """The samples of a stage, read and checked, and the images that cannot be used. Raises UserError before any step
    if there are such images and they are not to be skipped."""
    toy = out / "data"
    path, images = (toy / f"{cfg.stage}.json", toy / "images") if cfg.data is None else (cfg.data, cfg.images)
    samples, without = read_samples(path)
    if images is None and any(s.get("image") is not None for s in samples):
        raise UserError(f"{path} names images: say with --images in which folder they are")
    tokenizer, processor, vision = load_tokenizer(cfg.llm), ImageProcessor.from_folder(cfg.vision), vision_config(cfg)
    end(tokenizer, cfg.template)                          # else the template is another family's
    if processor.crop_size != vision.image_size:
        raise UserError(f"{cfg.vision}: preprocessor_config.json makes images of {processor.crop_size} pixels, but "
                        f"config.json wants {vision.image_size}: they are not of one model")
    data = Samples(samples, images or ".", tokenizer, processor, cfg.template, vision.image_tokens,
                   cfg.max_length, cfg.stage == "finetune", cfg.after_special)
    found = ranks.gather(data.image_problems() if ranks.first else None)[0]
    bad = [f"{images}/{name}: {why}" for name, why in found.items()]
    if bad and not cfg.skip_bad_images:
        raise UserError(f"{len(bad)} images cannot be used ({'; '.join(bad[:5])}{'; …' if len(bad) > 5 else ''}): mend "
                        "them, or go on without them with --skip-bad-images")
    data.samples = [s for s in samples if s.get("image") not in found]
    left_out = len(samples) - len(data)
    if not data.samples:
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
    lengths = data.lengths() if cfg.stage == "finetune" else None
    order = Order(len(data), cfg.global_batch, cfg.micro_batch, cfg.seed, lengths, ranks.rank, ranks.ranks, step)
    steps = cfg.max_steps or cfg.epochs * order.steps_per_epoch
    accumulation = cfg.global_batch // (ranks.ranks * cfg.micro_batch)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=cfg.lr, weight_decay=0.0, fused=True)
    if ckpt:
        optimizer.load_state_dict(read_state(ckpt, ranks.device)["optimizer"])
    objective = Objective(model, cfg.loss)
    if ranks.ranks > 1:
        objective = nn.parallel.DistributedDataParallel(objective)
    if ranks.first:
        print(f"{cfg.stage}: global batch {cfg.global_batch} = {ranks.ranks} ranks × {accumulation} accumulation × "
              f"{cfg.micro_batch} micro-batch; {steps} steps, lr {cfg.lr:g}, {cfg.loss}, {ranks.dtype} on "
              f"{ranks.device}; {sum(p.numel() for p in trained.values()):,} parameters trained")
        log = Log(out / "metrics.jsonl", cfg.stage, step)

    stop = []                                             # a signal asks to save and leave after the current step
    before = [signal.signal(s, lambda number, frame: stop.append(number)) for s in SIGNALS]
    gpu, shown = ranks.device.type == "cuda", ""
    batches = iter(loader(data, order, 4 * gpu if cfg.workers is None else cfg.workers, pin=gpu))
    with tqdm(total=steps, initial=step, desc=cfg.stage, unit="step", disable=not ranks.first) as bar:
        while step < steps:
            began = time.perf_counter()
            micro = [next(batches) for _ in range(accumulation)]
            unreadable(micro, cfg, out)
            wanted = [counts(b) for b in micro]
            names = list(wanted[0])
            count = dict(zip(names, ranks.sum([sum(w[n] for w in wanted) for n in names])))

            terms = backward(objective, micro, count, ranks)
            gradient = float(nn.utils.clip_grad_norm_(trained.values(), 1.0))
            *totals, tokens, stopping = ranks.sum(
                [*(t.total for t in terms), sum(b.attention_mask.sum() for b in micro), len(stop)])
            values = {t.name: total / max(count[t.name], 1) for t, total in zip(terms, totals)}
            loss = sum(t.weight * values[t.name] for t in terms)
            check_finite(loss, gradient, step + 1, terms, micro, ranks)

            lr = learning_rate(step, steps, cfg.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if ranks.first:
                rate = tokens / (time.perf_counter() - began)
                named = " ".join(f"{n} {v:.3f}" for n, v in values.items())
                bar.set_postfix_str(f"{named}{shown} lr {lr:.1e} {rate / 1000:.1f}k tok/s", refresh=False)
                bar.update()
                log.write(stage=cfg.stage, step=step, loss=loss, **values, lr=lr, grad_norm=gradient,
                          tokens_per_s=round(rate), supervised=int(count["ce"]),
                          peak_gib=round(peak_gib(ranks.device), 3))
            if pairs and step % cfg.mir_every == 0:
                m = measure(model, pairs, step, cfg, ranks)
                shown = f" MIR {m['mir']:.3f}"
                if ranks.first:
                    log.write(stage=cfg.stage, step=step, kind="mir", **m)
            if ranks.first and (step == steps or step % cfg.save_every == 0 or stopping):
                save(out, cfg, model, optimizer, step, steps)
            if stopping and step < steps:
                raise UserError(f"stopped by a signal after step {step} of {cfg.stage}; it is saved: --resume goes on")
    for s, handler in zip(SIGNALS, before):
        signal.signal(s, handler)


def backward(objective: nn.Module, micro: list[Batch], count: dict[str, float], ranks: Ranks) -> list[Term]:
    """Adds the gradient of Σ weight · total / count of a step's micro-batches; count is over the global batch.
    Returns the terms with their totals over this rank's micro-batches."""
    summed = {}
    for i, batch in enumerate(micro):
        last = i == len(micro) - 1                        # gradients travel once a step
        with contextlib.nullcontext() if last or ranks.ranks == 1 else objective.no_sync():
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.dtype == torch.bfloat16):
                terms = objective(batch.to(ranks.device))
            loss = sum(t.weight * t.total / max(count[t.name], 1) for t in terms)
            (loss * ranks.ranks).backward()               # DDP averages over ranks; the loss is a sum
        for t in terms:
            total = t.total.detach()
            summed[t.name] = t._replace(total=total + summed[t.name].total if t.name in summed else total)
    return list(summed.values())


def measure(model: Llava, pairs: list[Batch], step: int, cfg: Config, ranks: Ranks) -> dict:
    """MIR in between two steps, every rank its share; nothing of the training is touched."""
    try:
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.dtype == torch.bfloat16):
            return mir.measure(model, pairs)
    except ValueError as e:
        raise UserError(f"--mir-every, step {step} of {cfg.stage}: {e}") from None


def read_state(ckpt: Path, device: torch.device) -> dict:
    try:
        return torch.load(ckpt / "state.pt", map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(f"{ckpt}/state.pt is missing or cut off ({str(e).splitlines()[0][:80]}): move {ckpt} away, and "
                        "--resume goes on from what was saved before it") from None


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


def save(out: Path, cfg: Config, model: Llava, optimizer, step: int, steps: int) -> None:
    """Checkpoint <out>/<stage>-<step>; the stage's previous one goes when this one is there."""
    older = weights.checkpoints(out, cfg.stage)
    names = {n for n, p in model.named_parameters() if p.requires_grad or cfg.stage == "finetune"}
    config = {"stage": cfg.stage, "step": step, "steps": steps, "loss": cfg.loss, "template": cfg.template,
              "after_special": cfg.after_special, "pad": cfg.stage == "finetune", "max_length": cfg.max_length,
              "vision": str(Path(cfg.vision).resolve()), "llm": str(Path(cfg.llm).resolve()), "settings": asdict(cfg)}
    path = out / f"{cfg.stage}-{step}"
    weights.save_checkpoint(path, model, names, config, {"optimizer": optimizer.state_dict(), "step": step})
    for p in older:
        if p != path:
            shutil.rmtree(p)


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


def main() -> None:
    began = time.perf_counter()
    cfg = parse(Config)
    ranks_wanted = int(os.environ.get("WORLD_SIZE", 1))
    toy, out = cfg.data is None, Path(cfg.out)
    if cfg.stage == "both" and not toy:
        raise UserError("--data is of one stage: say which with --stage pretrain or --stage finetune")
    if cfg.stage == "both" and (cfg.lr or cfg.epochs):
        raise UserError("--lr and --epochs are of one stage: say which with --stage pretrain or --stage finetune")
    if cfg.projector and cfg.stage != "finetune":
        raise UserError("--projector is where --stage finetune starts from; it has no use in --stage " + cfg.stage)
    stages = ["pretrain", "finetune"] if cfg.stage == "both" else [cfg.stage]
    plans = [settings(cfg, stage, ranks_wanted) for stage in stages]
    check_out(cfg, out)
    for folder, check in [(cfg.vision, weights.vision_config), (cfg.llm, weights.decoder_config)]:
        check(folder)
    if cfg.projector:
        stage_checkpoint(cfg.projector, "pretrain")
    if not toy and not Path(cfg.data).is_file():
        raise UserError(f"--data {cfg.data} does not exist")
    if cfg.mir_data and not Path(cfg.mir_data).is_file():
        raise UserError(f"--mir-data {cfg.mir_data} does not exist")
    if cfg.images and not Path(cfg.images).is_dir():
        raise UserError(f"--images {cfg.images} is not a folder")

    os.environ["TOKENIZERS_PARALLELISM"] = "false"        # batches are prepared in processes of their own
    ranks = start_ranks(cfg)
    for plan in plans:
        ckpt = (weights.checkpoints(out, plan.stage) or [None])[-1]
        if ckpt and (c := read_json(ckpt / "config.json"))["step"] == c["steps"]:
            continue                                      # --resume: this stage is done
        if plan.stage == "finetune" and cfg.stage == "both":
            plan = replace(plan, projector=str(weights.checkpoints(out, "pretrain")[-1]))
        # What is wrong with weights or data shows before anything is written. (The toy's data is made here.)
        model = build(plan, ckpt, ranks)
        if toy:
            begin(cfg, out, [], ranks)
        data, bad = load_data(plan, out, ranks)
        pairs = held_out(plan, data, out)
        begin(cfg, out, bad, ranks)
        train(plan, ckpt, model, data, out, ranks, pairs)
        ranks.wait()                                      # the checkpoint is there for all
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
