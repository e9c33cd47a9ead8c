"""A run's folder: run.json, metrics.jsonl, checkpoints, the optimizer's state.

    out/run.json         flags of the run and fingerprints of what it reads, compared on --resume
    out/metrics.jsonl    a line a step
    out/pretrain-250     a checkpoint, see hub/checkpoint.py; out/finetune-1000 likewise
    out/.lock            locked by the first rank while it runs
"""
import json
import os
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch

from common.files import LOCK, parse_log_line, read_json, refuse_device, remove, write_json, write_text
from common.flags import UserError, flag
from common.parallel import Ranks, local, placed
from data import Batch
from hub.checkpoint import OPTIMIZER, checkpoint_problem, checkpoints, save_checkpoint
from hub.tensors import is_finite, open_tensors
from model import Llava
from training.settings import FREE_TO_CHANGE, START, TrainConfig, in_checkout, stores_all

# What a kill or a full disk leaves: temporary names of the files and folders above.
LEFTOVER = re.compile(r"\.(run\.json|metrics\.jsonl|bad_images\.txt|report\.html|results\.json|"
                      r"data|(pretrain|finetune)-\d+)\.tmp")


# --------------------------------------------------------------------------------- start and resume
def check_out(cfg: TrainConfig, out: Path) -> None:
    """Raise UserError if the output folder holds anything but the run to be resumed or replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    holds = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    holds = [name for name in holds if name != LOCK and not LEFTOVER.fullmatch(name)]
    if not holds:
        return
    if cfg.overwrite:
        saved = checkpoints(out)
        if saved or "run.json" not in holds:
            kept = saved[0].name if saved else holds[0]
            raise UserError(f"--overwrite replaces a run that has saved no checkpoint, but {out} "
                            f"holds {kept}: move it away, or give another --out")
    elif not cfg.resume:
        raise UserError(f"{out} is not empty (it holds {', '.join(holds[:4])}): --resume "
                        "continues the run in it, --overwrite replaces one without checkpoints, "
                        "another --out leaves it alone")
    elif "run.json" not in holds:
        raise UserError(f"{out} holds no run to resume (no run.json): give another --out")
    else:
        check_same_run(cfg, read_json(out / "run.json", dict), out)


def check_same_run(cfg: TrainConfig, started: dict, place: Path) -> None:
    """Raise UserError if a run or a checkpoint had other flags; one it lacks had its default."""
    changed = []
    for f in fields(cfg):
        old, new = started.get(f.name, f.default), getattr(cfg, f.name)
        if f.name in ("vision", "llm") and isinstance(old, str):
            old = in_checkout(old)
        if f.name not in FREE_TO_CHANGE and old != new:
            changed.append(f"{flag(f.name)} {old} (now {new})")
    if changed:
        raise UserError(f"--resume: {place} was started with {', '.join(changed)}")


def clear(cfg: TrainConfig, out: Path) -> None:
    """Delete what killed runs left and, with --overwrite, a run that saved no checkpoint: its
    flags, its log, the toy's data. Call with the folder locked."""
    remove([p for p in out.iterdir() if LEFTOVER.fullmatch(p.name)])
    if cfg.overwrite:
        remove([out / name for name in ("metrics.jsonl", "bad_images.txt", "run.json", "data")])


def make_folder(cfg: TrainConfig, out: Path, bad: list[str], ranks: Ranks, files=None) -> None:
    """Write run.json, and bad_images.txt if images are left out. Every rank must call. files: what
    `fingerprints` returns. Raises UserError if another rank or the run's start had other files."""
    files = dict(files or {})
    for rank, seen in enumerate(ranks.gather(files)):
        for name, own in files.items():
            if seen[name] != own:
                raise UserError(f"rank {rank} reads another {name} than rank {ranks.rank} "
                                f"({seen[name]}, not {own}): give every machine the same files")
    files.pop(START, None)                                # a resumed stage has another one
    started = read_json(out / "run.json").get("files", {}) if (out / "run.json").is_file() else {}
    for name, now in files.items():
        if started.get(name, now) != now:
            raise UserError(f"--resume: {name} has changed since {out} was started (then "
                            f"{started[name]}, now {now}): put back what it was, or start a new "
                            "run with another --out")
    ranks.wait()                                          # every rank has read run.json
    if ranks.first:
        write_json(out / "run.json", {**asdict(cfg), "files": {**started, **files}})
        if bad:
            write_text(out / "bad_images.txt", "".join(line + "\n" for line in bad))
    ranks.wait()


