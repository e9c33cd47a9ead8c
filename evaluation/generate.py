"""Greedy answers to many prompts at once. What prompts about one image share is computed once.

`Llava.generate` in model.py is the same for one prompt: read that first.
"""
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import KVCache, Llava


def prefill(model: Llava, input_ids: list[Tensor], pixel_values: Tensor, image_mask: list[Tensor], image_index: list[int],
            room: int) -> tuple[KVCache, Tensor]:
    """A cache of B prompts, with `room` for as many tokens behind each, and the hidden state (B,D) of their ends.

    Each image is encoded once. What all prompts about it begin with is computed once, in the cache row of the first
    of them, and copied to the others' rows; so is what all prompts without an image begin with."""
    lm, device, B = model.language_model, pixel_values.device, len(input_ids)
    images = model.embed_images(pixel_values) if any(m.any() for m in image_mask) else None          # (I,N,D)

    def embed(rows: list[int], spans: list[slice]) -> tuple[Tensor, Tensor | None]:
        """A span of each of these prompts, with its part of the image, (b,T,D), and image_mask, None if empty."""
        h = lm.embed(pad_sequence([input_ids[r][s] for r, s in zip(rows, spans)], batch_first=True).to(device))
        mask = pad_sequence([image_mask[r][s] for r, s in zip(rows, spans)], batch_first=True)
        if not mask.any():
            return h, None
        mask = mask.to(device)
        return model.merge(h, images[[image_index[r] for r in rows]], mask), mask

    groups = {}
    for r in range(B):
        groups.setdefault(image_index[r] if image_mask[r].any() else None, []).append(r)
    start = [0] * B                                      # of what a row does not share
    for rows in groups.values():
        shared = shared_prefix([input_ids[r] for r in rows], [image_mask[r] for r in rows])
        for r in rows:
            start[r] = shared
    length = [len(ids) for ids in input_ids]
    rest = max(n - s for n, s in zip(length, start))
    end = max(start) + rest                              # padded, no row's slots end later
    dtype = lm.model["embed_tokens"].weight.dtype
    cache = KVCache(lm.config, B, max(end, max(length) + room), dtype, device)
    if max(start) > 0:
        firsts = [rows[0] for rows in groups.values()]
        h, mask = embed(firsts, [slice(start[r]) for r in firsts])
        lm(h, cache=cache, image_mask=mask, rows=torch.tensor(firsts, device=device))
        for first, *others in groups.values():
            for t in (cache.keys, cache.values):
                t[:, others, :, :start[first]] = t[:, first:first + 1, :, :start[first]]
    h, mask = embed(range(B), [slice(s, None) for s in start])                          # (B,rest,D)
    start, length = torch.tensor([start, length], device=device)                        # (B,) each
    positions = start[:, None] + torch.arange(rest, device=device)
    h = lm(h, cache=cache, positions=positions, end=end, image_mask=mask)
    return cache, h[torch.arange(B, device=device), length - start - 1]

@torch.inference_mode()
def generate(model: Llava, input_ids: list[Tensor], pixel_values: Tensor, max_new_tokens: int = 128,
             image_mask: list[Tensor] | None = None, eos_token_id: int | None = None,
             image_index=None) -> list[list[int]]:
    """Greedy answers to B prompts of any lengths, as lists of ids without the end token.

    input_ids: 1-d tensors; image_mask: 1-d bool tensors marking the image positions (None: text only);
    pixel_values (I,3,H,W); image_index (B,): which of those each prompt is about (None: its own, I = B). Prompts
    are padded on the right: each row writes its new tokens over its own padding. An answer depends on neither the
    other prompts nor their order, up to the rounding of sums: two logits that are equal to 1e-5 may change places.
    """
    lm, device, B = model.language_model, pixel_values.device, len(input_ids)
    image_mask = image_mask or [torch.zeros_like(ids, dtype=torch.bool) for ids in input_ids]
    image_index = list(range(B)) if image_index is None else torch.as_tensor(image_index).tolist()
    cache, h = prefill(model, input_ids, pixel_values, image_mask, image_index, max_new_tokens)
    answers = [lm.lm_head(h).argmax(-1)]                                                # (B,) each
    length = torch.tensor([len(ids) for ids in input_ids], device=device)               # (B,)
    end = max(len(ids) for ids in input_ids)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    for step in range(1, max_new_tokens):
        if eos_token_id is not None:
            done |= answers[-1] == eos_token_id
            if done.all():
                break
        h = lm(lm.embed(answers[-1][:, None]), cache=cache, positions=(length + step - 1)[:, None], end=end + step)
        answers.append(lm.lm_head(h[:, 0]).argmax(-1))
    rows = torch.stack(answers, dim=1).tolist()                                         # (B, new)
    return [row[:row.index(eos_token_id)] if eos_token_id in row else row for row in rows]


def shared_prefix(input_ids: list[Tensor], image_mask: list[Tensor]) -> int:
    """The number of tokens that all prompts about one image begin with; fewer than any of them has, for an answer
    begins with the logits of the last, and with the image whole or not at all."""
    n = min(len(ids) for ids in input_ids) - 1
    same = torch.ones(n, dtype=torch.bool, device=input_ids[0].device)
    for ids, mask in zip(input_ids, image_mask):
        same &= (ids[:n] == input_ids[0][:n]) & (mask[:n] == image_mask[0][:n])
    n = int(same.cumprod(0).sum())
    cut = image_mask[0][:n].any() and image_mask[0][n:].any()
    return int(image_mask[0].int().argmax()) if cut else n
