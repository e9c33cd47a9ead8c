"""Greedy answers to many prompts at once: each image, each shared prefix is computed once.

`Llava.generate` in model.py does the same for one prompt: read that first.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import KVCache, Llava


@dataclass
class Prompts:
    """B prompts of any lengths, and the images that they are about."""
    input_ids: list[Tensor]         # (T,) each
    image_mask: list[Tensor]        # (T,) bool each: the image positions
    image_index: list[int]          # (B,) which image each prompt is about
    image_embeds: Tensor | None     # (I,N,D); None: no prompt has an image


@torch.inference_mode()
def generate(model: Llava, input_ids: list[Tensor], pixel_values: Tensor, max_new_tokens: int = 128,
             image_mask: list[Tensor] | None = None, eos_token_id: int | None = None,
             image_index=None) -> list[list[int]]:
    """Return greedy answers to B prompts, as lists of ids without the end token. An answer does not
    depend on the other prompts, except where two logits are equal to about 1e-5.

    input_ids: (T,) each, of any lengths; image_mask: (T,) bool each, the image positions (None:
    text only); pixel_values (I,3,H,W); image_index (B,): each prompt's image (None: i has image i).
    """
    lm, device, B = model.language_model, pixel_values.device, len(input_ids)
    if image_mask is None:
        image_mask = [torch.zeros_like(ids, dtype=torch.bool) for ids in input_ids]
    image_index = list(range(B)) if image_index is None else torch.as_tensor(image_index).tolist()
    has_image = any(mask.any() for mask in image_mask)
    images = model.embed_images(pixel_values) if has_image else None                    # (I,N,D)
    prompts = Prompts(input_ids, image_mask, image_index, images)
    cache, h = prefill(model, prompts, max_new_tokens, device)                          # (B,D)

    # Prompts are padded on the right. Each row writes its new tokens over its own padding.
    lengths = [len(ids) for ids in input_ids]
    length = torch.tensor(lengths, device=device)                                       # (B,)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    answers = [lm.lm_head(h).argmax(-1)]                                                # (B,) each
    for step in range(1, max_new_tokens):
        if eos_token_id is not None:
            done |= answers[-1] == eos_token_id
            if done.all():
                break
        position = (length + step - 1)[:, None]                                         # (B,1)
        end = max(lengths) + step
        h = lm(lm.embed(answers[-1][:, None]), cache=cache, positions=position, end=end)
        answers.append(lm.lm_head(h[:, 0]).argmax(-1))
    rows = torch.stack(answers, dim=1).tolist()                                         # (B,steps)
    return [row[:row.index(eos_token_id)] if eos_token_id in row else row for row in rows]


def prefill(model: Llava, prompts: Prompts, room: int, device) -> tuple[KVCache, Tensor]:
    """Return a cache of B prompts with room for `room` more tokens each, and last states (B,D)."""
    lm, ids, masks = model.language_model, prompts.input_ids, prompts.image_mask
    lengths, B = [len(prompt) for prompt in ids], len(ids)

    # Rows that may share a prefix: the prompts about one image, and the prompts without an image.
    groups = {}
    for row, mask in enumerate(masks):
        groups.setdefault(prompts.image_index[row] if mask.any() else None, []).append(row)
    prefix = [0] * B
    for rows in groups.values():
        shared = shared_prefix([ids[r] for r in rows], [masks[r] for r in rows])
        for r in rows:
            prefix[r] = shared

    # What follows the prefixes is padded to one width: the cache needs slots for that padding too.
    width = max(n - p for n, p in zip(lengths, prefix))
    end = max(prefix) + width
    dtype = lm.model["embed_tokens"].weight.dtype
    cache = KVCache(lm.config, B, max(end, max(lengths) + room), dtype, device)

    # Compute each prefix in the cache row of its group's first prompt; copy it to the other rows.
    if max(prefix) > 0:
        firsts = [rows[0] for rows in groups.values()]
        h, mask = embed(model, prompts, firsts, [slice(prefix[r]) for r in firsts], device)
        lm(h, cache=cache, image_mask=mask, rows=torch.tensor(firsts, device=device))
        for rows in groups.values():
            shared = prefix[rows[0]]
            for slots in (cache.keys, cache.values):                                # (L,B,K,S,d)
                slots[:, rows[1:], :, :shared] = slots[:, rows[:1], :, :shared]

    # Compute the rest of every prompt after its prefix.
    rests = [slice(p, None) for p in prefix]
    h, mask = embed(model, prompts, range(B), rests, device)                        # (B,width,D)
    prefix, length = torch.tensor(prefix, device=device), torch.tensor(lengths, device=device)
    positions = prefix[:, None] + torch.arange(width, device=device)
    h = lm(h, cache=cache, positions=positions, end=end, image_mask=mask)
    return cache, h[torch.arange(B, device=device), length - prefix - 1]


def embed(model: Llava, prompts: Prompts, rows, spans: list[slice],
          device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Embed one span of each of b prompts, which holds its image whole or not at all. Returns
    (b,T,D), right-padded, and image_mask (b,T), None if all False."""
    ids = [prompts.input_ids[r][span] for r, span in zip(rows, spans)]
    masks = [prompts.image_mask[r][span] for r, span in zip(rows, spans)]
    h, mask = model.language_model.embed(pad_sequence(ids, batch_first=True).to(device)), None
    if any(m.any() for m in masks):
        mask = pad_sequence(masks, batch_first=True).to(device)
        h = model.merge(h, prompts.image_embeds[[prompts.image_index[r] for r in rows]], mask)
    return h, mask


def shared_prefix(input_ids: list[Tensor], image_mask: list[Tensor]) -> int:
    """Longest shared prefix. Always leaves one token per prompt and never splits an image."""
    n = min(len(ids) for ids in input_ids) - 1
    same = torch.ones(n, dtype=torch.bool, device=input_ids[0].device)
    for ids, mask in zip(input_ids, image_mask):
        same &= (ids[:n] == input_ids[0][:n]) & (mask[:n] == image_mask[0][:n])
    n = int(same.cumprod(0).sum())
    splits_image = image_mask[0][:n].any() and image_mask[0][n:].any()
    if splits_image:
        n = int(image_mask[0].int().argmax())           # end before the image
    return n