def newest(out: Path, stage: str, ranks: Ranks) -> Path | None:
    """Return the newest intact checkpoint of a stage, or None. Damaged ones are renamed *.broken.
    Raises UserError if all of them are damaged: the user must decide to restart."""
    found, damaged = None, []
    if ranks.first:
        for path in reversed(checkpoints(out, stage)):
            problem = checkpoint_problem(path)
            if problem is None:
                found = path
                break
            damaged.append((path, problem))
        if damaged and found is None:
            path, problem = damaged[0]
            raise UserError(f"{problem}, and there is no older checkpoint: move {path} away, then "
                            "--resume restarts the stage")
        for path, problem in damaged:
            shutil.rmtree(f"{path}.broken", ignore_errors=True)
            os.replace(path, f"{path}.broken")
            print(f"{problem}: renamed to {path.name}.broken; {stage} continues from {found.name}")
    return ranks.gather(found)[0]


# ------------------------------------------------------------------------------------ metrics.jsonl
class Log:
    """metrics.jsonl, a line a step. Resuming drops lines of steps that are run again."""
    def __init__(self, path: Path, stage: str, step: int):
        refuse_device(path)
        if path.exists():
            kept, lost = [], 0
            for line in path.read_text("utf-8", "replace").splitlines(keepends=True):
                try:
                    row = parse_log_line(line)
                    if row["stage"] != stage or row["step"] <= step:
                        kept.append(line.rstrip("\n") + "\n")
                except ValueError:
                    lost += line.endswith("\n")           # a stopped run may leave half a line
            if lost:
                print(f"{path}: {lost} unreadable lines are left out", flush=True)
            write_text(path, "".join(kept))
        self.file = open(path, "a", encoding="utf-8")

    def write(self, **values) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()


def note_bad_images(micro: list[Batch], cfg: TrainConfig, out: Path) -> None:
    """Images that could not be decoded: stop, or with --skip-bad-images write them down."""
    bad = [problem for batch in micro for problem in batch.bad]
    if bad and not cfg.skip_bad_images:
        raise UserError(f"{bad[0]}: repair it, or leave such samples out with --skip-bad-images")
    if bad:
        with open(out / "bad_images.txt", "a", encoding="utf-8") as f:
            f.writelines(line + "\n" for line in bad)


# -------------------------------------------------------------------------------------- checkpoints
def save(out: Path, cfg: TrainConfig, model: Llava, optimizer, step: int, steps: int, ranks: Ranks) -> None:
    """Write the checkpoint <out>/<stage>-<step>, then delete all but the newest --keep-last. Of
    those, the newest two keep the optimizer's state: the second serves if the newest is damaged.
    The first rank writes; every rank must call."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    broken = [n for n, p in trained.items() if not is_finite(local(p.detach()))]
    broken = [name for names in ranks.gather(broken[:1]) for name in names]
    if broken:
        raise UserError(f"step {step} of {cfg.stage}: {broken[0]} holds numbers that are not "
                        "finite, so it is not saved: lower --lr. Earlier checkpoints are unchanged")
    if not ranks.first and ranks.mesh is None:
        return
    names = {n for n, p in model.named_parameters() if p.requires_grad or stores_all(cfg)}
    config = {"stage": cfg.stage, "step": step, "steps": steps, "loss": cfg.loss,
              "template": cfg.template, "after_special": cfg.after_special,
              "plain_specials": cfg.plain_specials, "pad": cfg.stage == "finetune",
              "max_length": cfg.max_length, "vision": str(Path(cfg.vision).resolve()),
              "llm": str(Path(cfg.llm).resolve()), "settings": asdict(cfg)}
    save_checkpoint(out / f"{cfg.stage}-{step}", model, names, config, optimizer_tensors(optimizer),
                    write=ranks.first)
    if ranks.first:
        for older in checkpoints(out, cfg.stage)[:-2]:
            (older / OPTIMIZER).unlink(missing_ok=True)
        for older in checkpoints(out, cfg.stage)[:-cfg.keep_last]:
            shutil.rmtree(older)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return AdamW's state by name: 3.exp_avg is of parameter 3; if sharded, this rank's rows."""
    tensors = {}
    for i, moments in optimizer.state_dict()["state"].items():
        for name, tensor in moments.items():
            tensors[f"{i}.{name}"] = tensor
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, ckpt: Path) -> None:
    """Load a checkpoint's optimizer state, written by any number of ranks: one tensor at a time is
    read whole, and cut to this rank's rows. Raises UserError for another model's state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    try:
        with open_tensors(ckpt / OPTIMIZER) as f:
            for key in f.keys():
                i, name = key.split(".")
                tensor, p = f.get_tensor(key), parameters[int(i)]
                if tensor.dim():                          # a moment, not the count of steps
                    if tensor.shape != p.shape:
                        raise ValueError(f"{name} of parameter {i} has shape {tuple(tensor.shape)}")
                    tensor = placed(tensor, p, p.device, tensor.dtype)
                state.setdefault(int(i), {})[name] = tensor
        if len({frozenset(moments) for moments in state.values()}) != 1:
            raise ValueError("it is not whole")
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (IndexError, KeyError, ValueError) as e:
        raise UserError(f"{ckpt / OPTIMIZER} is not the state of this model's optimizer ({str(e)[:100]}): move {ckpt} "
                        "away; --resume then continues from the checkpoint before it") from None
