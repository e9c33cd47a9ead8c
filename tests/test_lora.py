"""LoRA, and the parts that --unlock-llm and --unlock-vision train."""
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, command, launch, losses_of, tensors_of
from safetensors.torch import load_file

from common.parallel import Ranks
from hub.checkpoint import load_model
from methods.lora import LoRALinear, lora_start
from training.settings import TrainConfig, settings
from training.setup import build, parameter_groups


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = LoRALinear(12, 20, True, rank=4, alpha=8.0)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    return layer


def test_it_adds_alpha_over_r_times_b_a_x(layer):
    x = torch.randn(3, 12)
    wanted = x @ layer.weight.T + layer.bias + 8 / 4 * (x @ layer.lora_A.T @ layer.lora_B.T)
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_merging_changes_no_output_and_no_bit_while_b_is_0(layer):
    x = torch.randn(64, 12)
    merged = F.linear(x, layer.merged(), layer.bias)
    assert torch.allclose(merged, layer(x), atol=1e-5), "the merged map computes something else"
    exact = layer.weight.double() + 2.0 * layer.lora_B.double() @ layer.lora_A.double()
    assert torch.equal(layer.merged(), exact.float()), "the sum is rounded more than once"
    layer.lora_B.data.zero_()
    assert torch.equal(layer.merged(), layer.weight)


def test_training_starts_at_the_released_model_and_a_differs_by_tensor_and_seed():
    first, other_tensor, other_seed = (
        lora_start(f"{n}.lora_A", torch.Size([8, 100]), seed)
        for n, seed in [("q", 1), ("k", 1), ("q", 2)])
    assert not torch.equal(first, other_tensor) and not torch.equal(first, other_seed)
    assert first.abs().max() <= 0.1 and first.std() == pytest.approx(0.1 / 3 ** 0.5, rel=0.1)
    assert not lora_start("q.lora_B", torch.Size([3, 8]), 1).any()
    assert lora_start("q.weight", torch.Size([3]), 1) is None


@pytest.fixture(scope="module")
def base():
    """The tensors that every run starts from, except the projector."""
    tower, llm = (load_file(ROOT / "toy" / f / "model.safetensors") for f in ("clip", "llm"))
    return ({n.replace("vision_model", "vision_tower"): t
             for n, t in tower.items() if n.startswith("vision_model")}
            | {f"language_model.{n}": t for n, t in llm.items()})


@pytest.mark.parametrize("stage, flags, wanted", [
    ("finetune", "--unlock-llm none", r"multi_modal_projector.*"),
    ("finetune", "--unlock-llm half", r"multi_modal_projector.*|language_model\.model\.layers\.[01]\..*"),
    ("pretrain", "--unlock-llm all --unlock-vision half --vision-lr 1e-5",
     r"multi_modal_projector.*|language_model.*|vision_tower\.encoder\.layers\.1\..*"),
    ("finetune", "--unlock-vision all",
     r"multi_modal_projector.*|language_model.*|vision_tower\.(embed|pre_|encoder\.layers\.[01]\.).*"),
    ("finetune", "--unlock-llm lora --lora-rank 4 --lora-alpha 8", r"multi_modal_projector.*|.*lora_[AB]")])
def test_what_is_unlocked_is_trained_and_nothing_else(small_world, base, tmp_path, stage, flags,
                                                      wanted):
    done = call(*command(small_world, tmp_path / "run", stage, steps=3), *flags.split())
    assert done.returncode == 0, done.stderr
    after = tensors_of(tmp_path / "run" / f"{stage}-3")
    moved = {n for n in after if n not in base
             or not torch.equal(base[n].float(), after[n].float())}
    assert moved == {n for n in after if re.fullmatch(wanted, n)}
    # the whole model is stored, in stage 1 too
    model = load_model(tmp_path / "run")
    assert torch.equal(model.language_model.lm_head.weight, after["language_model.lm_head.weight"])


@pytest.mark.slow
def test_lora_resumes_on_two_ranks_and_is_merged_by_export(small_world, tmp_path):
    flags = ["--unlock-llm", "lora", "--lora-rank", "4", "--lora-alpha", "8", "--projector-lr",
             "1e-4"]
    one, cut, out = tmp_path / "one", tmp_path / "cut", tmp_path / "exported"
    assert call(*command(small_world, one, steps=6), *flags).returncode == 0
    assert call(*command(small_world, cut, steps=6, **{"save-every": 2, "keep-last": 9}), *flags).returncode == 0
    assert [(p.name, (p / "optimizer.safetensors").exists()) for p in sorted(cut.glob("finetune-*"))] == [
        ("finetune-2", False), ("finetune-4", True), ("finetune-6", True)], "two checkpoints keep what resuming needs"
    shutil.rmtree(cut / "finetune-6")
    done = launch(*command(small_world, cut, steps=6, **{"micro-batch": 4}), *flags, "--resume",
                  ranks=2)
    assert done.returncode == 0, done.stderr
    assert max(abs(a - b) for a, b in zip(losses_of(one, "finetune"), losses_of(cut, "finetune"))) < 1e-5
    done = call("hub", "export", one, out)
    assert done.returncode == 0, done.stderr
    ours, theirs = load_model(one), load_model(out)
    assert theirs.language_model.config.lora_rank == 0 and not any("lora" in n for n, _ in theirs.named_parameters())
    x = torch.randn(2, 7, 96)
    a, b = ours.language_model(x), theirs.language_model(x)
    assert torch.allclose(a, b, atol=1e-4), f"export changed the states by {(a - b).abs().max()}"


def test_the_parts_have_their_own_learning_rates(small_world, tmp_path):
    cfg = settings(TrainConfig(data="x", unlock_llm="lora", unlock_vision="half", vision_lr=1e-6),
                   "finetune", 1)
    assert (cfg.lr, cfg.projector_lr) == (2e-4, 2e-5), "LLaVA's rates for LoRA"
    cfg = replace(cfg, lora_rank=2, projector="random")
    model = build(cfg, None, Ranks(0, 1, torch.device("cpu"), torch.float32))
    rates = {g["peak"]: len(g["params"]) for g in parameter_groups(model, cfg)}
    assert rates == {1e-6: 16, 2e-5: 4, 2e-4: 4 * 7 * 2}, "16 tensors in a layer of CLIP, 7 maps in one of LLaMA"


def test_stage_2_continues_with_everything_that_stage_1_trained(small_world, tmp_path):
    assert call(*command(small_world, tmp_path / "1", "pretrain", steps=2), "--unlock-vision", "half").returncode == 0
    done = call(*command(small_world, tmp_path / "2", steps=2, projector=tmp_path / "1"))
    path = tmp_path / "1" / "pretrain-2"
    assert done.returncode == 2 and f"--vision {path} --llm {path}" in done.stderr
    done = call(*command(small_world, tmp_path / "2", steps=2, projector=tmp_path / "1",
                         vision=path, llm=path))
    assert done.returncode == 0, done.stderr
    a, b = tensors_of(path), tensors_of(tmp_path / "2" / "finetune-2")
    assert all(torch.equal(a[n], b[n]) for n in a if n.startswith("vision_tower"))

    # A projector that reads another layer: a trained layer behind it would get no gradient.
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vision_layer": -3}))
    done = call(*command(small_world, tmp_path / "3", steps=2, projector=tmp_path / "1", vision=path, llm=path),
                "--unlock-vision", "all")
    assert done.returncode == 2 and "reads layer -3" in done.stderr, done.stderr
