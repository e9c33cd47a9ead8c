"""losses.py: the contract between an objective and the trainer, and how each method is wired to the model."""
import pytest
import torch
from test_model import N, batch_of, prompts, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from common.flags import UserError
from common.positions import true_positions
from data import Batch
from losses import LOSSES, Loss, Objective, Term, count_terms
from methods import basic, ce, vdep, vista
from training.settings import TrainConfig
from training.setup import check_objective

STAGES = ("pretrain", "finetune")


def example() -> Batch:
    """Four samples: image and text, image and longer text, text alone, an image in VDEP mode."""
    ids, masks, pixels = prompts([9, 12, 7, 2 + N], without_image=[2])
    b = batch_of(ids, masks, pixels)
    vdep_mode = torch.tensor([False, False, False, True])
    labels = torch.where(b.attention_mask & (torch.arange(12) > 6) & ~vdep_mode[:, None],
                         b.input_ids, -100)
    labels[2, 3:6] = b.input_ids[2, 3:6]
    return Batch(b.input_ids, labels, b.image_mask, b.attention_mask, pixels, b.image_mask.any(1),
                 vdep_mode)


def rows(batch: Batch, which: list[int]) -> Batch:
    return Batch(**{k: v[which] for k, v in vars(batch).items() if isinstance(v, torch.Tensor)})


def frozen(stage: str, **decoder):
    """The tiny model as a stage trains it."""
    model = tiny(**decoder)
    model.vision_tower.requires_grad_(False)
    if stage == "pretrain":
        model.language_model.requires_grad_(False)
        if model.language_model.config.moca:
            model.language_model.moca.requires_grad_(True)
    return model


def cfg(loss, stage="pretrain", **options):
    return TrainConfig(loss=loss, stage=stage, vision="toy/clip", llm="toy/llm", **options)


def gradient_reach(model, loss) -> set[str]:
    """Which parts a loss's gradient reaches, and it is not zero."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {n.split(".")[0] if "moca" not in n else "moca" for n, p in model.named_parameters()
            if p.grad is not None and (p.grad != 0).any()}


@pytest.mark.parametrize("loss, functions", [
    ("ce", {"ce": ce.next_token_loss}), ("vdep", {"ce": ce.next_token_loss, "vdep": vdep.reconstruction_loss}),
    ("vista", {"ce": ce.next_token_loss, "vista": vista.alignment_loss}),
    ("basic", {"ce": ce.next_token_loss, "das": basic.direction_loss, "sds": basic.semantic_loss})])
def test_counts_are_those_of_the_methods_and_known_before_any_forward(loss, functions, monkeypatch):
    """The registry's denominator of a term is the count that its function in methods/ returns."""
    returned = {}
    for name, function in functions.items():
        def spy(*a, name=name, function=function, **k):
            total, returned[name] = function(*a, **k)
            return total, returned[name]
        monkeypatch.setattr(losses, function.__name__, spy)
    for which in ([0, 1, 2, 3], [0], [2], [3], [2, 3]):
        part = rows(example(), which)
        counts = count_terms(loss, part)
        terms = Objective(tiny(), cfg(loss))(part)
        assert {t.name for t in terms} == counts.keys() == functions.keys()
        for term in terms:
            assert returned[term.name] == counts[term.name] and term.total.ndim == 0, f"{term.name} of {which}"


@pytest.mark.parametrize("loss", LOSSES)
def test_a_term_without_a_count_fails_at_start_with_the_registrys_name(loss, monkeypatch):
    check_objective(cfg(loss))
    function, counts = LOSSES[loss]

    def forgetful(*a):
        return [*function(*a), Term("mine", torch.zeros(()), 1.0)]
    monkeypatch.setitem(LOSSES, loss, Loss(forgetful, counts))
    with pytest.raises(UserError, match=rf"LOSSES\['{loss}'\] has no count for mine"):
        check_objective(cfg(loss))


def test_that_check_leaves_the_random_numbers_as_they_were():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_objective(cfg("basic"))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_objective_has_its_papers_terms_and_weights():
    wanted = {"ce": {}, "vdep": {"vdep": 0.001}, "vista": {"vista": 1.0},
              "basic": {"das": 1.0, "sds": 0.01}}
    for loss, weights in wanted.items():
        terms = Objective(tiny(), cfg(loss))(example())
        assert {t.name: t.weight for t in terms} == {"ce": 1.0, **weights}


