"""Training: stage 1 (projector), stage 2 (projector + language model), or both on the toy, then evaluated and measured.

    python train.py                                                    the toy, in minutes on a laptop
    torchrun --nproc_per_node=8 train.py --loss ce                     the same job on 8 processes
    torchrun --nproc_per_node=8 train.py --stage pretrain --vision CLIP --llm VICUNA --data FILE --images DIR --out O1
    torchrun --nproc_per_node=8 train.py --stage finetune --projector O1 …

Read `train` first: it is the loop. Its settings, setup and the run's folder are in training/.
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


# ----------------------------------------------------------------------------------------- the loop
def train(cfg: TrainConfig, ckpt: Path | None, model: Llava, data: Samples, out: Path, ranks: Ranks,
          pairs: list[Batch]) -> None:
    """Run one stage to its last step: from step 0, or from the checkpoint `ckpt` that `model` was
    built from. Measure MIR on `pairs`, if there are any."""
    step = int(ckpt.name.split("-")[1]) if ckpt else 0   # its name is STAGE-STEP

    # Global batches follow from the seed alone: ranks agree on them, and a resumed run goes on in
    # them. Stage 2 groups samples by modality and length. VDEP's stage 1 shows each a second time.
    lengths = data.samples.lengths() if cfg.stage == "finetune" else None
    order = Order(len(data), cfg.global_batch, cfg.micro_batch, cfg.seed, lengths, ranks.rank,
                  ranks.count, start=step, vdep_samples=second_samples(cfg, len(data)))
    steps = cfg.max_steps or cfg.epochs * order.steps_per_epoch
    accumulation = cfg.global_batch // (ranks.count * cfg.micro_batch)

    # DDP and FSDP wrap model and loss together, because the loss uses weights too: the head's.
    objective = parallel.wrap(Objective(model, cfg), ranks)

    # AdamW without weight decay, as LLaVA. Parameters are grouped by their peak learning rate.
    trained = [p for p in model.parameters() if p.requires_grad]
    groups, betas = parameter_groups(model, cfg), (0.9, cfg.adam_beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=0.0, fused=True)
    if ckpt:
        folder.load_optimizer(optimizer, ckpt)
    once = parallel.reduce_once(trained, ranks)          # True: gradients travel once a step
    if ranks.first:
        print(describe(cfg, ranks, steps, accumulation, trained, once), flush=True)
        log = folder.Log(out / "metrics.jsonl", cfg.stage, step)

    # Workers decode images while a GPU computes. On a CPU they would only take its cores from it.
    on_gpu = ranks.device.type == "cuda"
    usual = 4 if on_gpu else 0
    workers = usual if cfg.workers is None else cfg.workers
    save_after = 60 * (cfg.save_minutes or math.inf)     # seconds since the last checkpoint
    hidden = None if ranks.first else True               # the bar; None: show it in a terminal only
    with (parallel.alarm(ranks, cfg.timeout) as alive, stop_signals() as stop,
          tqdm(total=steps, initial=step, desc=cfg.stage, unit="step", disable=hidden) as bar):
        batches = iter(loader(data, order, workers, pin=on_gpu))
        saved = time.perf_counter()
        while step < steps:
            began = time.perf_counter()
            alive()                                      # else the alarm ends this process

            # This rank's share of one global batch.
            micro = [next(batches) for _ in range(accumulation)]
            folder.note_bad_images(micro, cfg, out)

            # What each term is divided by, summed over ranks before the first forward: a token
            # weighs the same whatever it is batched with, so 1 rank × 8 micro-batches = 8 × 1.
            counts = global_counts(cfg.loss, micro, ranks)

            # Forward and backward. Gradients add up; with the last batch they travel between ranks.
            totals = {name: 0.0 for name in counts}
            for i, batch in enumerate(micro):
                last = i == accumulation - 1
                with parallel.sync_gradients(objective, when=last or not once):
                    with autocast(ranks):
                        terms = objective(batch.to(ranks.device))
                    # min=1: a global batch without an image has image terms of 0 / 0.
                    loss = sum(t.weight * t.total / counts[t.name].clamp(min=1) for t in terms)
                    (loss * ranks.count).backward()      # DDP and FSDP average; our loss is a sum
                for t in terms:
                    totals[t.name] += t.total.detach()
            norm = parallel.clip_gradients(trained, ranks, max_norm=1.0)

            # Sum over ranks. A stop signal on any rank counts, and the first rank's clock: all must
            # save after the same step, or they wait for each other for ever.
            late = ranks.first and time.perf_counter() - saved > save_after
            tokens = sum(batch.attention_mask.sum() for batch in micro)
            summed = ranks.sum([*totals.values(), tokens, len(stop), late])

            # One copy from the device a step, because it waits: all that is checked or logged.
            numbers = torch.cat([summed, torch.stack(list(counts.values())), norm[None]]).tolist()
            n = len(totals)                              # numbers: totals, these three, counts, norm
            tokens, stopping, late = numbers[n:n + 3]
            count, norm = dict(zip(counts, numbers[n + 3:-1])), numbers[-1]
            values = {name: total / max(count[name], 1) for name, total in zip(totals, numbers[:n])}
            loss = sum(t.weight * values[t.name] for t in terms)
            stop_if_not_finite(loss, norm, step + 1, totals, micro, ranks)

            # Weights change here, and nowhere else. A group has its own peak; the log shows --lr's.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, group["peak"], cfg.warmup, cfg.schedule)
            lr = learning_rate(step, steps, cfg.lr, cfg.warmup, cfg.schedule)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            # One line of metrics.jsonl: its values are means over the global batch, of all ranks.
            if ranks.first:
                rate = tokens / (time.perf_counter() - began)
                log.write(stage=cfg.stage, step=step, loss=loss, **values, lr=lr, grad_norm=norm,
                          tokens_per_s=round(rate), supervised=int(count["ce"]),
                          peak_gib=round(parallel.peak_gib(ranks.device), 3))
                show(bar, cfg.stage, step, steps, values, rate)

            # MIR of the new weights. Every rank measures a share of the pairs.
            if pairs and step % cfg.mir_every == 0:
                measured = measure_mir(objective, pairs, step, cfg, ranks)
                if ranks.first:
                    log.write(stage=cfg.stage, step=step, kind="mir", **measured)

            # A checkpoint, and after a signal the end. Neither changes what a later step computes.
            if step == steps or step % cfg.save_every == 0 or late or stopping:
                folder.save(out, cfg, model, optimizer, step, steps, ranks)
                saved = time.perf_counter()
            if stopping and step < steps:
                raise UserError(f"stopped by a signal after step {step} of {cfg.stage}; it is saved: "
                                "--resume continues")


def global_counts(loss: str, micro: list[Batch], ranks: Ranks) -> dict[str, Tensor]:
    """Return each term's denominator over the global batch, as float32 scalars on the device."""
    counts = [count_terms(loss, batch) for batch in micro]         # on the host: no wait for a GPU
    sums = ranks.sum([sum(c[name] for c in counts) for name in counts[0]]).float()
    return dict(zip(counts[0], sums))


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.03, schedule: str = "cosine") -> float:
    """Linear warm-up over a share of the steps, then half a cosine or a line to 0, or constant."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise                  # + 1: rate 0 would waste the first batch
    done = (step - rise) / max(1, steps - rise)          # 0 to almost 1
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def autocast(ranks: Ranks):
    """Matrix products in bfloat16 if that is the dtype of computing; sums and norms in float32."""
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=ranks.dtype == torch.bfloat16)


@contextlib.contextmanager
def stop_signals():
    """Collect SIGTERM and SIGINT in a list, so that the step is finished and saved before the run
    ends. Processes that prepare batches, started inside, survive them too."""
    received, numbers = [], (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(n, lambda n, frame: received.append(n)) for n in numbers]
    try:
        yield received
    finally:
        for n, handler in zip(numbers, before):
            signal.signal(n, handler)


def stop_if_not_finite(loss: float, norm: float, step: int, totals: dict, micro: list[Batch], ranks: Ranks) -> None:
    """Stop every rank before a non-finite number reaches the weights. Names the step, the ranks and the samples."""
    if math.isfinite(loss) and math.isfinite(norm):
        return                                           # on every rank: the numbers are the same

    # Name this rank's samples if one of its own totals is broken: the fault may be another rank's.
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
    """Measure MIR between two steps, each rank its share. Changes nothing for the next step."""
    model = getattr(objective, "module", objective).model          # .module: inside DDP's wrapper
    try:
        # Since the step, FSDP has sharded its root unit again: the word embeddings and the head.
        with parallel.gathered(objective), autocast(ranks):
            return mir.measure(model, pairs)
    except ValueError as e:
        raise UserError(f"--mir-every, step {step} of {cfg.stage}: {e}") from None


# ---------------------------------------------------------------------------------- what is printed
def describe(cfg: TrainConfig, ranks: Ranks, steps: int, accumulation: int, trained: list[Tensor], once: bool) -> str:
    dtype = str(ranks.dtype).removeprefix("torch.")
    split = [f"{n} {name}" for n, name in ((ranks.count, "ranks"), (accumulation, "accumulation steps")) if n > 1]
    batch = f"{cfg.stage}: global batch {cfg.global_batch}"
    if split:
        batch += f" = {' × '.join(split)} × micro-batch {cfg.micro_batch}"
    parts = [batch, f"{steps} steps", f"lr {cfg.lr:g}", cfg.loss, f"{dtype} on {ranks.device}",
             f"{sum(p.numel() for p in trained):,} parameters trained"]
    if ranks.mesh is not None:
        parts.append("sharded" if ranks.mesh.ndim == 1 else "sharded within a node")
    if not once:
        parts.append("gradients reduced after every micro-batch")
    return ", ".join(parts)


def show(bar: tqdm, stage: str, step: int, steps: int, values: dict[str, float], rate: float) -> None:
    """Show the terms of a step: in the bar, or on a line every 50 steps if output goes to a file."""
    terms = " ".join(f"{name} {value:.3f}" for name, value in values.items())
    bar.set_postfix_str(terms, refresh=False)            # update() draws it, now and then
    bar.update()
    if bar.disable and (step % 50 == 0 or step == steps):
        print(f"{stage} step {step}/{steps}  {terms}  {rate / 1000:.1f}k tokens/s", flush=True)


# ------------------------------------------------------------------------------------------- stages
def run_stage(cfg: TrainConfig, flags: TrainConfig, out: Path, ranks: Ranks) -> None:
    """Run a stage from where it was left. cfg: its settings, completed; flags: those of the run."""
    ckpt = folder.newest(out, cfg.stage, ranks)
    if ckpt:
        saved = read_config(ckpt, "step", "steps", "settings")
        if saved["step"] == saved["steps"]:
            return                                       # --resume: this stage is done
        # The recipe may have changed since. (A flag that the checkpoint lacks is newer than it.)
        started = {**vars(cfg), **saved["settings"], "projector": cfg.projector}
        folder.check_same_run(cfg, started, ckpt)

    # Stage 2 of a run of both starts from stage 1's last checkpoint, which exists by now.
    if cfg.stage == "finetune" and flags.stage == "both":
        cfg = replace(cfg, projector=str(checkpoints(out, "pretrain")[-1]))
    ranks = parallel.over(ranks, is_sharded(cfg, ranks.count), hybrid=flags.parallel == "hsdp")
    cfg = prepare(cfg, flags, out, ranks)                # a micro-batch that fits the GPU

    # Errors in weights or data show before anything is written. (The toy has to be drawn first.)
    model = build(cfg, ckpt, ranks)
    if flags.data is None:
        folder.make_folder(flags, out, [], ranks)
        if ranks.first and not (out / "data").exists():
            with new_folder(out / "data") as temporary:  # renamed when it is whole
                world.make(temporary, flags.seed)
        ranks.wait()
    data, bad = load_data(cfg, out, ranks, model.image_tokens)
    pairs = mir_pairs(cfg, data, out)
    folder.make_folder(flags, out, bad, ranks, fingerprints(cfg, data, ckpt))
    train(cfg, ckpt, model, data, out, ranks, pairs)
    ranks.wait()                                         # the next stage reads its checkpoint


def main() -> None:
    began = time.perf_counter()
    flags = fill_parts(parse(TrainConfig))
    out = Path(flags.out)

    # Everything that can be wrong in flags and folders, before any long work.
    check_start(flags)
    names = ["pretrain", "finetune"] if flags.stage == "both" else [flags.stage]
    stages = [settings(flags, name, flags.cards or parallel.rank_count()) for name in names]
    if not flags.plan:
        folder.check_out(flags, out)
    check_folders(flags)
    for cfg in stages:
        check_objective(cfg)
    if flags.plan:                                       # `prepare` prints what each stage needs
        for cfg in stages:
            prepare(cfg, flags, out, Ranks(0, 1, *parallel.choose_device(flags.device, flags.dtype)))
        return

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # batches are prepared in processes of their own
    ranks = parallel.start(*parallel.choose_device(flags.device, flags.dtype), flags.timeout)
    with locked(out, ranks.first):                       # no other run writes to --out
        with parallel.explain_lost_ranks(ranks, advice="--resume continues from the newest checkpoint"):
            ranks.wait()                                 # every rank has looked at --out
            if ranks.first:
                folder.check_out(flags, out)             # again: a run may have ended there since
                folder.clear(flags, out)
            for cfg in stages:
                run_stage(cfg, flags, out, ranks)
            alone = parallel.leave(ranks)                # the report needs the first rank only
        if ranks.first:
            # Imported here: training needs neither benchmarks nor pages.
            if flags.data is None:
                from toy.report import report
                results = report(out, names, alone.device, alone.dtype)
                folder.Log(out / "metrics.jsonl", "report", -1).write(stage="report", step=0, **results)
            else:
                from look.runs import write_report
                write_report(out)
            print(f"{out / 'report.html'} shows the run; {time.perf_counter() - began:.0f} s in all")
    parallel.finish(ranks)


if __name__ == "__main__":
    run(main)
