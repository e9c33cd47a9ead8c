"""Connectors: names, the Q-Former's arithmetic and files, and every objective on a number of image tokens that is the
connector's and not the tower's.
"""
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import call, losses_of
from safetensors.torch import load_file, save_file
from test_model import tiny

from common.flags import UserError
from data import Batch
from evaluation.generate import generate
from hub.checkpoint import load_model
from hub.connectors import Connector, configured, image_tokens, make_connector, name_of, read_connector
from hub.released import load_projector, rename, start_qformer
from losses import LOSSES, Objective, count_terms
from methods.basic import direction_loss, layer_weights, semantic_loss, supervision_degree
from methods.qformer import QFormer
from methods.vdep import reconstruction_loss
from mir import measure, modality_integration_rate
from model import Llava, VisionConfig
from training.settings import TrainConfig, check_start

NAMES = ["linear", "mlp2x", "mlp4x", "qformer-3-24x2"]


def randomized(module, std=0.25):
    g = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        p.data = mean + std * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return module


def llava(name, **decoder) -> Llava:
    model = tiny(**decoder)
    connector = randomized(make_connector(name, 16, 24).double())
    return Llava(model.vision_tower, connector, model.language_model)


def batch_for(model) -> Batch:
    """Three samples with an image, one of text, and one in
    VDEP mode, for the model's number of image tokens."""
    g, n = torch.Generator().manual_seed(1), model.image_tokens
    ids = torch.randint(3, 50, (5, 14), generator=g)
    image = torch.zeros(5, 14, dtype=torch.bool)
    image[:, 2:2 + n] = True
    image[3] = False
    there = torch.arange(14) < torch.tensor([[14], [12], [11], [9], [2 + n]])
    labels = ids.masked_fill(~(there & (torch.arange(14) > 8)), -100)
    pixels = torch.randn(5, 3, 16, 16, generator=g, dtype=torch.float64)
    return Batch(ids, labels, image, there, pixels, image.any(1),
                 torch.tensor([False] * 4 + [True]))


# -------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("name, wanted, tokens", [
    ("linear", Connector(1), 9), ("mlp2x", Connector(2), 9), ("mlp2x_gelu", Connector(2), 9),
    ("mlp4x", Connector(4), 9), ("qformer", Connector(0, 32, 768, 12), 32), ("qformer-64", Connector(0, 64), 64),
    ("qformer-4-96x2", Connector(0, 4, 96, 2), 4)])
def test_a_name_says_all_of_a_connector(name, wanted, tokens):
    assert read_connector(name) == wanted and image_tokens(name, VisionConfig(image_size=48, patch_size=16)) == tokens
    with torch.device("meta"):
        made = make_connector(name, 8, 16)
    assert read_connector(name_of(made)) == wanted


@pytest.mark.parametrize("name", ["mlp999x", "qformer-99999", "qformer-4-64x2000", "mlp0x",
                                  "mlp" + "9" * 5000 + "x", ""])
def test_a_connector_that_no_model_has_is_refused_before_it_is_built(name):
    with pytest.raises(UserError, match="is larger than any model's|is not known"):
        read_connector(name)


@pytest.mark.parametrize("name", ["mlp", "mlp0x", "resampler", "qformer-0", "qformer-4-96"])
def test_other_names_are_refused_before_anything_is_read(name):
    with pytest.raises(UserError, match=name):
        check_start(TrainConfig(connector=name))


def test_a_config_of_each_layout_names_its_connector():
    assert configured({}) == "mlp2x" and configured({"mm_projector_type": "linear"}) == "linear"
    assert configured({"connector_type": "mlp2x_gelu"}) == "mlp2x_gelu"
    assert configured({"connector_type": "qformer", "num_queries": 64}) == "qformer-64"
    assert configured({"connector": "qformer-4-96x2"}) == "qformer-4-96x2"


