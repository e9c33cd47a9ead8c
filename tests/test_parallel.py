"""FSDP and DDP on gloo ranks: the numbers of one process, and checkpoints that any of them continues."""
import json
import os
import shutil
import time

import pytest
import torch
import torch.distributed as dist
from conftest import STEPS, call, command, launch, losses_of, same
from safetensors.torch import load_file, save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from common.parallel import Ranks, alarm, over, sync_gradients, wrap
from hub.tensors import save_tensors, weight_files, write_tensors


def two_a_node() -> None:
    """What torchrun sets with --nproc_per_node=2."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"


@pytest.mark.parametrize("ranks, micro, flags", [
    (2, 4, ["--loss", "vista", "--moca", "--gradient-checkpointing", "2"]),
    pytest.param(4, 2, ["--loss", "vista", "--moca", "--parallel", "hsdp"], marks=pytest.mark.slow),
    pytest.param(4, 2, ["--loss", "basic", "--moca"], marks=pytest.mark.slow)])
def test_a_sharded_model_trains_as_one_process_does(small_world, tmp_path, ranks, micro, flags):
    assert call(*command(small_world, tmp_path / "one"), *flags[:3]).returncode == 0
    done = launch(*command(small_world, tmp_path / "cut", **{"micro-batch": micro}), *flags,
                  ranks=ranks, set_up=two_a_node)
    assert done.returncode == 0, done.stderr
    assert ("sharded within a node" in done.stdout) == ("hsdp" in flags), done.stdout
    assert "parameters trained, sharded" in done.stdout, "stage 2 on several ranks is not sharded by default"
    wanted, got = losses_of(tmp_path / "one", "finetune"), losses_of(tmp_path / "cut", "finetune")
    assert len(got) == STEPS
    worst = max(abs(a - b) for a, b in zip(wanted, got))
    assert worst < 1e-5, f"the losses differ by {worst}: is the gradient averaged once, clipped by all ranks' norm?"
    norms = []
    for run in ("one", "cut"):
        norms.append([json.loads(line)["grad_norm"]
                      for line in (tmp_path / run / "metrics.jsonl").open()])
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(*norms)), "clipping would differ"


@pytest.mark.slow
def test_a_checkpoint_passes_through_fsdp_and_ddp_and_back_bit_for_bit(small_world, tmp_path):
    assert call(*command(small_world, tmp_path / "start", steps=2), "--moca").returncode == 0
    first = last = tmp_path / "start" / "finetune-2"
    totals = set()
    for kind, ranks in [("fsdp", 2), ("ddp", 2), ("fsdp", 3), ("hsdp", 4), ("one", 1)]:
        out = tmp_path / f"{kind}{ranks}"
        out.mkdir()
        done = launch("-m", "tests.pass_on", last, kind, out, ranks=ranks, set_up=two_a_node)
        assert done.returncode == 0, done.stderr
        numbers = json.loads((out / "numbers.json").read_text())
        share = {"fsdp": 1 / ranks + 0.02, "hsdp": 1 / 2 + 0.02}.get(kind, 1)
        assert numbers["held"] <= share, f"{kind} on {ranks} ranks: a rank holds {numbers['held']:.0%} of the layers"
        totals.add(round(numbers["total"], 2))
        last = out / "finetune-2"
        before, after = ((p / "model.safetensors").read_bytes() for p in (first, last))
        assert before == after, f"the weights changed in {out.name}"
        before, after = ((p / "optimizer.safetensors").read_bytes() for p in (first, last))
        assert before == after, f"the optimizer's state changed in {out.name}"
    assert len(totals) == 1, "a gathered model computes something else than a whole one"


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_ranks_and_with_another_sharding(small_world, tmp_path):
    assert call(*command(small_world, tmp_path / "one", steps=6)).returncode == 0
    out = tmp_path / "run"
    words = command(small_world, out, steps=6, **{"save-every": 2, "keep-last": 3})
    assert launch(*words, ranks=2).returncode == 0
    for ranks, way in [(1, "auto"), (2, "ddp"), (4, "fsdp")]:
        shutil.rmtree(out / "finetune-6")
        done = launch(*words, "--resume", "--parallel", way, ranks=ranks)
        assert done.returncode == 0, done.stderr
        worst = max(abs(a - b) for a, b in zip(losses_of(tmp_path / "one", "finetune"),
                                               losses_of(out, "finetune")))
        assert worst < 1e-5 and len(losses_of(out, "finetune")) == 6, f"{way} on {ranks}: other samples, or other state"


def test_hybrid_sharding_asks_for_several_nodes(small_world, tmp_path):
    done = call(*command(small_world, tmp_path / "run"), "--parallel", "hsdp")
    assert done.returncode == 2 and "not 1 × 1: use --parallel fsdp" in done.stderr, done.stderr


def test_a_gpu_that_waits_for_ever_ends_its_process_with_one_line(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    with alarm(Ranks(1, 2, torch.device("cuda"), torch.bfloat16), minutes=0.5 / 60) as alive:
        for _ in range(4):
            time.sleep(0.2)
            alive()
        assert not codes, "steps of 0.2 s are faster than 0.5 s"
        time.sleep(1)
    assert codes == [2]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "[rank 1] error: no step ended within --timeout minutes" in said, said


def test_gradients_are_reduced_when_asked_and_only_then():
    """A process that plays the first of two: what was not reduced is not in .grad yet."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        ranks = over(Ranks(0, 2, torch.device("cpu"), torch.float32), sharded=True)
        cut = wrap(torch.nn.Linear(4, 4), ranks)
        for now in (False, False, True):
            with sync_gradients(cut, now):
                cut(torch.ones(1, 4)).sum().backward()
            assert (cut.weight.grad is not None) == now, f"sync_gradients(when={now})"
    finally:
        dist.destroy_process_group()


def test_a_large_checkpoint_is_split_into_files_that_read_as_one(tmp_path):
    tensors = {f"language_model.{n}": torch.randn(10, 10) for n in "abcde"}
    save_tensors(tmp_path, tensors, limit=900)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert weight_files(tmp_path) == files
    read = {k: t for f in files for k, t in load_file(f).items()}
    assert same(read, tensors)


def test_a_file_written_tensor_by_tensor_has_the_bytes_of_the_library(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(),
               "é": torch.randn(()).double(), "c": torch.zeros(3, 0), "t": torch.randn(4, 6).T,
               "one": torch.randn(1)}
    write_tensors(tmp_path / "ours", tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs",
              metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    write_tensors(tmp_path / "half", tensors, torch.float16)
    assert same(load_file(tmp_path / "half"), {k: t.half() for k, t in tensors.items()})