@pytest.mark.parametrize("loss", LOSSES)
def test_cross_entropy_is_that_of_the_full_logits_in_every_objective(loss):
    batch, model = example(), tiny()
    term = Objective(model, cfg(loss))(batch)[0]
    logits = model.language_model.lm_head(model(batch).hidden_states)
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1),
                                               batch.labels[:, 1:].flatten())
    assert term.name == "ce" and term.weight == 1.0
    torch.testing.assert_close(term.total / count_terms(loss, batch)["ce"], wanted)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_cut_in_pieces_has_the_gradient_of_the_whole(loss, stage):
    """Sums divided by global counts: what each micro-batch holds does not matter."""
    batch = example()
    def gradient(parts):
        model = frozen(stage, moca=True)
        for which in parts:
            terms = Objective(model, cfg(loss, stage))(rows(batch, which))
            sum(t.weight * t.total / count_terms(loss, batch)[t.name] for t in terms).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient([[0, 1, 2, 3]]), gradient([[0], [3, 2], [1]]), atol=1e-6,
                               rtol=0)


def test_vdep_rebuilds_from_the_positions_of_the_image_and_only_in_its_own_mode():
    batch, model = example(), tiny()
    terms = {t.name: t for t in Objective(model, cfg("vdep"))(batch)}
    out = model(batch)
    h = out.hidden_states[3][batch.image_mask[3]][None]                                    # (1,N,D)
    torch.testing.assert_close(terms["vdep"].total,
                               vdep.reconstruction_loss(h, out.image_embeds[3:])[0])
    alone = {t.name: t for t in Objective(model, cfg("vdep"))(rows(batch, [0, 1, 2]))}
    assert alone["vdep"].total == 0
    torch.testing.assert_close(alone["ce"].total, terms["ce"].total)
    assert [t.name for t in Objective(model, cfg("vdep", "finetune"))(batch)] == ["ce"], "stage 2 is cross-entropy"
    assert [t.name for t in Objective(model, cfg("vdep", vdep_alpha=0.0))(batch)] == ["ce"]


def test_vista_compares_supervised_tokens_with_the_state_at_the_last_image_token():
    batch, model = example(), tiny()
    term = Objective(model, cfg("vista"))(batch)[1]
    out, wanted = model(batch), 0
    for b in (0, 1):                                       # 2 has no image, 3 no text
        last = batch.image_mask[b].nonzero().max()
        text = (batch.labels[b] != -100)[None]
        wanted += vista.alignment_loss(out.text_embeds[b:b + 1], text, out.hidden_states[b, last][None])[0]
    torch.testing.assert_close(term.total, wanted)


def test_vista_leaves_out_supervised_text_before_the_image():
    """A sample whose answers all come before its image has none: it is not counted either."""
    batch, model = example(), tiny()
    before = Objective(model, cfg("vista"))(batch)[1].total
    batch.labels[0, :2] = batch.input_ids[0, :2]
    torch.testing.assert_close(Objective(model, cfg("vista"))(batch)[1].total, before)
    assert count_terms("vista", batch)["vista"] == 2
    batch.labels[0, 2:] = -100
    assert count_terms("vista", batch)["vista"] == 1


def test_in_vdeps_joint_mode_a_sample_adds_to_both_terms_the_same_number_as_in_either():
    """Attention is causal: the caption, after the image, changes no state that predicts the image."""
    batch, model = rows(example(), [0]), tiny()
    batch.reconstruct[:] = True
    terms = {t.name: t.total for t in Objective(model, cfg("vdep"))(batch)}
    end = 2 + N
    alone = Batch(batch.input_ids[:, :end], batch.labels[:, :end].clone().fill_(-100),
                  batch.image_mask[:, :end], batch.attention_mask[:, :end], batch.pixel_values,
                  batch.has_image, batch.reconstruct)
    torch.testing.assert_close(terms["vdep"], Objective(model, cfg("vdep"))(alone)[1].total)
    torch.testing.assert_close(terms["ce"], Objective(model, cfg("ce"))(batch)[0].total)
    assert terms["ce"] > 0


