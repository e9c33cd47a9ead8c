"""training/plan.py: what a stage needs, estimated before anything is loaded."""
import json
from dataclasses import replace

import pytest
from programs import call

from bench.memory import SHAPES, on_meta
from common.flags import UserError
from training.plan import CARDS, choose, memory, operations, outline
from training.settings import TrainConfig, settings


def stage(name, shape="7b", ranks=8, **flags):
    typed = TrainConfig(data="-", template="v1", **flags)
    cfg = settings(typed, name, ranks)
    return cfg, typed, outline(cfg, on_meta(shape))


def fitted(name, card, T, shape="7b", ranks=8, **flags):
    cfg, typed, model = stage(name, shape, ranks, **flags)
    return choose(cfg, typed, model, ranks, T, 2, CARDS[card][0])


def test_stage_1_recomputes_nothing_on_40_gib_and_80_gib():
    for card, micro in [("a100-40", 8), ("a100-80", 16)]:
        cfg = fitted("pretrain", card, 608)
        assert (cfg.micro_batch, cfg.gradient_checkpointing) == (micro, 0)


def test_stage_2_recomputes_as_few_layers_as_the_card_asks():
    layers = [fitted("finetune", card, 832).gradient_checkpointing
              for card in ("a100-40", "a100-80", "h200")]
    assert 32 > layers[0] > layers[1] > layers[2] == 0
    tight = fitted("finetune", "a100-80", 832)
    cfg, _, model = stage("finetune")
    fewer = replace(tight, gradient_checkpointing=tight.gradient_checkpointing - 1)
    assert memory(fewer, model, 8, 832, 2, CARDS["a100-80"][0])["peak"] > 0.92 * CARDS["a100-80"][0]


def test_flags_are_kept_and_what_cannot_fit_is_refused():
    assert fitted("finetune", "h200", 832, micro_batch=2, gradient_checkpointing=32).gradient_checkpointing == 32
    assert fitted("finetune", "h200", 832, micro_batch=2).micro_batch == 2
    with pytest.raises(UserError, match="needs 5. GiB on each of 4 GPUs with micro-batch 1 and 40 "
                                        "of 40 layers"):
        fitted("finetune", "a100-40", 2048, "13b", ranks=4)


def test_without_a_gpu_the_recipe_stays():
    cfg, typed, model = stage("finetune")
    chosen = choose(cfg, typed, model, 8, 832, 2, None)
    assert (chosen.micro_batch, chosen.gradient_checkpointing) == (16, 32)


@pytest.mark.parametrize("wanted, name, shape, flags",
                         [  # GiB, of `python -m bench.memory --track`
    (19.14, "finetune", "7b", {"micro_batch": 16, "gradient_checkpointing": 32}),
    (30.94, "finetune", "7b", {"micro_batch": 4, "gradient_checkpointing": 0}),
    (33.04, "pretrain", "7b", {"micro_batch": 8, "gradient_checkpointing": 0}),
    (32.88, "finetune", "13b", {"micro_batch": 16, "gradient_checkpointing": 40, "moca": True})])
def test_the_estimate_is_within_10_percent_of_fsdps_tracker(wanted, name, shape, flags):
    cfg, _, model = stage(name, shape, **flags)
    cfg = replace(cfg, global_batch=8 * cfg.micro_batch)
    text = 256 if name == "finetune" else 32
    gib = memory(cfg, model, 8, SHAPES[shape][0].image_tokens + text, 2, None)
    assert gib["peak"] == pytest.approx(wanted, rel=0.1)


def test_operations_are_those_of_the_matrix_products():
    """2 a weight and position forward, 4 backward where it is trained."""
    cfg, _, model = stage("finetune", gradient_checkpointing=16)
    own, again = operations(cfg, model, 832)
    blocks = 2 * 832 * sum(p.numel() for p in model.language_model.model["layers"].parameters())
    assert own / blocks == pytest.approx(3, rel=0.06) and again / blocks == pytest.approx(0.5, rel=0.06)


def test_plan_prints_two_lines_a_stage_and_starts_nothing(small_world, tmp_path):
    done = call("train.py", "--plan", "--stage", "finetune", "--projector", "random", "--data",
                small_world / "finetune.json", "--images", small_world / "images", "--out",
                tmp_path / "out", "--card", "h100", "--cards", "8")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    samples = len(json.loads((small_world / "finetune.json").read_text()))
    assert len(lines) == 2 and "GiB a rank" in lines[0] and f"{samples} samples" in lines[1] and " h on 8" in lines[1]
    assert not (tmp_path / "out").exists()
