"""train.py as a user runs it: the same losses however a batch is cut, and after any interruption."""
import json
import os
import signal
import subprocess
import sys
import time
from signal import SIGTERM

import pytest
import torch
from conftest import ROOT, call, launch, losses_of
from safetensors.torch import load_file

import train
from config import UserError
from train import Config, learning_rate, settings


# ------------------------------------------------------------------------------------------------ settings
def test_stage_fills_in_llavas_recipe_and_what_is_given_stays():
    cfg = settings(Config(data="x.json"), "pretrain", ranks=8)
    assert (cfg.global_batch, cfg.micro_batch, cfg.lr, cfg.epochs, cfg.projector_scale) == (256, 32, 1e-3, 1, 1.0)
    assert cfg.adam_beta2 == torch.optim.AdamW([torch.zeros(1)]).defaults["betas"][1]      # LLaVA's is PyTorch's
    cfg = settings(Config(data="x.json", lr=5e-6, micro_batch=4), "finetune", ranks=4)
    assert (cfg.global_batch, cfg.micro_batch, cfg.lr, cfg.gradient_checkpointing) == (128, 4, 5e-6, True)


def test_the_micro_batch_is_the_largest_that_divides_a_ranks_share():
    assert [settings(Config(data="x"), "finetune", ranks=r).micro_batch for r in (1, 2, 8, 32)] == [16, 16, 16, 4]
    assert settings(Config(data="x", global_batch=36), "finetune", ranks=2).micro_batch == 9


@pytest.mark.parametrize("given, ranks, says", [
    (dict(global_batch=10), 4, "10 is not divisible by the 4 ranks"),
    (dict(global_batch=12, micro_batch=5), 1, "not divisible by 1 ranks × --micro-batch 5"),
    (dict(lr=0.0), 1, "--lr must be more than 0"), (dict(save_every=-1), 1, "--save-every must be more than 0"),
    (dict(loss="vdep", vdep_ratio=1.5), 1, "--vdep-ratio must be from 0 to 1"),
    (dict(adam_beta2=1.0), 1, "--adam-beta2 must be from 0 to 0.9999"),
    (dict(loss="basic", basic_das=-1.0), 1, "--basic-das must be from 0"),
    (dict(loss="vista", vdep_alpha=0.1), 1, "--vdep-alpha is a setting of --loss vdep; this is --loss vista")])
def test_impossible_settings_are_refused(given, ranks, says):
    with pytest.raises(UserError, match=says):
        settings(Config(**given), "pretrain", ranks)


def test_the_learning_rate_warms_up_for_3_percent_and_falls_as_half_a_cosine():
    rates = [learning_rate(s, 1000, 2.0) for s in range(1000)]
    assert rates[0] == pytest.approx(2 / 30) and rates[29] == rates[30] == 2.0
    assert rates[515] == pytest.approx(1.0) and rates[-1] < 1e-4
    assert all(a >= b for a, b in zip(rates[30:], rates[31:]))
    assert learning_rate(0, 1, 2.0) == 2.0