@pytest.mark.parametrize("flags, options", [
    ({"vdep_reduce": "sum"}, {"reduce": "sum"}), ({"vdep_shift": "0"}, {"shift": 0}),
    ({"vdep_distance": "inverse"}, {"distance": "inverse"})])
def test_vdeps_flags_reach_its_loss(flags, options):
    batch, model = example(), tiny()
    out = model(batch)
    h = out.hidden_states[3][batch.image_mask[3]][None]                                    # (1,N,D)
    wanted, _ = vdep.reconstruction_loss(h, out.image_embeds[3:], **options)
    assert abs(wanted - vdep.reconstruction_loss(h, out.image_embeds[3:])[0]) > 1e-3, "the flag makes no difference"
    torch.testing.assert_close(Objective(model, cfg("vdep", **flags))(batch)[1].total, wanted)


@pytest.mark.parametrize("k, options", [
    (1, {}), (2, {"basic_k": 2}), (3, {"basic_k": 3, "basic_weights": "decreasing"}),
    (2, {"basic_k": 2, "basic_degree": "equal"})])
def test_basic_supervises_the_projector_by_its_first_layers(k, options):
    """Default k: half of the tiny model's three layers is one."""
    batch, model = example(), tiny(moca=True)
    _, das, sds = Objective(model, cfg("basic", **options))(batch)
    seen = {}
    text = batch.text_after_image()
    out = model(batch, lambda i, h, a: seen.update({i: (h, a)}), true_positions(text))
    w = basic.layer_weights(k, options.get("basic_weights", "increasing"))
    v_hat, degree = torch.zeros_like(out.image_embeds), torch.zeros(4, N)
    for b in (0, 1):
        v_hat[b] = sum(w[i] * seen[i + 1][0][b][batch.image_mask[b]] for i in range(k))
        looks = sum(seen[i + 1][1][b, :int(text[b].sum())].sum(0) for i in range(k))
        degree[b] = looks / looks.sum() if options.get("basic_degree") != "equal" else 1 / N
    E = model.language_model.model["embed_tokens"].weight
    torch.testing.assert_close(das.total, basic.direction_loss(out.image_embeds, v_hat, degree)[0],
                               atol=1e-5, rtol=0)
    wanted = basic.semantic_loss(out.image_embeds, v_hat, degree.double(), E)[0]
    torch.testing.assert_close(sds.total, wanted, atol=1e-5, rtol=0)


def test_basic_scales_words_where_the_family_scales_them():
    """Gemma's layers receive sqrt(D) times the table: logits are made with what they receive."""
    batch, model = example(), tiny(embed_scale=24 ** 0.5)
    sds = Objective(model, cfg("basic"))(batch)[2]
    seen = []
    out = model(batch, lambda i, h, a: seen.append((h, a)),
                true_positions(batch.text_after_image()), 1)
    h, attention = seen[0]
    v_hat, degree = torch.zeros_like(out.image_embeds), torch.zeros(4, N)
    for b in (0, 1):
        v_hat[b] = h[b][batch.image_mask[b]]
        degree[b] = attention[b].sum(0) / attention[b].sum()
    words = model.language_model.embed(torch.arange(50))                                    # (V,D)
    wanted = basic.semantic_loss(out.image_embeds, v_hat, degree.double(), words)[0]
    torch.testing.assert_close(sds.total, wanted)


@pytest.mark.parametrize("stage", STAGES)
def test_basics_gradient_stops_at_the_projectors_input_where_the_vision_tower_is_trained(stage):
    """The paper: the two losses "only influence the gradients of the vision projector parameters"."""
    batch, gradients = example(), []
    for unlocked in (False, True):
        model = frozen(stage, moca=True)
        model.vision_tower.requires_grad_(unlocked)
        terms = {t.name: t.total for t in Objective(model, cfg("basic", stage))(batch)}
        reach = gradient_reach(model, terms["das"] + terms["sds"])
        assert reach == {"multi_modal_projector"}
        gradients.append([p.grad.clone() for p in model.multi_modal_projector.parameters()])
        assert ("vision_tower" in gradient_reach(model, terms["ce"])) == unlocked, "cross-entropy trains the tower too"
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_basic_computes_only_what_is_switched_on(monkeypatch):
    import model as module
    calls = []
    plain = module.attention_to_image
    monkeypatch.setattr(module, "attention_to_image", lambda *a, **k: calls.append(1)
                        or plain(*a, **k))
    def names(**options):
        calls.clear()
        return [t.name for t in Objective(tiny(), cfg("basic", **options))(example())]
    assert names(basic_k=2) == ["ce", "das", "sds"]
    assert len(calls) == 2, "attention was computed beyond layer k, or more than once"
    assert names(basic_sds=0.0) == ["ce", "das"] and names(basic_das=0.0) == ["ce", "sds"]
    assert names(basic_degree="equal") == ["ce", "das", "sds"] and not calls
    assert names(basic_das=0.0, basic_sds=0.0) == ["ce"] and not calls


