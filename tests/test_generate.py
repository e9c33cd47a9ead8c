"""evaluation/generate.py, where prompts share images and prefixes: the tokens are those of each prompt alone."""
import random

import pytest
import torch
from test_model import N, tiny, without_cache
from test_model import prompts as random_prompts

from evaluation.generate import generate, shared_prefix

NEW = 6
KINDS = {
    "llama": {},
    "window": {"sliding_window": 5},
    "moca": {"moca": True},
    "phi": {"norm": "layer", "hidden_act": "gelu_tanh", "gated": False, "bias": True,
            "head_bias": True, "parallel": True, "head_dim": 8, "partial_rotary_factor": 0.5,
            "num_key_value_heads": 4},
    "gemma": {"norm_plus_one": True, "hidden_act": "gelu_tanh", "embed_scale": 24 ** 0.5,
              "head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True}}


def questions():
    """(ids, masks, image_index, pixels): groups of different
    sizes with prefixes of different lengths, shuffled."""
    g = torch.Generator().manual_seed(1)

    def words(n):
        return torch.randint(3, 50, (n,), generator=g)
    system, image, after, before = words(3), torch.zeros(N, dtype=torch.long), words(4), words(2)
    # shared: up to the image's end
    prompts = [(0, [system, image, words(n)]) for n in (1, 3, 9, 2, 5)]
    prompts += [(1, [system, image,
                     words(6)])]  # alone with its image
    # 4 words more are shared
    prompts += [(2, [system, image, after, words(n)]) for n in (2, 6, 4)]
    # the image at two places
    prompts += [(3, [system, image, words(3)]), (3, [system, before, image, words(2)])]
    # the same, prompts twice
    prompts += [(4, [system, image, after])] * 2
    prompts += [(5, [system, image])] * 2                                         # the image is the end
    prompts += [(6, [words(n), image, words(2)])
                for n in (2, 3)]  # nothing is shared
    prompts += [(i, [system, words(n)]) for i, n in ((2, 4), (0, 12), (0, 7))]    # no image
    random.Random(0).shuffle(prompts)
    ids = [torch.cat(parts) for _, parts in prompts]
    masks = [torch.cat([torch.full((len(p),), p is image) for p in parts]) for _, parts in prompts]
    return ids, masks, [i for i, _ in prompts], torch.randn(7, 3, 16, 16, generator=g)


def alone(model, ids, masks, index, pixels):
    """Answer each prompt alone, by a full forward pass for
    every token. Returns answers and logits (B,new,V)."""
    answers, logits = zip(*[without_cache(model, i, m, pixels[n], NEW)
                            for i, m, n in zip(ids, masks, index)])
    return list(answers), torch.stack(logits)


def spy(monkeypatch, module):
    """Return a list that collects every output of a module."""
    seen, forward = [], module.forward

    def keep(*args, **named):
        seen.append(forward(*args, **named))
        return seen[-1]
    monkeypatch.setattr(module, "forward", keep)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shared_changes_no_token(kind, monkeypatch):
    model = tiny(torch.float32, **KINDS[kind])
    ids, masks, index, pixels = questions()
    wanted, logits = alone(model, ids, masks, index, pixels)
    assert len({tuple(a) for a in wanted}) > 6, "if all answers were equal, the test would prove nothing"
    seen = spy(monkeypatch, model.language_model.lm_head)
    assert generate(model, ids, pixels, NEW, masks, image_index=index) == wanted
    torch.testing.assert_close(torch.stack(seen, dim=1), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_generate_of_the_model_gives_the_same_answers(kind):
    model = tiny(torch.float32, **KINDS[kind])
    ids, masks, index, pixels = questions()
    free = generate(model, ids, pixels, NEW, masks, image_index=index)
    for eos in (None, free[0][2]):
        answers = generate(model, ids, pixels, NEW, masks, eos, index)
        plain = [model.generate(ids[r], pixels[index[r]][None], masks[r], NEW, eos)
                 for r in range(len(ids))]
        assert answers == plain


@pytest.mark.parametrize("kind", ["llama", "moca"])
def test_neither_order_nor_batch_size_changes_a_token(kind):
    model = tiny(torch.float32, **KINDS[kind])
    ids, masks, index, pixels = questions()
    wanted = generate(model, ids, pixels, NEW, masks, image_index=index)
    for size in (1, 2, 3, 7, len(ids)):
        order = random.Random(size).sample(range(len(ids)), len(ids))
        for s in range(0, len(ids), size):
            rows = order[s:s + size]
            # only theirs, in another order
            images = sorted({index[r] for r in rows}, reverse=True)
            answers = generate(model, [ids[r] for r in rows], pixels[images], NEW,
                               [masks[r] for r in rows],
                               image_index=torch.tensor([images.index(index[r]) for r in rows]))
            assert answers == [wanted[r] for r in rows]


def test_without_an_index_each_prompt_has_its_own_image():
    model = tiny(torch.float32)
    ids, masks, index, pixels = questions()
    wanted = generate(model, ids, pixels, NEW, masks, image_index=index)
    assert generate(model, ids, pixels[index], NEW, masks) == wanted


def test_the_same_question_about_two_images_has_two_answers():
    model = tiny(torch.float32)
    ids, masks, pixels = random_prompts([12, 12])
    ids[1] = ids[0]
    a, b = generate(model, ids, pixels.float(), NEW, masks, image_index=[1, 0])
    assert a != b
    assert [b, a] == generate(model, ids, pixels.float(), NEW, masks, image_index=[0, 1])
    assert [a, a] == generate(model, ids, pixels.float(), NEW, masks, image_index=[1, 1])


def test_an_image_is_encoded_once_and_what_its_questions_share_is_computed_once(monkeypatch):
    model = tiny(torch.float32)
    ids, masks, pixels = random_prompts([2 + N + 3] * 6 + [5], without_image=[6])
    for i in range(7):
        ids[i][:2] = ids[0][:2]
        # so nothing more is shared
        ids[i][2 + N * masks[i].any()] = i + 3
    encoded, decoded = spy(monkeypatch, model.vision_tower), spy(monkeypatch, model.language_model)
    generate(model, ids, pixels[:2].float(), 3, masks, image_index=[0, 1, 0, 0, 1, 0, 0])
    assert [len(out) for out in encoded] == [2]
    assert [tuple(out.shape[:2]) for out in decoded] == [(3, 2 + N), (7, 3), (7, 1),
                                                         (7, 1)]  # text shares apart


def test_text_alone_encodes_no_image(monkeypatch):
    model = tiny(torch.float32)
    ids, masks, pixels = random_prompts([5, 9], without_image=[0, 1])
    encoded = spy(monkeypatch, model.vision_tower)
    generate(model, ids, pixels[:1].float(), 2, masks, image_index=[0, 0])
    assert not encoded


def test_answers_end_at_different_steps_and_decoding_with_the_last_of_them(monkeypatch):
    model = tiny(torch.float32)
    ids, masks, index, pixels = questions()
    free = generate(model, ids, pixels, 16, masks, image_index=index)
    decoded = spy(monkeypatch, model.language_model)
    for end in sorted({token for answer in free for token in answer})[::4]:
        ended = [r for r, answer in enumerate(free) if end in answer]
        for rows in (range(len(ids)), ended):
            del decoded[:]
            stopped = generate(model, [ids[r] for r in rows], pixels, 16, [masks[r] for r in rows],
                               end,
                               [index[r] for r in rows])
            assert stopped == [free[r][:free[r].index(end)] if end in free[r] else free[r]
                               for r in rows]
            steps = max(free[r].index(end) if end in free[r] else 15 for r in rows)
            assert len(decoded) == 2 + steps, "the prefix, the rest, then one a step until the last end token"


def test_a_single_new_token_needs_no_decoding(monkeypatch):
    model = tiny(torch.float32)
    ids, masks, index, pixels = questions()
    wanted = generate(model, ids, pixels, NEW, masks, image_index=index)
    decoded = spy(monkeypatch, model.language_model)
    assert generate(model, ids, pixels, 1, masks, image_index=index) == [a[:1] for a in wanted] and len(decoded) == 2


IMAGE = [0] * N
# prompts, the first image position in each (None: no image), length of their shared prefix
CASES = {
    "one alone keeps its last token, whose logits begin the answer": ([[1, 2, 3]], [None], 2),
    "one token alone shares nothing": ([[1]], [None], 0),
    "the same prompt twice": ([[1, *IMAGE, 5, 6]] * 2, [1, 1], 1 + N + 1),
    "one is the beginning of the other": ([[1, *IMAGE, 5, 6, 7], [1, *IMAGE, 5]], [1, 1], 1 + N),
    "questions differ in their second word": ([[1, *IMAGE, 5, 6, 7], [1, *IMAGE, 5, 8, 7]], [1, 1],
                                              1 + N + 1),
    "three, of which two share more": ([[1, *IMAGE, 5, 6, 7], [1, *IMAGE, 5, 6, 9], [1, *IMAGE, 8, 6]], [1] * 3, 1 + N),
    "nothing": ([[1, *IMAGE, 5], [2, *IMAGE, 5]], [1, 1], 0),
    "the image ends the prompt, and stays whole": ([[1, 2, *IMAGE]] * 2, [2, 2], 2),
    "images at two places": ([[1, *IMAGE, 5, 6], [1, 2, *IMAGE, 6]], [1, 2], 1),
    "images one token apart, the same ids": ([[0, *IMAGE, 0, 0], [0, 0, *IMAGE, 0]], [1, 2], 1),
    "a word that has the id of an image position": ([[1, *IMAGE, 0, 6], [1, *IMAGE, 0, 7]], [1, 1],
                                                    1 + N + 1)}


@pytest.mark.parametrize("case", CASES)
def test_the_shared_prefix_of(case):
    rows, firsts, shared = CASES[case]
    masks = [torch.zeros(len(r), dtype=torch.bool) for r in rows]
    for mask, first in zip(masks, firsts):
        if first is not None:
            mask[first:first + N] = True
    assert shared_prefix([torch.tensor(r) for r in rows], masks) == shared
