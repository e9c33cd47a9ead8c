"""A run's folder: run.json, metrics.jsonl, checkpoints, the optimizer's state, resume."""
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from common.files import read_json, write_json
from common.flags import UserError
from common.parallel import Ranks, placed, whole
from data import Batch
from hub.checkpoint import checkpoint_problem, checkpoints, save_checkpoint
from model import Llava
from toy.world import make as make_world
from training.settings import FREE_TO_CHANGE, TrainConfig, stores_all


def check_out(cfg: TrainConfig, out: Path) -> None:
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


def newest(out: Path, stage: str, ranks: Ranks) -> Path | None:
    """The newest checkpoint of a stage that is whole, or None if there is none at all. One that is not whole is renamed
    *.broken. Raises UserError if all are: starting anew is for somebody to decide."""
    found = None
    if ranks.first:
        problems = []
        for path in reversed(checkpoints(out, stage)):
            problem = checkpoint_problem(path)
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


def make_folder(cfg: TrainConfig, out: Path, bad: list[str], ranks: Ranks) -> None:
    """Makes the run's folder: what it was asked to do, the toy's data, the images it does without."""
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "run.json", asdict(cfg))
        if cfg.data is None and not (out / "data").exists():
            shutil.rmtree(out / ".data.tmp", ignore_errors=True)
            make_world(out / ".data.tmp", cfg.seed)
            os.replace(out / ".data.tmp", out / "data")
        if bad:
            (out / "bad_images.txt").write_text("".join(line + "\n" for line in bad))
    ranks.wait()


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
                kept[name] = placed(t, parameters[i], parameters[i].device, t.dtype)
    optimizer.load_state_dict(state)


def gather_optimizer(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict:
    """The optimizer's whole state in the first rank's memory (8 bytes a trained parameter). Every rank must call."""
    state = optimizer.state_dict()
    out = {}
    for i, kept in state["state"].items():
        out[i] = {}
        for name, t in kept.items():
            full = whole(t)
            if ranks.first:
                out[i][name] = full.cpu()
    return {**state, "state": out}


def save(out: Path, cfg: TrainConfig, model: Llava, optimizer, step: int, steps: int, ranks: Ranks) -> None:
    """Checkpoint <out>/<stage>-<step>, written by the first rank; when it is there, all but --keep-last go."""
    if not ranks.first and ranks.mesh is None:
        return
    names = {n for n, p in model.named_parameters() if p.requires_grad or stores_all(cfg)}
    config = {"stage": cfg.stage, "step": step, "steps": steps, "loss": cfg.loss, "template": cfg.template,
              "after_special": cfg.after_special, "pad": cfg.stage == "finetune", "max_length": cfg.max_length,
              "vision": str(Path(cfg.vision).resolve()), "llm": str(Path(cfg.llm).resolve()), "settings": asdict(cfg)}
    path = out / f"{cfg.stage}-{step}"
    state = {"optimizer": gather_optimizer(optimizer, ranks), "step": step}
    save_checkpoint(path, model, names, config, state, write=ranks.first)
    if ranks.first:
        for older in checkpoints(out, cfg.stage)[:-cfg.keep_last]:
            shutil.rmtree(older)


def unreadable(micro: list[Batch], cfg: TrainConfig, out: Path) -> None:
    """Images that broke only when they were decoded: stop, or with --skip-bad-images write them down."""
    bad = [problem for b in micro for problem in b.bad]
    if bad and not cfg.skip_bad_images:
        raise UserError(f"{bad[0]}: mend it, or go on without such samples with --skip-bad-images")
    if bad:
        with open(out / "bad_images.txt", "a") as f:
            f.write("".join(line + "\n" for line in bad))
