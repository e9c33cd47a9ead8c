"""Load a checkpoint as `--resume` does and save it again, without a step in between. For test_parallel.py:

    torchrun --nproc_per_node=3 -m tests.pass_on CHECKPOINT fsdp|hsdp|ddp|one OUT
"""
import json
import sys
from pathlib import Path

import torch

from common.files import read_json
from common.parallel import finish, gathered, local, over, start, wrap
from data import Batch
from losses import Objective
from training.folder import load_optimizer, save
from training.settings import TrainConfig
from training.setup import build


def pass_on(ckpt: Path, kind: str, out: Path) -> None:
    cfg = TrainConfig(**read_json(ckpt / "config.json")["settings"])
    ranks = over(start(torch.device("cpu"), torch.float32, 2), kind == "fsdp", kind == "hsdp")
    model = build(cfg, ckpt, ranks)
    held = sum(local(p).numel() for b in model.language_model.model["layers"]
               for p in b.parameters())
    whole = sum(p.numel() for b in model.language_model.model["layers"] for p in b.parameters())
    objective = wrap(Objective(model, cfg), ranks)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  weight_decay=0.0, fused=True)
    load_optimizer(optimizer, ckpt)
    torch.manual_seed(0)
    n = model.vision_tower.config.image_tokens
    ids, mask = torch.randint(0, 500, (2, n + 5)), torch.zeros(2, n + 5, dtype=torch.bool)
    mask[:, 1:1 + n] = True
    size = model.vision_tower.config.image_size
    with torch.no_grad(), gathered(objective):
        batch = Batch(ids, ids, mask, ~mask, torch.randn(2, 3, size, size), mask[:, 1], ~mask[:, 1])
        total = model(batch).hidden_states.double().sum().item()
    save(out, cfg, model, optimizer, int(ckpt.name.split("-")[1]), 99, ranks)
    if ranks.first:
        (out / "numbers.json").write_text(json.dumps({"held": held / whole, "total": total}))
    finish(ranks)


if __name__ == "__main__":
    pass_on(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
