"""Training: stage 1 (projector), stage 2 (projector + language model), or both on the toy, then evaluated and measured.

    python train.py                                                    the toy, in minutes on a laptop
    torchrun --nproc_per_node=8 train.py --loss ce                     the same job on 8 processes
    torchrun --nproc_per_node=8 train.py --stage pretrain --vision CLIP --llm VICUNA --data FILE --images DIR --out O1
    torchrun --nproc_per_node=8 train.py --stage finetune --projector O1 …

Read `train` first: it is the loop. Its settings come from training/settings.py, its model and samples from
training/setup.py, its files go through training/folder.py.
"""
import contextlib
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import mir
from common import parallel
from common.files import locked, new_folder
from common.flags import UserError, parse, run
from common.parallel import Ranks
from data import Batch, Order, Samples, loader
from hub.checkpoint import checkpoints
from hub.configs import read_config
from losses import Objective, count_terms
from model import Llava
from toy import world
from training import folder
from training.plan import prepare
from training.settings import TrainConfig, check_start, fill_parts, is_sharded, second_samples, settings
from training.setup import build, check_folders, check_objective, fingerprints, load_data, mir_pairs, parameter_groups

# Steps between two lines of output where there is no terminal for a progress bar.
LINE_EVERY = 50


# ----------------------------------------------------------------------------------------- the loop
def train(cfg: TrainConfig, ckpt: Path | None, model: Llava, data: Samples, out: Path, ranks: Ranks,
          pairs: list[Batch]) -> None:
    """Run one stage from step 0, or from the checkpoint `ckpt` that `model` was built from, to its last step. MIR is
    measured on `pairs`, if there are any."""
    step = int(ckpt.name.split("-")[1]) if ckpt else 0
    order = make_order(cfg, data, ranks, step)
    steps = cfg.max_steps or cfg.epochs * order.steps_per_epoch
    accumulation = cfg.global_batch // (ranks.count * cfg.micro_batch)
    on_gpu = ranks.device.type == "cuda"

    # DDP and FSDP wrap model and loss together: the loss uses weights of the model, its head among them.
    objective = parallel.wrap(Objective(model, cfg), ranks)
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = 0.9, cfg.adam_beta2
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg), betas=betas, weight_decay=0.0, fused=True)
    if ckpt:
        folder.load_optimizer(optimizer, ckpt)
    once = parallel.reduce_once(trained, ranks)
    if ranks.first:
        print(describe(cfg, ranks, steps, accumulation, trained, once), flush=True)
        log = folder.Log(out / "metrics.jsonl", cfg.stage, step)

    hidden = None if ranks.first else True  # the bar: of the first rank, and only in a terminal
    with (parallel.alarm(ranks, cfg.timeout) as alive, stop_signals() as stop,
          tqdm(total=steps, initial=step, desc=cfg.stage, unit="step", disable=hidden) as bar):
        workers = (4 if on_gpu else 1) if cfg.workers is None else cfg.workers
        batches = iter(loader(data, order, workers, pin=on_gpu))
        saved = time.perf_counter()
        while step < steps:
            began = time.perf_counter()
            alive()

            # This rank's share of one global batch.
            micro = [next(batches) for _ in range(accumulation)]
            folder.note_bad_images(micro, cfg, out)

            # What each term is divided by, summed over ranks before the first forward: a token weighs the same
            # whatever it is batched with. So 1 rank × 8 accumulation steps = 8 ranks × 1.
            counts = global_counts(cfg.loss, micro, ranks)

            # Forward and backward. Gradients are reduced over ranks once, with the last micro-batch.
            totals = {name: 0.0 for name in counts}
            for i, batch in enumerate(micro):
                last = i == accumulation - 1
                with parallel.sync_gradients(objective, when=last or not once):
                    with autocast(ranks):
                        terms = objective(batch.to(ranks.device))
                    loss = sum(t.weight * t.total / counts[t.name].clamp(min=1) for t in terms)
                    (loss * ranks.count).backward()       # DDP and FSDP average over ranks; our loss is a sum
                for t in terms:
                    totals[t.name] += t.total.detach()
            norm = parallel.clip_gradients(trained, ranks, max_norm=1.0)

            # One copy from the device a step: everything that is checked or logged. A stop signal on any rank counts,
            # and the first rank's clock, so that all ranks save after the same step.
            late = ranks.first and cfg.save_minutes and time.perf_counter() - saved > 60 * cfg.save_minutes
            tokens = sum(batch.attention_mask.sum() for batch in micro)
            summed = ranks.sum([*totals.values(), tokens, len(stop), bool(late)])
            numbers = torch.cat([summed, torch.stack(list(counts.values())), norm[None]]).tolist()
            n = len(totals)
            total, count, norm = numbers[:n], dict(zip(counts, numbers[n + 3:-1])), numbers[-1]
            tokens, stopping, late = numbers[n:n + 3]
            values = {name: t / max(count[name], 1) for name, t in zip(totals, total)}
            loss = sum(t.weight * values[t.name] for t in terms)
            stop_if_not_finite(loss, norm, step + 1, totals, micro, ranks)

            # Weights change here, and nowhere else.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, group["peak"], cfg.warmup, cfg.schedule)
            lr = learning_rate(step, steps, cfg.lr, cfg.warmup, cfg.schedule)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            if ranks.first:
                rate = tokens / (time.perf_counter() - began)
                log.write(stage=cfg.stage, step=step, loss=loss, **values, lr=lr, grad_norm=norm,
                          tokens_per_s=round(rate), supervised=int(count["ce"]),
                          peak_gib=round(parallel.peak_gib(ranks.device), 3))
                show(bar, cfg.stage, step, steps, values, rate)
            if pairs and step % cfg.mir_every == 0:
                measured = measure_mir(objective, pairs, step, cfg, ranks)
                if ranks.first:
                    log.write(stage=cfg.stage, step=step, kind="mir", **measured)
            if step == steps or step % cfg.save_every == 0 or late or stopping:
                folder.save(out, cfg, model, optimizer, step, steps, ranks)
                saved = time.perf_counter()
            if stopping and step < steps:
                raise UserError(f"stopped by a signal after step {step} of {cfg.stage}; it is saved: "
                                "--resume continues")


