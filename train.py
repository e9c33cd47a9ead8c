"""Training: stage 1 (projector), stage 2 (projector + language model), or both on the toy, then evaluated and measured.

    python train.py                                                    the toy, in minutes on a laptop
    torchrun --nproc_per_node=8 train.py --loss ce                     the same job on 8 processes
    torchrun --nproc_per_node=8 train.py --stage pretrain --vision CLIP --llm VICUNA --data FILE --images DIR --out O1
    torchrun --nproc_per_node=8 train.py --stage finetune --projector O1 …

A step: the counts of the loss's terms are summed over ranks and accumulation steps, then each micro-batch adds the
gradient of Σ weight · total / count. The result is the same however the global batch is cut.
"""
import contextlib
import math
import os
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mir
from common.files import read_json
from common.flags import UserError, parse, run
from common.parallel import (
    Ranks,
    choose_device,
    clip_gradients,
    explain_lost_ranks,
    finish,
    gathered,
    over,
    reduce_once,
    start,
    sync_gradients,
    wrap,
)
from data import Batch, Order, Samples, loader
from hub.checkpoint import checkpoints
from hub.configs import decoder_config, vision_config
from losses import Objective, Term, counts
from model import Llava
from toy.report import report
from training.folder import Log, check_out, load_optimizer, make_folder, newest, save, unreadable
from training.settings import TrainConfig, settings, stores_all
from training.setup import build, check_projector, groups, load_data, mir_pairs

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 % of the steps, then half a cosine towards 0."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(cfg: TrainConfig, ckpt: Path | None, model: Llava, data: Samples, out: Path, ranks: Ranks,
          pairs: list[Batch]) -> None:
    """One stage, from step 0 or from the checkpoint `ckpt` that `model` was built of, to its last step. MIR is measured
    on `pairs`, if there are any."""
    step = int(ckpt.name.split("-")[1]) if ckpt else 0
    lengths = data.samples.lengths() if cfg.stage == "finetune" else None
    hybrid = cfg.loss == "vdep" and cfg.stage == "pretrain" and cfg.vdep_alpha > 0
    again = round(cfg.vdep_ratio * len(data)) if hybrid else 0
    order = Order(len(data), cfg.global_batch, cfg.micro_batch, cfg.seed, lengths, ranks.rank, ranks.count, step, again)
    steps = cfg.max_steps or cfg.epochs * order.steps_per_epoch
    accumulation = cfg.global_batch // (ranks.count * cfg.micro_batch)
    objective = wrap(Objective(model, cfg), ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(groups(model, cfg), weight_decay=0.0, fused=True)
    if ckpt:
        load_optimizer(optimizer, ckpt)
    hold = reduce_once(trained, ranks)
    if ranks.first:
        print(f"{cfg.stage}: global batch {cfg.global_batch} = {ranks.count} ranks × {accumulation} accumulation × "
              f"{cfg.micro_batch} micro-batch; {steps} steps, lr {cfg.lr:g}, {cfg.loss}, {ranks.dtype} on "
              f"{ranks.device}; {sum(p.numel() for p in trained):,} parameters trained"
              + ", sharded" * (ranks.mesh is not None) + ", gradients after every micro-batch" * (not hold))
        log = Log(out / "metrics.jsonl", cfg.stage, step)

    gpu, shown = ranks.device.type == "cuda", ""
    with (signals_noted() as stop,
          tqdm(total=steps, initial=step, desc=cfg.stage, unit="step", disable=not ranks.first) as bar):
        batches = iter(loader(data, order, 4 * gpu if cfg.workers is None else cfg.workers, pin=gpu))
        while step < steps:
            began = time.perf_counter()
            micro = [next(batches) for _ in range(accumulation)]
            unreadable(micro, cfg, out)
            wanted = [counts(b) for b in micro]
            names = list(wanted[0])
            count = dict(zip(names, ranks.sum([sum(w[n] for w in wanted) for n in names]).float()))

            terms = backward(objective, micro, count, ranks, hold)
            norm = clip_gradients(trained, ranks, 1.0)
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
        with sync_gradients(objective, when=not hold or i == len(micro) - 1):
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.dtype == torch.bfloat16):
                terms = objective(batch.to(ranks.device))
            loss = sum(t.weight * t.total / count[t.name].clamp(min=1) for t in terms)
            (loss * ranks.count).backward()               # gradients are averaged over ranks; the loss is a sum
        for t in terms:
            total = t.total.detach()
            summed[t.name] = t._replace(total=total + summed[t.name].total if t.name in summed else total)
    return list(summed.values())


def measure(objective: nn.Module, pairs: list[Batch], step: int, cfg: TrainConfig, ranks: Ranks) -> dict:
    """MIR in between two steps, every rank its share; nothing of the training is touched."""
    try:
        with (gathered(objective),
              torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.dtype == torch.bfloat16)):
            return mir.measure(getattr(objective, "module", objective).model, pairs)
    except ValueError as e:
        raise UserError(f"--mir-every, step {step} of {cfg.stage}: {e}") from None


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


def run_stage(cfg: TrainConfig, plan: TrainConfig, out: Path, ranks: Ranks) -> None:
    """A stage of the run `cfg`, as `plan` says, from where it was left. Returns when its last checkpoint is there."""
    ckpt = newest(out, plan.stage, ranks)
    if ckpt and (c := read_json(ckpt / "config.json"))["step"] == c["steps"]:
        return                                            # --resume: this stage is done
    if plan.stage == "finetune" and cfg.stage == "both":
        plan = replace(plan, projector=str(checkpoints(out, "pretrain")[-1]))
    ranks = over(ranks, cfg.parallel == "fsdp" or cfg.parallel == "auto" and stores_all(plan))
    # What is wrong with weights or data shows before anything is written. (The toy's data is made here.)
    model = build(plan, ckpt, ranks)
    if cfg.data is None:
        make_folder(cfg, out, [], ranks)
    data, bad = load_data(plan, out, ranks)
    pairs = mir_pairs(plan, data, out)
    make_folder(cfg, out, bad, ranks)
    train(plan, ckpt, model, data, out, ranks, pairs)
    ranks.wait()


def main() -> None:
    began = time.perf_counter()
    cfg = parse(TrainConfig)
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
    for folder, check in [(cfg.vision, vision_config), (cfg.llm, decoder_config)]:
        check(folder)
    layers = decoder_config(cfg.llm).num_hidden_layers
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
    ranks = start(*choose_device(cfg.device, cfg.dtype), cfg.timeout)
    with explain_lost_ranks(ranks):
        for plan in plans:
            run_stage(cfg, plan, out, ranks)
    if toy and ranks.first:
        report(out, stages, cfg.device, cfg.dtype)
        print(f"{time.perf_counter() - began:.0f} s in all")
    finish(ranks)


if __name__ == "__main__":
    run(main)
