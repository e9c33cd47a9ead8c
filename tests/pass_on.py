"""Loads a checkpoint as `--resume` does and saves it again, without a step in between. For test_parallel.py:

    torchrun --nproc_per_node=3 -m tests.pass_on CHECKPOINT fsdp|ddp|one OUT
"""
import json
import os
import sys
from pathlib import Path

import parallel
import torch
from config import read_json

import train
from data import Batch
from losses import Objective


def pass_on(ckpt: Path, kind: str, out: Path) -> None:
    cfg = train.Config(**read_json(ckpt / "config.json")["settings"])
    ranks = parallel.over(parallel.start_ranks(torch.device("cpu"), torch.float32, 2), kind == "fsdp")
    model = train.build(cfg, ckpt, ranks)
    held = sum(parallel.local(p).numel() for b in model.language_model.model["layers"] for p in b.parameters())
    whole = sum(p.numel() for b in model.language_model.model["layers"] for p in b.parameters())
    objective = parallel.wrap(Objective(model, cfg), ranks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0, fused=True)
    train.load_optimizer(optimizer, ckpt)
    torch.manual_seed(0)
    n = model.vision_tower.config.image_tokens
    ids, mask = torch.randint(0, 500, (2, n + 5)), torch.zeros(2, n + 5, dtype=torch.bool)
    mask[:, 1:1 + n] = True
    size = model.vision_tower.config.image_size
    with torch.no_grad(), parallel.gathered(objective):
        batch = Batch(ids, ids, mask, ~mask, torch.randn(2, 3, size, size), mask[:, 1], ~mask[:, 1])
        total = model(batch).hidden_states.double().sum().item()
    train.save(out, cfg, model, optimizer, int(ckpt.name.split("-")[1]), 99, ranks)
    if ranks.first:
        (out / "numbers.json").write_text(json.dumps({"held": held / whole, "total": total}))
    ranks.wait()
    os._exit(0)                             # as train.py ends: gloo may abort while the interpreter is taken down


if __name__ == "__main__":
    pass_on(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