def make_order(cfg: TrainConfig, data: Samples, ranks: Ranks, step: int) -> Order:
    """Return the order of samples from a step on. Stage 2 groups by modality and length. VDEP's stage 1 shows samples a
    second time, in VDEP mode."""
    lengths = data.samples.lengths() if cfg.stage == "finetune" else None
    return Order(len(data), cfg.global_batch, cfg.micro_batch, cfg.seed, lengths, ranks.rank,
                 ranks.count, step, second_samples(cfg, len(data)))


def global_counts(loss: str, micro: list[Batch], ranks: Ranks) -> dict[str, Tensor]:
    """Return the denominator of each term of an objective, over the global batch, as float32 scalars on the device."""
    counts = [count_terms(loss, batch) for batch in micro]
    sums = ranks.sum([sum(c[name] for c in counts) for name in counts[0]]).float()
    return dict(zip(counts[0], sums))


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.03, schedule: str = "cosine") -> float:
    """Linear warm-up over a share of the steps, then half a cosine or a line towards 0, or constant."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def autocast(ranks: Ranks):
    """Matrix products in bfloat16 if that is the dtype of computing; sums and norms stay float32."""
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.dtype == torch.bfloat16)


@contextlib.contextmanager
def stop_signals():
    """Collect SIGTERM and SIGINT in a list, so that the step is finished and saved before the run ends. Processes that
    prepare batches, started inside, survive them too."""
    received = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_not_finite(loss: float, norm: float, step: int, totals: dict, micro: list[Batch], ranks: Ranks) -> None:
    """Stop every rank before a non-finite number reaches the weights. Names the step, the ranks and the samples."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    ids = []
    if not all(total.isfinite() for total in totals.values()):
        ids = [i for batch in micro for i in batch.ids]
    places = []
    for rank, found in enumerate(ranks.gather(ids)):
        if found:
            more = ", …" if len(found) > 8 else ""
            places.append(f"rank {rank}, samples {', '.join(found[:8])}{more}")
    where = "; ".join(places) or "every loss was finite"
    raise UserError(f"step {step}: loss {loss}, gradient norm {norm}; {where}. The last "
                    "checkpoint is unchanged: lower --lr, or look at those samples")


def measure_mir(objective: nn.Module, pairs: list[Batch], step: int, cfg: TrainConfig, ranks: Ranks) -> dict:
    """Measure MIR between two steps, each rank its share. Training continues as if it had not been measured."""
    try:
        with parallel.gathered(objective), autocast(ranks):
            return mir.measure(getattr(objective, "module", objective).model, pairs)
    except ValueError as e:
        raise UserError(f"--mir-every, step {step} of {cfg.stage}: {e}") from None


# ---------------------------------------------------------------------------------- what is printed
def describe(cfg: TrainConfig, ranks: Ranks, steps: int, accumulation: int, trained: list[Tensor], once: bool) -> str:
    factors = []
    if ranks.count > 1:
        factors.append(f"{ranks.count} ranks")
    if accumulation > 1:
        factors.append(f"{accumulation} accumulation steps")
    batch = f"{cfg.stage}: global batch {cfg.global_batch}"
    if factors:
        batch += f" = {' × '.join(factors)} × micro-batch {cfg.micro_batch}"
    dtype = str(ranks.dtype).removeprefix("torch.")
    parts = [batch, f"{steps} steps", f"lr {cfg.lr:g}", cfg.loss, f"{dtype} on {ranks.device}",
             f"{sum(p.numel() for p in trained):,} parameters trained"]
    if ranks.mesh is not None:
        parts.append("sharded" if ranks.mesh.ndim == 1 else "sharded within a node")
    if not once:
        parts.append("gradients reduced after every micro-batch")
    return ", ".join(parts)


