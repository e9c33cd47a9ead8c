"""methods/moca.py: the map itself, and where the decoder applies it."""
import pytest
import torch
from adapters import make_moca
from test_families import (  # noqa: F401, tower and whole are fixtures
    L,
    liuhaotian,
    renamed,
    store,
    tensors_of,
    tower,
    whole,
)
from test_model import LENGTHS, batch_of, prompts, tiny, without_cache

from common.flags import UserError
from evaluation.generate import generate
from hub.checkpoint import load_model


def test_it_is_an_affine_map_of_image_tokens_and_leaves_text_bit_for_bit():
    torch.manual_seed(0)
    h, mask = torch.randn(2, 5, 4), torch.rand(2, 5) < 0.5
    moca = make_moca(4)
    assert torch.equal(moca(h, mask), h), "it is not the identity at the start"
    torch.nn.init.normal_(moca.u)
    torch.nn.init.normal_(moca.v)
    out = moca(h, mask)
    assert torch.equal(out[~mask], h[~mask])
    for b, t in mask.nonzero():
        wanted = torch.stack([moca.u[d] * h[b, t, d] + moca.v[d] for d in range(4)])
        torch.testing.assert_close(out[b, t], wanted, atol=1e-6, rtol=0)
    low = h.bfloat16()
    assert moca(low, mask).dtype == torch.bfloat16 and torch.equal(moca(low, mask)[~mask], low[~mask])


def calibrated():
    model = tiny(torch.float32, moca=True)
    for name, p in model.named_parameters():
        if ".moca." in name:
            torch.nn.init.normal_(p, mean=1.0 if name.endswith("u") else 0.0, std=0.5)
    return model


def test_it_acts_after_every_layer_on_image_positions_alone():
    model, plain = calibrated(), tiny(torch.float32)
    batch = batch_of(*prompts([9, 12]))
    seen = {}
    for key, m in (("with", model), ("without", plain)):
        m(batch_of(batch.input_ids, batch.image_mask, batch.pixel_values.float()),
          lambda i, h, _, key=key: seen.update({(key, i): h}))
    before = batch.image_mask.cumsum(1) == 0
    for i in (1, 2, 3):
        assert torch.equal(seen["with", i][before], seen["without", i][before]), "text before the image changed"
    first = model.language_model.moca[0](seen["without", 1], batch.image_mask)
    assert torch.equal(seen["with", 1], first)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_every_layer_has_a_map_of_its_own(layer):
    model, plain = tiny(moca=True), tiny()
    for m in model.language_model.moca:
        torch.nn.init.ones_(m.u), torch.nn.init.zeros_(m.v)
    torch.nn.init.constant_(model.language_model.moca[layer - 1].u, 2.0)
    batch, seen = batch_of(*prompts([9, 12])), {}
    for key, m in (("with", model), ("without", plain)):
        m(batch, lambda i, h, _, key=key: seen.update({(key, i): h}))
    for i in range(1, layer):
        assert torch.equal(seen["with", i], seen["without", i]), "it acts before its layer"
    a, b = seen["with", layer], seen["without", layer]
    assert torch.equal(a[batch.image_mask], 2 * b[batch.image_mask]) and torch.equal(a[~batch.image_mask],
                                                                                     b[~batch.image_mask])


def kept_bytes(model, batch) -> int:
    """Bytes that a forward keeps for its backward, each storage counted once; weights are not counted."""
    weights_kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights_kept:
            # held, so that no address is used twice
            kept[storage.data_ptr()] = storage
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        total = model(batch).before_norm.sum()
    total.backward()
    return sum(s.nbytes() for s in kept.values())


def test_with_activation_checkpointing_it_keeps_no_activations_and_changes_no_number():
    model, plain = calibrated(), tiny(torch.float32)
    ids, masks, pixels = prompts([9, 12])
    batch, results = batch_of(ids, masks, pixels.float()), []
    for on in (False, True):
        model.language_model.recomputed = plain.language_model.recomputed = 3 * on
        model.zero_grad(), plain.zero_grad()
        extra = kept_bytes(model, batch) - kept_bytes(plain, batch)
        assert (extra == 0) == on, f"MoCa keeps {extra} bytes; checkpointing: {on}"
        results.append([model(batch).hidden_states, *(p.grad.clone() for p in model.parameters()
                                                      if p.grad is not None)])
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_it_acts_on_the_prompt_and_not_on_generated_tokens():
    model = calibrated()
    ids, masks, pixels = prompts(LENGTHS[:4])
    answers = generate(model, ids, pixels.float(), 8, masks)
    assert answers == [without_cache(model, i, m, p.float(), 8)[0]
                       for i, m, p in zip(ids, masks, pixels)]
    assert answers != generate(tiny(torch.float32), ids, pixels.float(), 8, masks)


def test_released_moca_checkpoints_load_with_their_maps(tower, whole, tmp_path):  # noqa: F811
    """Their names: model.layers.N.modality_layernorm.{scale,shift}, with use_moca in config.json."""
    maps = {f"model.layers.{n}.modality_layernorm.{p}": torch.randn(16) for n in range(2)
            for p in ("scale", "shift")}
    tensors = {**renamed(tensors_of("llava"), *L, (r"vision_tower\.", None)), **maps}
    model = load_model(store(tmp_path / "moca", {**liuhaotian(), "use_moca": True}, tensors, "bin"),
                       vision=tower)
    for n, layer in enumerate(model.language_model.moca):
        assert torch.equal(layer.u, maps[f"model.layers.{n}.modality_layernorm.scale"])
        assert torch.equal(layer.v, maps[f"model.layers.{n}.modality_layernorm.shift"])
    without = {n: p for n, p in model.named_parameters() if ".moca." not in n}
    assert without.keys() == dict(whole.named_parameters()).keys()
    with pytest.raises(UserError, match="left over"):
        load_model(store(tmp_path / "plain", liuhaotian(), tensors, "bin"), vision=tower)