def test_n_linear_maps_have_gelu_between_them_alone():
    p, x = randomized(make_connector("mlp3x", 5, 6).double()), torch.randn(2, 4, 5, dtype=torch.float64)
    wanted = p.linear_3(F.gelu(p.linear_2(F.gelu(p.linear_1(x)))))
    torch.testing.assert_close(p(x), wanted, atol=0, rtol=0)
    p = randomized(make_connector("linear", 5, 6).double())
    torch.testing.assert_close(p(x), x @ p.linear_1.weight.T + p.linear_1.bias, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------------- the Q-Former
def reference(p: dict, patches, layers: int, heads: int):
    """Equations (1) to (5), one query and one head at a time."""
    def norm(x, name):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-12).sqrt()
        return x * p[name + ".weight"] + p[name + ".bias"]

    def attend(z, x, name):
        q, k, v = (t @ p[f"{name}.self.{what}.weight"].T + p[f"{name}.self.{what}.bias"]
                   for t, what in [(z, "query"), (x, "key"), (x, "value")])
        rows, d = [], q.shape[1] // heads
        for i in range(len(z)):
            parts = []
            for h in range(heads):
                at = slice(h * d, (h + 1) * d)
                weights = torch.stack([(q[i, at] * k[j, at]).sum() / math.sqrt(d)
                                       for j in range(len(x))]).exp()
                parts.append(sum(w * v[j, at] for j, w in enumerate(weights / weights.sum())))
            y = p[f"{name}.output.dense.weight"] @ torch.cat(parts) + p[f"{name}.output.dense.bias"]
            rows.append(norm(z[i] + y, f"{name}.output.LayerNorm"))
        return torch.stack(rows)

    out = []
    for x in patches:
        z = torch.stack([norm(q, "bert.embeddings.LayerNorm") for q in p["query_tokens"][0]])
        for n in range(layers):
            layer = f"bert.encoder.layer.{n}"
            z = attend(z, z, f"{layer}.attention")
            if n % 2 == 0:
                z = attend(z, x, f"{layer}.crossattention")
            inner = z @ p[f"{layer}.intermediate_query.dense.weight"].T + p[f"{layer}.intermediate_query.dense.bias"]
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            y = inner @ p[f"{layer}.output_query.dense.weight"].T + p[f"{layer}.output_query.dense.bias"]
            z = torch.stack([norm(row, f"{layer}.output_query.LayerNorm") for row in z + y])
        out.append(z @ p["projector.weight"].T + p["projector.bias"])
    return torch.stack(out)


def test_the_q_former_is_its_equations():
    q = randomized(QFormer(6, 5, queries=3, width=128, layers=3).double(), 0.1)         # two heads
    x = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(q(x), reference(dict(q.named_parameters()), x, 3, 2), atol=1e-11,
                                   rtol=0)
    assert q(x).shape == (2, 3, 5)


def test_the_q_former_has_the_size_of_bert_base():
    with torch.device("meta"):
        q = QFormer(1408, 768)
    # 12 layers of BERT-base, 6 cross-attentions to 1408 dimensions, 32 queries, a norm, the last map
    layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 768 + 3072 + 4 * 768
    cross = 2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + 2 * 768
    wanted = 12 * layer + 6 * cross + 32 * 768 + 2 * 768 + 768 * 768 + 768
    assert sum(p.numel() for p in q.parameters()) == wanted


def test_image_tokens_of_a_q_former_do_not_depend_on_the_order_of_patches():
    q = randomized(QFormer(6, 5, 3, 24, 2).double())
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(q(x), q(x[:, torch.randperm(7)]), atol=1e-12, rtol=0)


# -------------------------------------------------------------------------------------------- files
def blip2(name: str) -> str:
    """The name that transformers gives a tensor of the Q-Former."""
    if name.startswith("projector."):
        return name.replace("projector.", "language_projection.")
    name = name.replace("bert.embeddings.LayerNorm", "qformer.layernorm").replace("bert.", "qformer.")
    return name.replace("attention.self.", "attention.attention.")


FORMS = {"MIR": lambda n: "model.mm_projector." + n.replace("projector.", "mm_mlp."),
         "BLIP-2": blip2, "TinyLLaVA": lambda n: "connector._connector." + n,
         "TinyLLaVA, a part": lambda n: "_connector." + n,
         "ours": lambda n: "multi_modal_projector." + n}


@pytest.mark.parametrize("form", FORMS)
def test_a_q_former_loads_under_every_name_it_is_released_with(form, tmp_path):
    q = randomized(QFormer(16, 24, 3, 24, 2))
    tensors = dict(q.named_parameters())
    if form.startswith("TinyLLaVA"):                        # its norm on the queries has no weights
        tensors = {n: p for n, p in tensors.items() if "embeddings" not in n}
        tensors["bert.embeddings.position_ids"] = torch.arange(3)[None]
        torch.nn.init.ones_(q.bert["embeddings"]["LayerNorm"].weight)
        torch.nn.init.zeros_(q.bert["embeddings"]["LayerNorm"].bias)
    save_file({FORMS[form](n): t.data.clone() for n, t in tensors.items()},
              tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"connector": "qformer-3-24x2"}))
    loaded = dict(load_projector(tmp_path, 16, 24).named_parameters())
    assert loaded.keys() == dict(q.named_parameters()).keys()
    assert all(torch.equal(p, loaded[n]) for n, p in q.named_parameters())