def show(bar: tqdm, stage: str, step: int, steps: int, values: dict[str, float], rate: float) -> None:
    """Show the terms of a step: in the bar, or every 50 steps as a line where output goes to a file."""
    terms = " ".join(f"{name} {value:.3f}" for name, value in values.items())
    bar.set_postfix_str(terms, refresh=False)
    bar.update()
    if bar.disable and (step % LINE_EVERY == 0 or step == steps):
        print(f"{stage} step {step}/{steps}  {terms}  {rate / 1000:.1f}k tokens/s", flush=True)


# ------------------------------------------------------------------------------------------- stages
def make_toy(cfg: TrainConfig, out: Path, ranks: Ranks) -> None:
    """Draw the toy's data into the run's folder, unless it is there."""
    folder.make_folder(cfg, out, [], ranks)
    if ranks.first and not (out / "data").exists():
        with new_folder(out / "data") as temporary:
            world.make(temporary, cfg.seed)
    ranks.wait()


def run_stage(cfg: TrainConfig, stage: TrainConfig, out: Path, ranks: Ranks) -> None:
    """Run a stage of the run `cfg` from where it was left. Returns when its last checkpoint is saved."""
    ckpt = folder.newest(out, stage.stage, ranks)
    if ckpt:
        saved = read_config(ckpt, "step", "steps", "settings")
        if saved["step"] == saved["steps"]:
            return                                        # --resume: this stage is done
        # The recipe may have changed since. (A flag that the checkpoint lacks is newer than it.)
        folder.check_same_run(stage,
                              {**vars(stage), **saved["settings"], "projector": stage.projector},
                              ckpt)
    if stage.stage == "finetune" and cfg.stage == "both":
        stage = replace(stage, projector=str(checkpoints(out, "pretrain")[-1]))
    ranks = parallel.over(ranks, sharded=is_sharded(stage, ranks.count),
                          hybrid=cfg.parallel == "hsdp")
    stage = prepare(stage, cfg, out, ranks)

    # Errors in weights or data show before anything is written. (The toy's data has to be made first.)
    model = build(stage, ckpt, ranks)
    if cfg.data is None:
        make_toy(cfg, out, ranks)
    data, bad = load_data(stage, out, ranks, model.image_tokens)
    pairs = mir_pairs(stage, data, out)
    folder.make_folder(cfg, out, bad, ranks, fingerprints(stage, data, ckpt))
    train(stage, ckpt, model, data, out, ranks, pairs)
    ranks.wait()


def main() -> None:
    began = time.perf_counter()
    cfg = fill_parts(parse(TrainConfig))
    out = Path(cfg.out)

    # Everything that can be wrong in flags and folders, before any long work.
    check_start(cfg)
    stages = ["pretrain", "finetune"] if cfg.stage == "both" else [cfg.stage]
    plans = [settings(cfg, stage, cfg.cards or parallel.rank_count()) for stage in stages]
    if not cfg.plan:
        folder.check_out(cfg, out)
    check_folders(cfg)
    for plan in plans:
        check_objective(plan)
    if cfg.plan:
        for plan in plans:
            prepare(plan, cfg, out, Ranks(0, 1, *parallel.choose_device(cfg.device, cfg.dtype)))
        return

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # batches are prepared in processes of their own
    ranks = parallel.start(*parallel.choose_device(cfg.device, cfg.dtype), cfg.timeout)
    with locked(out, ranks.first):  # until the end: no other run writes to --out
        with parallel.explain_lost_ranks(ranks, advice="--resume continues from the newest checkpoint"):
            ranks.wait()                                  # every rank has looked at --out
            if ranks.first:
                folder.check_out(cfg, out)  # again: another run may have ended there since
                folder.clear(cfg, out)
            for plan in plans:
                run_stage(cfg, plan, out, ranks)
            alone = parallel.leave(ranks)                 # the report needs the first rank only
        if ranks.first:  # imported here: training needs neither benchmarks nor pages
            if cfg.data is None:
                from toy.report import report
                results = report(out, stages, alone.device, alone.dtype)
                folder.Log(out / "metrics.jsonl", "report", -1).write(stage="report", step=0, **results)
            else:
                from look.runs import write_report
                write_report(out)
            print(f"{out / 'report.html'} shows the run; {time.perf_counter() - began:.0f} s in all")
    parallel.finish(ranks)


if __name__ == "__main__":
    run(main)
