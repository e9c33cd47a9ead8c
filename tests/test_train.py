"""train.py as a user runs it: the same losses however a batch is cut, and after any interruption."""
import json
import signal

import pytest
import torch
from conftest import ROOT, STEPS, call, command, launch, losses_of, same, start, tensors_of
from safetensors.torch import load_file

import train
from common.flags import UserError
from training.settings import TrainConfig, settings


# ----------------------------------------------------------------------------------------- settings
def test_stage_fills_in_llavas_recipe_and_keeps_what_is_given():
    cfg = settings(TrainConfig(data="x.json"), "pretrain", ranks=8)
    assert (cfg.global_batch, cfg.micro_batch, cfg.lr, cfg.epochs, cfg.projector_scale) == (256, 32, 1e-3, 1, 1.0)
    assert cfg.adam_beta2 == torch.optim.AdamW([torch.zeros(1)]).defaults["betas"][1]      # LLaVA's is PyTorch's
    cfg = settings(TrainConfig(data="x.json", lr=5e-6, micro_batch=4), "finetune", ranks=4)
    assert (cfg.global_batch, cfg.micro_batch, cfg.lr, cfg.gradient_checkpointing) == (128, 4, 5e-6, None)


def test_the_micro_batch_is_the_largest_that_divides_a_ranks_share():
    assert [settings(TrainConfig(data="x"), "finetune", ranks=r).micro_batch for r in (1, 2, 8, 32)] == [16, 16, 16, 4]
    assert settings(TrainConfig(data="x", global_batch=36), "finetune", ranks=2).micro_batch == 9


@pytest.mark.parametrize("given, ranks, says", [
    (dict(global_batch=10), 4, "10 is not divisible by the 4 ranks"),
    (dict(global_batch=12, micro_batch=5), 1, "12 is not divisible by .*--micro-batch 5: a rank's "
                                              "share is 12"),
    (dict(lr=0.0), 1, "--lr must be more than 0"),
    (dict(save_every=-1), 1, "--save-every must be more than 0"),
    (dict(loss="vdep", vdep_ratio=1.5), 1, "--vdep-ratio must be from 0 to 1"),
    (dict(adam_beta2=1.0), 1, "--adam-beta2 must be from 0 to 0.9999"),
    (dict(loss="basic", basic_das=-1.0), 1, "--basic-das must be 0 or more"),
    (dict(loss="vista", vdep_alpha=0.1), 1, "--vdep-alpha is a setting of --loss vdep; this is "
                                            "--loss vista")])
def test_impossible_settings_are_refused(given, ranks, says):
    with pytest.raises(UserError, match=says):
        settings(TrainConfig(**given), "pretrain", ranks)


def test_the_learning_rate_warms_up_for_3_percent_and_falls_as_half_a_cosine():
    rates = [train.learning_rate(s, 1000, 2.0) for s in range(1000)]
    assert rates[0] == pytest.approx(2 / 30) and rates[29] == rates[30] == 2.0
    assert rates[515] == pytest.approx(1.0) and rates[-1] < 1e-4
    assert all(a >= b for a, b in zip(rates[30:], rates[31:]))
    assert train.learning_rate(0, 1, 2.0) == 2.0


# ----------------------------------------------------------------------------------------- the loop
def assert_same_losses(wanted, got, steps=STEPS):
    """wanted, got: losses of each step of two runs."""
    assert len(wanted) == len(got) == steps
    worst = max(abs(a - b) for a, b in zip(wanted, got))
    assert worst < 1e-5, f"the losses differ by {worst}: are totals divided by the counts of the whole global batch?"


@pytest.mark.parametrize("stage, ranks, micro, says", [
    ("finetune", 1, 2, "8 accumulation steps × micro-batch 2"),
    ("pretrain", 2, 4, "2 ranks × 2 accumulation steps × micro-batch 4")])
