"""FSDP and DDP on gloo ranks: the numbers of one process, and checkpoints that any of them goes on from."""
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import call, launch, losses_of
from safetensors.torch import load_file
from test_train import command
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from common.parallel import Ranks, over, sync_gradients, wrap
from hub.tensors import save_tensors, weight_files
from losses import Term


@pytest.mark.parametrize("ranks, micro, flags", [
    (2, 4, ["--loss", "vista", "--moca", "--gradient-checkpointing"]), (4, 2, ["--loss", "basic", "--moca"])])
def test_a_model_cut_over_ranks_trains_as_one_process_does(small_world, tmp_path, ranks, micro, flags):
    arguments = [*command(small_world, tmp_path / "one"), *flags]
    assert call(*arguments).returncode == 0
    done = launch(*command(small_world, tmp_path / "cut", **{"micro-batch": micro}), *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert "parameters trained, sharded" in done.stdout, "stage 2 on several ranks is not sharded by default"
    wanted, got = losses_of(tmp_path / "one", "finetune"), losses_of(tmp_path / "cut", "finetune")
    assert len(got) == 20
    worst = max(abs(a - b) for a, b in zip(wanted, got))
    assert worst < 1e-5, f"the losses differ by {worst}: is the gradient averaged once, clipped by all ranks' norm?"
    norms = [[json.loads(line)["grad_norm"] for line in (tmp_path / run / "metrics.jsonl").open()]
             for run in ("one", "cut")]
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(*norms)), "clipping would differ"


def same(a, b) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_checkpoint_goes_from_one_process_over_fsdp_and_ddp_and_back_bit_for_bit(small_world, tmp_path):
    assert call(*command(small_world, tmp_path / "start", steps=2), "--moca").returncode == 0
    first = last = tmp_path / "start" / "finetune-2"
    totals = set()
    for kind, ranks in [("fsdp", 2), ("ddp", 2), ("fsdp", 3), ("one", 1)]:
        out = tmp_path / f"{kind}{ranks}"
        out.mkdir()
        done = launch("-m", "tests.pass_on", last, kind, out, ranks=ranks)
        assert done.returncode == 0, done.stderr
        numbers = json.loads((out / "numbers.json").read_text())
        assert numbers["held"] <= (1 / ranks + 0.02 if kind == "fsdp" else 1), "a rank holds more than its share"
        totals.add(round(numbers["total"], 2))
        last = out / "finetune-2"
        before, after = ((p / "model.safetensors").read_bytes() for p in (first, last))
        assert before == after, f"the weights changed in {out.name}"
        states = [torch.load(p / "state.pt", weights_only=True) for p in (first, last)]
        assert same(*states), f"the optimizer's state changed in {out.name}"
    assert len(totals) == 1, "inside gathered a model computes something else than it does whole"


def test_a_run_goes_on_with_another_number_of_ranks_and_way_to_cut(small_world, tmp_path):
    assert call(*command(small_world, tmp_path / "one", steps=6)).returncode == 0
    out = tmp_path / "run"
    start = command(small_world, out, steps=6, **{"save-every": 2, "keep-last": 3})
    assert launch(*start, ranks=2).returncode == 0
    for ranks, way in [(1, "auto"), (2, "ddp"), (4, "fsdp")]:
        shutil.rmtree(out / "finetune-6")
        done = launch(*start, "--resume", "--parallel", way, ranks=ranks)
        assert done.returncode == 0, done.stderr
        worst = max(abs(a - b) for a, b in zip(losses_of(tmp_path / "one", "finetune"), losses_of(out, "finetune")))
        assert worst < 1e-5 and len(losses_of(out, "finetune")) == 6, f"{way} on {ranks}: other samples, or other state"


def test_gradients_travel_once_a_step(monkeypatch):
    """A process that plays the first of two: what was not sent is not in .grad yet."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        ranks = over(Ranks(0, 2, torch.device("cpu"), torch.float32), sharded=True)
        cut = wrap(torch.nn.Linear(4, 4), ranks)
        for travel in (False, False, True):
            with sync_gradients(cut, travel):
                cut(torch.ones(1, 4)).sum().backward()
            assert (cut.weight.grad is not None) == travel, f"asked to travel: {travel}"
    finally:
        dist.destroy_process_group()
    asked, w = [], torch.ones(1, requires_grad=True)
    monkeypatch.setattr(train, "sync_gradients", lambda objective, when: asked.append(when) or nullcontext())
    micro, count = [SimpleNamespace(to=lambda device: None)] * 3, {"ce": torch.tensor(1.0)}
    for hold in (True, False):
        train.backward(lambda batch: [Term("ce", w.sum(), 1.0)], micro, count, ranks, hold)
    assert asked == [False, False, True] + [True] * 3, "only where there is no room do they travel every time"


def test_a_large_checkpoint_is_cut_into_files_that_read_as_one(tmp_path):
    tensors = {f"language_model.{n}": torch.randn(10, 10) for n in "abcde"}
    save_tensors(tmp_path, tensors, limit=900)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert weight_files(tmp_path) == files
    read = {k: t for f in files for k, t in load_file(f).items()}
    assert same(read, {k: tensors[k] for k in read}) and len(read) == 5