@pytest.mark.parametrize("name", ["linear", "mlp4x_gelu"])
def test_linear_maps_load_under_llavas_names(name, tmp_path):
    p = randomized(make_connector(name, 16, 24))
    tensors = {}
    for n, t in p.named_parameters():
        number = 2 * (int(n[7]) - 1)
        tensors["model.mm_projector." + (n[9:] if name == "linear" else f"{number}{n[8:]}")] = t.data.clone()
    torch.save(tensors, tmp_path / "mm_projector.bin")
    (tmp_path / "config.json").write_text(json.dumps({"mm_projector_type": name}))
    loaded = dict(load_projector(tmp_path, 16, 24).named_parameters())
    assert list(loaded) == list(dict(p.named_parameters()))
    assert all(torch.equal(t, loaded[n]) for n, t in p.named_parameters())


def test_a_new_q_former_starts_from_one_of_other_neighbours(tmp_path):
    # of another tower and another language model
    old = randomized(QFormer(11, 20, 3, 24, 2))
    tensors = {blip2(n): t.data.clone() for n, t in old.named_parameters()}
    tensors["qformer.encoder.layer.0.intermediate.dense.weight"] = torch.zeros(96, 24)          # reads text
    tensors["qformer.embeddings.word_embeddings.weight"] = torch.zeros(9, 24)
    save_file(tensors, tmp_path / "model.safetensors")
    new = QFormer(16, 24, 3, 24, 2)
    fresh = {n: p.clone() for n, p in new.named_parameters()}
    left = start_qformer(new, tmp_path)
    assert sorted(left) == sorted(["bert.encoder.layer.0.crossattention.self.key.weight",
                                   "projector.weight",
                                   "bert.encoder.layer.0.crossattention.self.value.weight",
                                   "projector.bias"])
    for name, p in new.named_parameters():
        assert torch.equal(p, fresh[name] if name in left else dict(old.named_parameters())[name]), name
    with pytest.raises(UserError, match="query_tokens has shape"):
        start_qformer(QFormer(16, 24, 5, 24, 2), tmp_path)
    with pytest.raises(UserError, match="tensors of the projector are missing"):
        start_qformer(QFormer(16, 24, 3, 24, 4), tmp_path)


def test_mirs_q_former_which_reads_the_text_is_not_taken_for_one_that_does_not(tmp_path):
    q = QFormer(16, 24, 3, 24, 2)
    tensors = {FORMS["MIR"](n): t.data.clone() for n, t in q.named_parameters()}
    tensors["model.mm_projector.bert.embeddings.word_embeddings.weight"] = torch.zeros(9, 24)
    torch.save(tensors, tmp_path / "mm_projector.bin")
    (tmp_path / "config.json").write_text(json.dumps({"mm_projector_type": "qformer"}))
    with pytest.raises(UserError, match="reads the text too"):
        load_projector(tmp_path, 16, 24)


@torch.no_grad()
def test_transformers_computes_the_same_q_former():
    hf = pytest.importorskip("transformers")
    config = hf.Blip2QFormerConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=2,
                                   intermediate_size=512, encoder_hidden_size=6,
                                   cross_attention_frequency=2)
    theirs, ours = randomized(hf.Blip2QFormerModel(config), 0.1).eval(), QFormer(6, 5, 3, 128, 3)
    state = {rename("qformer." + n).removeprefix("multi_modal_projector."): p
             for n, p in theirs.named_parameters()}
    state |= {n: p for n, p in ours.named_parameters() if n == "query_tokens"
              or n.startswith("projector.")}
    ours.load_state_dict(state)
    x = torch.randn(2, 4, 6)
    wanted = theirs(ours.query_tokens.expand(2, -1, -1), encoder_hidden_states=x).last_hidden_state
    assert (ours.projector(wanted) - ours(x)).abs().max() < 1e-5