@pytest.mark.parametrize("stage", STAGES)
def test_which_parameters_each_term_trains(stage):
    """BASIC's terms train the projector alone, also where the language model is trained. VISTA's
    and VDEP's go through the layers; VISTA's meets word embeddings too."""
    llm = {"language_model"} if stage == "finetune" else set()
    wanted = {"ce": {"multi_modal_projector", "moca"} | llm,
              "vdep": {"multi_modal_projector", "moca"},
              "vista": {"multi_modal_projector", "moca"} | llm, "das": {"multi_modal_projector"},
              "sds": {"multi_modal_projector"}}
    for loss in LOSSES:
        model = frozen(stage, moca=True)
        for term in Objective(model, cfg(loss, stage))(example()):
            assert gradient_reach(model, term.total) == wanted[term.name], f"{term.name} in {stage}"


def test_vista_moves_word_embeddings_in_stage_2_and_vdeps_target_stays():
    batch, model = example(), frozen("finetune")
    term = Objective(model, cfg("vista", "finetune"))(rows(batch, [0]))[1]
    term.total.backward()
    moved = model.language_model.model["embed_tokens"].weight.grad.abs().sum(1) > 0
    assert moved[batch.labels[0][batch.labels[0] != -100]].all()


@pytest.mark.parametrize("loss", LOSSES)
def test_activation_checkpointing_changes_no_term_and_no_gradient(loss):
    results = []
    for layers in (0, 3):
        model = frozen("finetune", moca=True)
        model.language_model.recomputed = layers
        terms = Objective(model, cfg(loss, basic_k=2 if loss == "basic" else None))(example())
        sum(t.weight * t.total for t in terms).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*(t.total.detach() for t in terms), *gradients])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_under_autocast_every_term_is_float32_and_near_the_exact_one(loss):
    batch = example()
    batch.pixel_values = batch.pixel_values.float()
    exact = Objective(tiny(torch.float32), cfg(loss))(batch)
    with torch.autocast("cpu", torch.bfloat16):
        low = Objective(tiny(torch.float32), cfg(loss))(batch)
    for a, b in zip(exact, low):
        assert b.total.dtype == torch.float32 and abs(a.total - b.total) < 0.1 * a.total, a.name


class Waits(TorchDispatchMode):
    """Counts the operations whose result's size, or a number in Python, depends on what a tensor holds."""
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masks = name.startswith(("index", "_unsafe_index")) and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in arguments[1] or [])
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal",
                             "_unique2"):
            self.count += 1
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_micro_batch_never_waits_for_the_device(loss, stage):
    """Which positions are selected is found before the batch
    is moved. Each such operation would stop a GPU's queue."""
    model = tiny(moca=True)
    with Waits() as waits:
        assert example().places is not None
    assert waits.count > 3, "this test sees nothing"
    batch = example().to("cpu")
    with Waits() as waits:
        sum(term.total for term in Objective(model, cfg(loss, stage))(batch)).backward()
    assert waits.count == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_the_same_bit_for_bit_whether_places_are_known_or_found(loss):
    model = tiny(torch.float32)
    for which in ([0, 1, 2, 3], [2], [3]):
        batch = rows(example(), which)
        totals, gradients = [], []
        for known in (batch, batch.to("cpu")):
            terms = Objective(model, cfg(loss))(known)
            totals.append(torch.stack([term.total for term in terms]))
            gradients.append(torch.autograd.grad(totals[-1].sum(),
                                                 model.multi_modal_projector.parameters()))
        assert torch.equal(*totals) and all(torch.equal(a, b) for a, b in zip(*gradients))