def test_ranks_and_accumulation_change_no_loss(small_world, trained, tmp_path, stage, ranks, micro,
                                               says):
    arguments = command(small_world, tmp_path / "run", stage, **{"micro-batch": micro})
    done = call(*arguments) if ranks == 1 else launch(*arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert f"global batch 16 = {says}" in done.stdout
    assert_same_losses(losses_of(trained[stage], stage), losses_of(tmp_path / "run", stage))


def test_the_loss_falls(trained):
    for stage, out in trained.items():
        losses = losses_of(out, stage)
        assert sum(losses[-4:]) < 0.9 * sum(losses[:4]), f"{stage}: {losses}"


def test_each_step_leaves_its_numbers(trained):
    line = json.loads((trained["finetune"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == STEPS and line["ce"] == line["loss"]
    assert {"lr", "grad_norm", "tokens_per_s", "peak_gib", "supervised"} <= line.keys()


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(small_world, tmp_path):
    done = call(*command(small_world, tmp_path / "run", lr=1e30, **{"save-every": 1}))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert "step 2" in message and "rank 0, samples train_" in message
    assert all(t.isfinite().all() for t in tensors_of(tmp_path / "run" / "finetune-1").values())
    assert len(losses_of(tmp_path / "run", "finetune")) == 1


def test_bfloat16_trains_too_and_keeps_its_weights_in_float32(small_world, tmp_path):
    done = call(*command(small_world, tmp_path / "run", dtype="bfloat16", steps=8,
                         **{"micro-batch": 8}))
    assert done.returncode == 0, done.stderr
    losses = losses_of(tmp_path / "run", "finetune")
    assert losses[-1] < losses[0]
    assert tensors_of(tmp_path / "run" / "finetune-8")["language_model.lm_head.weight"].dtype == torch.float32


# --------------------------------------------------------------------------------------- the stages
def test_stage_1_trains_and_stores_the_projector_alone(trained):
    stored = tensors_of(trained["pretrain"] / f"pretrain-{STEPS}")
    assert sorted(stored) == [f"multi_modal_projector.linear_{i}.{p}" for i in (1, 2)
                              for p in ("bias", "weight")]


def test_stage_2_trains_projector_and_language_model_and_keeps_the_vision_encoder(small_world, trained, tmp_path):
    done = call(*command(small_world, tmp_path / "run", steps=3, projector=trained["pretrain"]))
    assert done.returncode == 0, done.stderr
    tower, llm = (load_file(ROOT / "toy" / f / "model.safetensors") for f in ("clip", "llm"))
    projector = tensors_of(trained["pretrain"] / f"pretrain-{STEPS}")
    for name, tensor in tensors_of(tmp_path / "run" / "finetune-3").items():
        if name.startswith("vision_tower"):
            assert torch.equal(tensor, tower[name.replace("vision_tower", "vision_model")].float())
        else:
            before = projector[name] if "projector" in name else llm[name.removeprefix("language_model.")].float()
            change = (tensor - before).abs().max()
            assert 0 < change < 0.1, f"{name} moved by {change} in three steps from where stage 2 starts"


def test_stage_2_may_start_from_llavas_own_projector_file(small_world, trained, tmp_path):
    stored = tensors_of(trained["pretrain"] / f"pretrain-{STEPS}")
    for ours, llavas in {"linear_1": "model.mm_projector.0",
                         "linear_2": "model.mm_projector.2"}.items():
        for leaf in ("weight", "bias"):
            stored[f"{llavas}.{leaf}"] = stored.pop(f"multi_modal_projector.{ours}.{leaf}")
    torch.save(stored, tmp_path / "mm_projector.bin")
    outs = [tmp_path / "a", tmp_path / "b"]
    for out, projector in zip(outs, (trained["pretrain"], tmp_path)):
        assert call(*command(small_world, out, steps=2, projector=projector)).returncode == 0
    assert losses_of(outs[0], "finetune") == losses_of(outs[1], "finetune")


def test_stage_2_continues_with_the_moca_of_stage_1(small_world, tmp_path):
    assert call(*command(small_world, tmp_path / "one", "pretrain", 3), "--moca").returncode == 0
    done = call(*command(small_world, tmp_path / "two", steps=1, projector=tmp_path / "one",
                         lr=1e-12))
    assert done.returncode == 0, done.stderr
    before, after = tensors_of(tmp_path / "one" / "pretrain-3"), tensors_of(tmp_path / "two" / "finetune-1")
    maps = [name for name in before if ".moca." in name]
    assert len(maps) == 8, "two vectors for each of four layers"
    for name in maps:
        torch.testing.assert_close(after[name], before[name], atol=1e-9, rtol=0)


# ------------------------------------------------------------------------------------ interruptions
def steps_logged(out) -> int:
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_a_run_killed_at_any_moment_resumes_exactly(small_world, trained, tmp_path):
    """kill -9 between two checkpoints, twice, then to the end: every line as if nothing had happened."""
    out = tmp_path / "run"
    words = command(small_world, out, **{"save-every": 3})
    for resume, enough in [([], 4), (["--resume"], 8)]:
        program = start(*words, *resume).until(lambda enough=enough: steps_logged(out) >= enough)
        assert program.send(signal.SIGKILL).wait().returncode == -signal.SIGKILL
    done = call(*words, "--resume")
    assert done.returncode == 0, done.stderr
    runs = []
    for run in (out, trained["finetune"]):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        runs.append([{k: v for k, v in line.items() if k not in ("tokens_per_s", "peak_gib")}
                     for line in lines])
    assert runs[0] == runs[1], "a resumed step differs from the uninterrupted one"
    last = f"finetune-{STEPS}"
    assert same(tensors_of(out / last), tensors_of(trained["finetune"] / last))
    assert [p.name for p in out.glob("finetune-*")] == [last], "older checkpoints of the stage were left"


def test_checkpoints_come_by_the_clock_too_and_older_ones_keep_weights_alone(small_world, tmp_path):
    """Ranks that save after different steps would wait for each other for ever."""
    words = command(small_world, tmp_path / "run", steps=4,
                    **{"save-minutes": 1e-6, "keep-last": 3, "micro-batch": 4})
    done = launch(*words, ranks=2)
    assert done.returncode == 0, done.stderr
    saved = {p.name: (p / "optimizer.safetensors").exists()
             for p in (tmp_path / "run").glob("finetune-*")}
    assert saved == {"finetune-2": False, "finetune-3": True, "finetune-4": True}


def test_a_termination_signal_saves_and_leaves(small_world, trained, tmp_path):
    out = tmp_path / "run"
    program = start(*command(small_world, out)).until(lambda: steps_logged(out) > 0)
    done = program.send(signal.SIGTERM).wait()
    assert done.returncode == 2
    assert "it is saved: --resume continues" in done.stderr.splitlines()[-1]
    done = call(*command(small_world, out), "--resume")
    assert done.returncode == 0, done.stderr
    assert losses_of(out, "finetune") == losses_of(trained["finetune"], "finetune")


@pytest.mark.parametrize("loss, moca, stage", [
    pytest.param("ce", True, "finetune", marks=pytest.mark.slow), ("vdep", True, "pretrain"),
    ("vista", False, "finetune"), ("basic", False, "pretrain")])
def test_every_objective_is_exact_over_ranks_accumulation_and_stops(small_world, tmp_path, monkeypatch, loss, moca,
                                                                    stage):
    def arguments(name, micro):
        flags = ["--moca"] if moca else []
        return [*command(small_world, tmp_path / name, stage, 6, loss=loss, **{"micro-batch": micro}), *flags]

    def stop_in_step_3(loss, norm, step, *_):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)                # noticed before the end of step 4
    runs = [call(*arguments("whole", 16)), call(*arguments("cut", 4)),
            launch(*arguments("ranks", 8), ranks=2)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "stop_if_not_finite", stop_in_step_3)
        assert "after step 4" in call(*arguments("resumed", 16)).stderr
    runs.append(call(*arguments("resumed", 16), "--resume"))
    assert [r.returncode for r in runs] == [0] * 4, "".join(r.stderr for r in runs)

    whole, resumed, cut, ranks = (losses_of(tmp_path / name, stage)
                                  for name in ("whole", "resumed", "cut", "ranks"))
    assert len(whole) == 6 and whole == resumed, "a resumed run differs"
    assert_same_losses(whole, cut, 6)
    assert_same_losses(whole, ranks, 6)
    stored = tensors_of(tmp_path / "whole" / f"{stage}-6")
    assert same(stored, tensors_of(tmp_path / "resumed" / f"{stage}-6"))
    maps = {name: t for name, t in stored.items() if ".moca." in name}
    assert len(maps) == (8 if moca else 0), "two vectors for each of four layers"
    # no loss reads the last layer's image tokens in stage 2
    for name, t in maps.items():
        assert ".3." in name or 0 < (t - t.round()).abs().max() < 0.1, f"{name} was not trained"