# --------------------------------------------------------------------------------------- objectives
@pytest.mark.parametrize("moca", [False, True])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NAMES)
def test_every_objective_trains_every_connector(name, loss, stage, moca):
    model = llava(name, moca=moca)
    batch = batch_for(model)
    model.requires_grad_(False)
    model.multi_modal_projector.requires_grad_(True)
    objective = Objective(model,
                          TrainConfig(loss=loss, stage=stage,
                                      basic_k=2 if loss == "basic" else None))
    terms, counts = objective(batch), count_terms(loss, batch)
    assert {t.name for t in terms} <= set(counts)
    total = sum(t.weight * t.total / counts[t.name] for t in terms)
    total.backward()
    for n, p in model.multi_modal_projector.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), n
        # a constant in all scores: softmax does not see it
        assert (p.grad != 0).any() or n.endswith("key.bias"), n


def images_of(h, batch, rows):
    """(B,T,D) → (len(rows),N,D) at the image positions of these samples, one after the other."""
    return torch.stack([torch.stack([h[b, t] for t in batch.image_mask[b].nonzero()[:, 0]])
                        for b in rows])


def test_vdep_predicts_queries_and_basic_refines_them():
    model = llava("qformer-3-24x2")
    batch = batch_for(model)
    with torch.no_grad():
        layers, maps = [], []
        out = model(batch, lambda i, h, a: (layers.append(h), maps.append(a)), batch.places.text, 2)
        assert out.image_embeds.shape == (5, 3, 24) and model.vision_tower.config.image_tokens == 4
        terms = {t.name: t.total for t in Objective(model, TrainConfig(loss="vdep", stage="pretrain"))(batch)}
        # the sample in VDEP mode
        h = images_of(out.hidden_states, batch, [4])
        torch.testing.assert_close(terms["vdep"], reconstruction_loss(h, out.image_embeds[4:])[0])
        terms = {t.name: t.total for t in Objective(model, TrainConfig(loss="basic", basic_k=2))(batch)}
        w = layer_weights(2)
        # text follows their images
        seen = [0, 1, 2]
        v_hat = sum(w[i] * images_of(layers[i], batch, seen) for i in range(2))
        assert maps[0].shape[2] == 3
        rows = (batch.text_after_image().sum(1)[:, None] > torch.arange(maps[0].shape[1]))[seen]
        degree = supervision_degree((maps[0] + maps[1])[seen], rows)
        v = out.image_embeds[seen]
        torch.testing.assert_close(terms["das"], direction_loss(v, v_hat, degree)[0])
        E = model.language_model.model["embed_tokens"].weight
        torch.testing.assert_close(terms["sds"], semantic_loss(v, v_hat, degree, E)[0])


@torch.no_grad()
def test_mir_measures_the_queries():
    model = llava("qformer-3-24x2")
    batch = batch_for(model)
    batch = Batch(**{k: v[:3] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)})
    layers = []
    out = model(batch, lambda i, h, a: layers.append(h))
    layers[-1] = out.hidden_states
    pairs = [(h[batch.image_mask], h[batch.text_after_image()]) for h in layers]
    assert len(pairs[0][0]) == 3 * 3
    assert measure(model, [batch])["mir"] == pytest.approx(modality_integration_rate(pairs)[0],
                                                           rel=1e-9)


def test_answers_of_many_prompts_are_those_of_each_alone():
    model = llava("qformer-3-24x2", moca=True)
    batch = batch_for(model)
    ids = [batch.input_ids[b, batch.attention_mask[b]] for b in range(3)]
    masks = [batch.image_mask[b, batch.attention_mask[b]] for b in range(3)]
    alone = [model.generate(i, batch.pixel_values[b:b + 1], m, 5)
             for b, (i, m) in enumerate(zip(ids, masks))]
    assert generate(model, ids, batch.pixel_values[:3], 5, masks, None) == alone


# ----------------------------------------------------------------------------------------- commands
@pytest.fixture(scope="module")
def runs(small_world, tmp_path_factory):
    """Both stages with a Q-Former and MoCa, from a Q-Former on the disk."""
    out = tmp_path_factory.mktemp("qformer")
    q = randomized(QFormer(96, 96, 4, 96, 2), 0.05)
    old = {"multi_modal_projector." + n: p.data for n, p in q.named_parameters()}
    (out / "old").mkdir()
    save_file(old, out / "old" / "model.safetensors")
    common = ["--images", small_world / "images", "--global-batch", 8, "--max-steps", 3,
              "--workers", 0, "--moca"]
    first = call("train.py", "--stage", "pretrain", "--data", small_world / "pretrain.json",
                 "--out", out / "1", "--loss", "vdep", "--connector", "qformer-4-96x2",
                 "--projector", out / "old", *common, "--save-every", 2, "--keep-last", 2)
    assert first.returncode == 0, first.stderr
    assert "but for 0 tensors" in first.stdout
    second = call("train.py", "--stage", "finetune", "--data", small_world / "finetune.json",
                  "--out", out / "2", "--loss", "basic", "--projector", out / "1", *common,
                  "--mir-every", 3, "--mir-data", small_world / "val.jsonl")
    assert second.returncode == 0, second.stderr
    return out


