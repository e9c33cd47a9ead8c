"""model.py: merging, attention maps, `watch`, generation. Also evaluation/generate.py: many prompts at once."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from common.positions import true_positions
from evaluation.generate import generate
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT, rotary, rotate

N = 4                                                  # image tokens


def tiny(dtype=torch.float64, **decoder) -> Llava:
    torch.manual_seed(0)
    decoder = {"num_key_value_heads": 2, **decoder}
    model = Llava(ViT(VisionConfig(16, 32, 3, 2, 16, 8)), Projector(16, 24),
                  Decoder(DecoderConfig(50, 24, 40, 3, 4, **decoder))).to(dtype)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.25)
    return model


def prompts(lengths, first_image=2, without_image=()):
    """Return (ids, masks, pixels) of prompts of these lengths."""
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 50, (n,), generator=g) for n in lengths]
    masks = [torch.zeros(n, dtype=torch.bool) for n in lengths]
    for i, mask in enumerate(masks):
        if i not in without_image:
            mask[first_image:first_image + N] = True
            ids[i][mask] = 0
    return ids, masks, torch.randn(len(lengths), 3, 16, 16, generator=g, dtype=torch.float64)


def batch_of(ids, masks, pixels):
    def pad(rows):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return SimpleNamespace(input_ids=pad(ids), image_mask=pad(masks), pixel_values=pixels,
                           attention_mask=pad([torch.ones_like(m) for m in masks]))


def test_image_tokens_take_the_marked_positions_in_order():
    model = tiny()
    ids, masks, pixels = prompts([9, 12, 7], without_image=[2])
    batch = batch_of(ids, masks, pixels)
    image, text = model.embed_images(pixels), model.language_model.model["embed_tokens"](batch.input_ids)
    merged = model.merge(text, image, batch.image_mask)
    for b in range(3):
        j = 0
        for t in range(merged.shape[1]):
            wanted = text[b, t]
            if batch.image_mask[b, t]:
                wanted, j = image[b, j], j + 1
            assert torch.equal(merged[b, t], wanted)
    assert j == 0, "the last sample has no image"


def test_a_batch_of_text_alone_still_gives_the_projector_a_gradient_of_zero():
    """Every rank must have the same parameters in its graph, or DDP and FSDP deadlock."""
    model = tiny()
    model(batch_of(*prompts([9, 6], without_image=[0, 1]))).hidden_states.sum().backward()
    for p in model.multi_modal_projector.parameters():
        assert p.grad is not None and (p.grad == 0).all()


def test_the_vision_encoder_builds_a_graph_only_when_it_is_trained():
    model = tiny()
    batch = batch_of(*prompts([9]))
    model.vision_tower.requires_grad_(False)
    out = model(batch)
    out.hidden_states.sum().backward()
    assert all(p.grad is None for p in model.vision_tower.parameters())
    assert model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    model.vision_tower.requires_grad_(True)
    model(batch).hidden_states.sum().backward()
    assert model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    unused = model.vision_tower.encoder["layers"][-1].mlp.fc1.weight
    assert unused.grad is None, "the last layer ran, but the features come from the second to last"


def test_features_are_the_patches_in_reading_order_without_the_class_token():
    vit = tiny().vision_tower
    pixels = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    before = vit(pixels, layer=0)
    for patch in range(N):
        row, column = patch // 2 * 8, patch % 2 * 8
        changed = pixels.clone()
        changed[..., row:row + 8, column:column + 8] += 1.0
        moved = (vit(changed, layer=0) - before).abs().sum(-1)[0] > 1e-9        # (N,)
        assert moved.tolist() == [i == patch for i in range(N)]


def test_padding_on_the_right_changes_nothing():
    model = tiny()
    ids, masks, pixels = prompts([9, 14, 7])
    together = model(batch_of(ids, masks, pixels)).hidden_states
    for b in range(3):
        alone = model(batch_of(ids[b:b + 1], masks[b:b + 1], pixels[b:b + 1])).hidden_states[0]
        torch.testing.assert_close(together[b, :len(alone)], alone, atol=1e-12, rtol=0)


def test_rotary_embeddings_make_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    def at(m, n):
        a, b = (rotary(torch.tensor([p]), 8, 10000.0, torch.float64) for p in (m, n))
        return (rotate(q, *a) * rotate(k, *b)).sum()
    assert abs(at(3, 1) - at(10, 8)) < 1e-5 and abs(at(3, 1) - at(3, 2)) > 1e-3


def test_the_attention_map_is_the_softmax_over_all_visible_keys_averaged_over_heads():
    model = tiny()
    batch = batch_of(*prompts([9, 12, 7], without_image=[2]))
    rows = batch.attention_mask & ~batch.image_mask & (batch.image_mask.cumsum(1) > 0)
    seen = {}
    model(batch, lambda i, h, attention: seen.update({i: (h, attention)}),
          attention_from=true_positions(rows))
    assert sorted(seen) == [1, 2, 3]
    h = model.merge(model.language_model.model["embed_tokens"](batch.input_ids),
                    model.embed_images(batch.pixel_values), batch.image_mask)
    B, T = batch.input_ids.shape
    rope = rotary(torch.arange(T), 6, 10000.0, torch.float64)
    for i, layer in enumerate(model.language_model.model["layers"], 1):
        x, a = layer.input_layernorm(h), layer.self_attn
        q = rotate(a.q_proj(x).view(B, T, 4, 6).transpose(1, 2), *rope)
        k = rotate(a.k_proj(x).view(B, T, 2, 6).transpose(1, 2), *rope).repeat_interleave(2, dim=1)
        scores = (q @ k.transpose(2, 3)) / 6 ** 0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
        full = scores.softmax(-1).mean(1)                                       # (B,T,T)
        states, attention = seen[i]
        assert not states.requires_grad and not attention.requires_grad
        assert attention.shape == (B, rows.sum(1).max(), N)
        for b in range(B):
            # (M,N); no column without an image
            wanted = full[b][rows[b]][:, batch.image_mask[b]]
            m, n = wanted.shape
            torch.testing.assert_close(attention[b, :m, :n].double(), wanted, atol=1e-6, rtol=0)
            assert (attention[b, m:] == 0).all() and (attention[b, :, n:] == 0).all()
        h, _ = layer(h, rope)
        torch.testing.assert_close(states, h, atol=1e-12, rtol=0)


def test_checkpointing_changes_no_value_and_no_gradient_and_watch_sees_each_layer_once():
    model = tiny()
    batch = batch_of(*prompts([9, 12]))
    results = []
    for recomputed in (0, 2, 3):
        model.language_model.recomputed = recomputed
        model.zero_grad()
        seen = []
        rows = true_positions(batch.attention_mask)
        out = model(batch, lambda i, h, attention, seen=seen: seen.append(i), attention_from=rows)
        out.hidden_states.pow(2).sum().backward()
        assert seen == [1, 2, 3]
        gradients = [p.grad.clone()
                     for p in model.language_model.parameters() if p.grad is not None]
        results.append([out.hidden_states, *gradients])
    assert len(results[0]) == len(results[1]) > 20
    for a, *others in zip(*results):
        assert all(torch.equal(a, b) for b in others)


def test_a_layer_computes_no_attention_map_unless_rows_are_given():
    seen = []
    tiny()(batch_of(*prompts([9])), lambda i, h, attention: seen.append(attention))
    assert seen == [None] * 3


def test_a_tied_head_is_the_embedding():
    model = tiny(tie_word_embeddings=True)
    assert model.language_model.lm_head.weight is model.language_model.model["embed_tokens"].weight


# --------------------------------------------------------------------------------------- generation
def without_cache(model, ids, mask, pixels, new):
    """Decode greedily with a full forward pass for every token. Returns (answer, logits)."""
    answer, logits = [], []
    for _ in range(new):
        with torch.no_grad():
            h = model(batch_of([ids], [mask], pixels[None])).hidden_states
        logits.append(model.language_model.lm_head(h[0, -1]))
        answer.append(int(logits[-1].argmax()))
        ids, mask = torch.cat([ids, torch.tensor(answer[-1:])]), torch.cat([mask, torch.zeros(1, dtype=torch.bool)])
    return answer, torch.stack(logits)


LENGTHS = [9, 14, 7, 11, 8, 20, 6, 10]


@pytest.mark.parametrize("size", [1, 8])
def test_neither_the_cache_nor_the_batch_changes_a_token(size):
    model = tiny(torch.float32)
    ids, masks, pixels = prompts(LENGTHS, without_image=[3])
    pixels = pixels.float()
    answers = []
    for s in range(0, len(ids), size):
        answers += generate(model, ids[s:s + size], pixels[s:s + size], 10, masks[s:s + size])
    assert answers == [without_cache(model, i, m, p, 10)[0] for i, m, p in zip(ids, masks, pixels)]
    assert len({tuple(a) for a in answers}) > 3, "if all answers were alike, this test would prove nothing"


def test_the_plain_generate_gives_the_same_answers():
    model = tiny(torch.float32)
    ids, masks, pixels = prompts(LENGTHS, without_image=[3])
    pixels = pixels.float()
    wanted = generate(model, ids, pixels, 10, masks)
    assert [model.generate(i, p[None], m, 10) for i, m, p in zip(ids, masks, pixels)] == wanted
    end = wanted[0][4]
    assert model.generate(ids[0], pixels[:1], masks[0], 10, end) == wanted[0][:wanted[0].index(end)]


def test_one_forward_over_prompt_and_answer_gives_the_logits_of_decoding(monkeypatch):
    model = tiny(torch.float32)
    ids, masks, pixels = prompts(LENGTHS[:3])
    seen = []
    head = model.language_model.lm_head
    monkeypatch.setattr(head, "forward", lambda h: seen.append(F.linear(h, head.weight))
                        or seen[-1])
    answers = generate(model, ids, pixels.float(), 8, masks)
    decoded = torch.stack(seen, dim=1)                                          # (B,new,V)
    for b, answer in enumerate(answers):
        whole = torch.cat([ids[b], torch.tensor(answer)])
        mask = F.pad(masks[b], (0, len(answer)))
        with torch.no_grad():
            h = model(batch_of([whole], [mask], pixels[b:b + 1].float())).hidden_states[0]
        torch.testing.assert_close(decoded[b], F.linear(h[len(ids[b]) - 1:-1], head.weight),
                                   atol=1e-5, rtol=0)


def test_an_answer_ends_before_its_end_token():
    model = tiny(torch.float32)
    ids, masks, pixels = prompts(LENGTHS)
    free = generate(model, ids, pixels.float(), 10, masks)
    end = free[0][4]
    stopped = generate(model, ids, pixels.float(), 10, masks, eos_token_id=end)
    assert stopped == [a[:a.index(end)] if end in a else a for a in free]


def test_a_prompt_of_text_alone_can_be_continued():
    model = tiny(torch.float32)
    ids, masks, pixels = prompts([5, 9], without_image=[0, 1])
    answers = generate(model, ids, pixels.float(), 6, masks)
    assert answers == [model.generate(i, None, m, 6) for i, m in zip(ids, masks)]