# ------------------------------------------------------------------------------------------------ runs
def command(small_world, out, stage="finetune", steps=20, **options):
    options = {"stage": stage, "data": small_world / f"{stage}.json", "images": small_world / "images", "out": out,
               "global-batch": 16, "lr": 5e-4, "projector-scale": 8, "max-steps": steps, "workers": 0,
               "dtype": "float32", **options}
    return ["train.py", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


@pytest.fixture(scope="module")
def reference(small_world, tmp_path_factory):
    """One process, one micro-batch a step."""
    outs = {}
    for stage in ("pretrain", "finetune"):
        outs[stage] = tmp_path_factory.mktemp("reference") / stage
        done = call(*command(small_world, outs[stage], stage))
        assert done.returncode == 0, done.stderr
    return outs


@pytest.mark.parametrize("stage, ranks, micro", [("finetune", 1, 2), ("pretrain", 2, 4), ("finetune", 2, 8)])
def test_ranks_and_accumulation_change_no_loss(small_world, reference, tmp_path, stage, ranks, micro):
    arguments = command(small_world, tmp_path / "run", stage, **{"micro-batch": micro})
    done = call(*arguments) if ranks == 1 else launch(*arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert f"{ranks} ranks × {16 // ranks // micro} accumulation × {micro} micro-batch" in done.stdout
    wanted, got = losses_of(reference[stage], stage), losses_of(tmp_path / "run", stage)
    assert len(wanted) == len(got) == 20
    worst = max(abs(a - b) for a, b in zip(wanted, got))
    assert worst < 1e-5, f"the losses differ by {worst}: are sums divided by the counts of the whole global batch?"


def test_the_loss_falls(reference):
    for stage, out in reference.items():
        losses = losses_of(out, stage)
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), f"{stage}: {losses}"


def test_each_step_leaves_its_numbers(reference):
    line = json.loads((reference["finetune"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 20 and line["ce"] == line["loss"]
    assert {"lr", "grad_norm", "tokens_per_s", "peak_gib", "supervised"} <= line.keys()


def test_stage_1_trains_and_stores_the_projector_alone(reference):
    stored = load_file(reference["pretrain"] / "pretrain-20" / "model.safetensors")
    assert sorted(stored) == [f"multi_modal_projector.linear_{i}.{p}" for i in (1, 2) for p in ("bias", "weight")]


def test_stage_2_trains_projector_and_language_model_and_keeps_the_vision_encoder(small_world, reference, tmp_path):
    done = call(*command(small_world, tmp_path / "run", steps=3, projector=reference["pretrain"]))
    assert done.returncode == 0, done.stderr
    after = load_file(tmp_path / "run" / "finetune-3" / "model.safetensors")
    tower, llm = (load_file(ROOT / "toy" / f / "model.safetensors") for f in ("clip", "llm"))
    projector = load_file(reference["pretrain"] / "pretrain-20" / "model.safetensors")
    for name, tensor in after.items():
        if name.startswith("vision_tower"):
            assert torch.equal(tensor, tower[name.replace("vision_tower", "vision_model")].float())
        else:
            before = projector[name] if "projector" in name else llm[name.removeprefix("language_model.")].float()
            change = (tensor - before).abs().max()
            assert 0 < change < 0.1, f"{name} moved by {change} in three steps from where stage 2 starts"


def test_stage_2_may_begin_with_llavas_own_projector_file(small_world, reference, tmp_path):
    stored = load_file(reference["pretrain"] / "pretrain-20" / "model.safetensors")
    names = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
    for n, old in names.items():
        for leaf in ("weight", "bias"):
            stored[f"{old}.{leaf}"] = stored.pop(f"multi_modal_projector.{n}.{leaf}")
    torch.save(stored, tmp_path / "mm_projector.bin")
    outs = [tmp_path / "a", tmp_path / "b"]
    for out, projector in zip(outs, (reference["pretrain"], tmp_path)):
        assert call(*command(small_world, out, steps=2, projector=projector)).returncode == 0
    assert losses_of(outs[0], "finetune") == losses_of(outs[1], "finetune")


def test_killed_at_any_moment_a_run_resumes_exactly(small_world, reference, tmp_path):
    """kill -9 between two checkpoints, twice, then to the end: every line as if nothing had happened."""
    out = tmp_path / "run"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for resume, enough in [([], 5), (["--resume"], 11)]:
        process = subprocess.Popen([sys.executable, *command(small_world, out, **{"save-every": 3}), *resume], cwd=ROOT,
                                   env=env, stderr=subprocess.PIPE)
        until = time.time() + 60
        while time.time() < until and process.poll() is None:
            log = out / "metrics.jsonl"
            if log.exists() and log.read_text().count("\n") >= enough:
                break
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    done = call(*command(small_world, out, **{"save-every": 3}), "--resume")
    assert done.returncode == 0, done.stderr
    drop = ("tokens_per_s", "peak_gib")
    lines = [[{k: v for k, v in json.loads(line).items() if k not in drop} for line in (run / "metrics.jsonl").open()]
             for run in (out, reference["finetune"])]
    assert lines[0] == lines[1], "a resumed step differs from the uninterrupted one"
    a, b = (load_file(run / "finetune-20" / "model.safetensors") for run in (out, reference["finetune"]))
    assert all(torch.equal(a[k], b[k]) for k in b)
    assert [p.name for p in out.glob("finetune-*")] == ["finetune-20"], "older checkpoints of the stage were left"


@pytest.mark.parametrize("loss, moca, stage", [
    ("ce", True, "finetune"), ("vdep", True, "pretrain"), ("vista", False, "finetune"), ("basic", False, "pretrain")])
def test_every_objective_is_exact_over_ranks_accumulation_and_stops(small_world, tmp_path, monkeypatch, loss, moca,
                                                                    stage):
    def arguments(name, micro):
        options = {"loss": loss, "micro-batch": micro}
        return [*command(small_world, tmp_path / name, stage, 6, **options), *["--moca"] * moca]
    runs = [call(*arguments("whole", 16)), call(*arguments("cut", 4)), launch(*arguments("ranks", 8), ranks=2)]
    with monkeypatch.context() as patch:                   # a signal in the middle of step 3, heard in step 4
        patch.setattr(train, "check_finite", lambda loss, norm, step, *_: step == 3 and signal.raise_signal(SIGTERM))
        assert "after step 4" in call(*arguments("resumed", 16)).stderr
    signal.signal(SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runs.append(call(*arguments("resumed", 16), "--resume"))
    assert [r.returncode for r in runs] == [0] * 4, "".join(r.stderr for r in runs)
    whole, *others = (losses_of(tmp_path / name, stage) for name in ("whole", "resumed", "cut", "ranks"))
    assert len(whole) == 6 and whole == others[0], "a resumed run differs"
    for got in others[1:]:
        worst = max(abs(a - b) for a, b in zip(whole, got))
        assert worst < 1e-5, f"the losses differ by {worst}: are sums divided by the counts of the whole global batch?"
    stored = [load_file(tmp_path / name / f"{stage}-6" / "model.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(stored[1][name], t) for name, t in stored[0].items())
    maps = {name: t for name, t in stored[0].items() if ".moca." in name}
    assert len(maps) == 8 * moca, "two vectors for each of four layers"
    for name, t in maps.items():                           # nothing reads the last layer's image tokens in stage 2
        assert ".3." in name or 0 < (t - t.round()).abs().max() < 0.1, f"{name} was not trained"


def test_stage_2_goes_on_with_the_moca_of_stage_1(small_world, tmp_path):
    assert call(*command(small_world, tmp_path / "one", "pretrain", 3), "--moca").returncode == 0
    done = call(*command(small_world, tmp_path / "two", steps=1, projector=tmp_path / "one", lr=1e-12))
    assert done.returncode == 0, done.stderr
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("one/pretrain-3", "two/finetune-1"))
    maps = [n for n in before if ".moca." in n]
    assert len(maps) == 8
    for name in maps:
        torch.testing.assert_close(after[name], before[name], atol=1e-9, rtol=0)


def test_a_termination_signal_saves_and_leaves(small_world, reference, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, *command(small_world, out)], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 2
    assert "it is saved: --resume goes on" in process.stderr.read().splitlines()[-1]
    done = call(*command(small_world, out), "--resume")
    assert done.returncode == 0, done.stderr
    assert losses_of(out, "finetune") == losses_of(reference["finetune"], "finetune")


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(small_world, tmp_path):
    done = call(*command(small_world, tmp_path / "run", lr=1e30, **{"save-every": 1}))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert "step 2" in message and "rank 0, samples train_" in message
    stored = load_file(tmp_path / "run" / "finetune-1" / "model.safetensors")
    assert all(t.isfinite().all() for t in stored.values())
    assert len(losses_of(tmp_path / "run", "finetune")) == 1


def test_bfloat16_trains_too(small_world, tmp_path):
    done = call(*command(small_world, tmp_path / "run", dtype="bfloat16", steps=10, **{"micro-batch": 8}))
    assert done.returncode == 0, done.stderr
    losses = losses_of(tmp_path / "run", "finetune")
    assert losses[-1] < losses[0]
    stored = load_file(tmp_path / "run" / "finetune-10" / "model.safetensors")
    assert stored["language_model.lm_head.weight"].dtype == torch.float32, "what is trained is kept in float32"