def test_both_stages_train_a_q_former_and_store_what_it_is(runs):
    for stage, folder in [("pretrain", runs / "1"), ("finetune", runs / "2")]:
        assert len(losses_of(folder, stage)) == 3
        config = json.loads((folder / f"{stage}-3" / "config.json").read_text())
        assert config["connector"] == "qformer-4-96x2"
    model = load_model(runs / "2")
    assert model.image_tokens == 4 and model.language_model.config.moca
    trained = load_file(runs / "1" / "pretrain-3" / "model.safetensors")
    start = load_file(runs / "old" / "model.safetensors")
    moved = [(trained[n] - t).abs().max().item() for n, t in start.items() if "key.bias" not in n]
    assert 0 < min(moved) and max(moved) < 0.05, "it began at the old one and was trained"


def test_the_other_programs_read_the_number_of_tokens_from_a_checkpoint(runs, small_world, tmp_path):
    data = ["--data", small_world / "test.jsonl", "--images", small_world / "images"]
    done = call("evaluate.py", "--ckpt", runs / "2", "--out", tmp_path / "eval", *data)
    assert done.returncode == 0, done.stderr
    data[1] = small_world / "val.jsonl"
    done = call("mir.py", "--ckpt", runs / "2", *data)
    assert done.returncode == 0 and "MIR " in done.stdout, done.stderr
    done = call("hub", "inspect", runs / "2")
    assert "connector  qformer-4-96x2: 4 image tokens" in done.stdout and "problems   none" in done.stdout
    picture = next((small_world / "images").iterdir())
    done = call("look", "--ckpt", runs / "2", "--image", picture, "--prompt", "Is there a circle?",
                "--out", tmp_path / "page.html", "--json", tmp_path / "page.json", "--png",
                tmp_path / "png")
    assert done.returncode == 0, done.stderr
    [look] = json.loads((tmp_path / "page.json").read_text())
    assert look["side"] == 2 and len(look["degree"]) == 4 and "4 image tokens are queries" in look["name"]
    done = call("hub", "export", runs / "2", tmp_path / "out")
    assert done.returncode == 2 and "has MoCa" in done.stderr


def test_a_connector_that_llava_hf_has_no_place_for_is_refused_by_name(small_world, tmp_path):
    for name in ("linear", "mlp3x"):
        out = tmp_path / name
        done = call("train.py", "--stage", "pretrain", "--data", small_world / "pretrain.json",
                    "--images", small_world / "images", "--out", out, "--connector", name,
                    "--global-batch", 8, "--max-steps", 1, "--workers", 0)
        assert done.returncode == 0, done.stderr
        done = call("hub", "export", out, tmp_path / "export")
        assert done.returncode == 2 and f"has the connector {name}: llava-hf's layout holds mlp2x alone" in done.stderr


def test_a_connector_other_than_the_stored_one_is_refused(runs, small_world, tmp_path):
    done = call("train.py", "--stage", "finetune", "--data", small_world / "finetune.json",
                "--images", small_world / "images", "--out", tmp_path / "x", "--projector",
                runs / "1", "--connector", "mlp2x", "--global-batch", 8, "--max-steps", 1,
                "--workers", 0)
    assert done.returncode == 2 and "has qformer-4-96x2: leave the flag out" in done.stderr


def test_a_run_with_a_q_former_resumes(runs, small_world, tmp_path):
    shutil.copytree(runs / "1", tmp_path / "1")
    # as if it had been stopped after step 2
    shutil.rmtree(tmp_path / "1" / "pretrain-3")
    args = ["train.py", "--stage", "pretrain", "--data", small_world / "pretrain.json", "--images",
            small_world / "images", "--loss", "vdep", "--connector", "qformer-4-96x2",
            "--projector", runs / "old", "--global-batch", 8, "--workers", 0, "--moca",
            "--max-steps", 3, "--save-every", 2, "--keep-last", 2]
    done = call(*args, "--out", tmp_path / "1", "--resume")
    assert done.returncode == 0, done.stderr
    a, b = (load_file(folder / "1" / "pretrain-3" / "model.safetensors")
            for folder in (runs, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


