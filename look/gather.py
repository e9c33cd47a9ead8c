"""What happens in a checkpoint while it answers one question about one picture: see `gather`.

Layer 0 is what enters the language model: the projector's output and word embeddings. Layer L is
taken after the final norm, the others as they leave the layer (as in mir.py). Attention is that of
the text after the image.

N image tokens · M text tokens after the image · T all tokens · L layers · H heads · D width · V words
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import mir
from common.flags import UserError
from common.text import is_word, show_token
from data import IMAGE, eos_id
from evaluate import Assistant
from evaluation.questions import Sample
from methods.basic import supervision_degree

HEAD_NUMBERS = 600_000      # of single heads: 32 layers, 32 heads, 576 patches: 590,000 a token


@dataclass
class Inside:
    """One prompt, its answer, and what every layer made of them."""
    ids: Tensor                 # (T,) prompt and answer, its end token too: training supervises it
    image: Tensor               # (T,) bool, the image positions
    rows: Tensor                # (M,) positions of the text after the image
    answer: int                 # position of the answer's first token
    states: list[Tensor]        # L + 1 of (T,D) float32
    attention: Tensor           # (L,H,M,T) from the rows to every position


@torch.inference_mode()
def answer(a: Assistant, image: Image.Image, prompt: str, max_new: int) -> Inside:
    """Answer greedily, then run prompt and answer once more and keep every layer's output."""
    lm, eos = a.model.language_model, eos_id(a.tokenizer, a.template)
    device = next(a.model.parameters()).device
    pixels = a.processor(image, a.pad)[None].to(device)                         # (1,3,H,W)
    asked, mask = a.encode(Sample(id="", prompt=prompt, image=image))
    said = a.model.generate(asked.to(device), pixels, mask.to(device), max_new, eos)
    if len(said) < max_new:
        said = [*said, eos]
    ids = torch.cat([asked, asked.new_tensor(said)]).to(device)                 # (T,)
    mask = F.pad(mask, (0, len(said))).to(device)                               # (T,)

    rows = (~mask & (mask.cumsum(0) > 0)).nonzero()[:, 0]                       # (M,)
    everywhere = torch.arange(len(ids), device=device)
    h = a.model.merge(lm.embed(ids[None]), a.model.embed_images(pixels), mask[None])    # (1,T,D)
    states, attention = [h[0].float()], []

    def watch(k: int, h: Tensor, probabilities: Tensor) -> None:
        states.append(h[0].float())
        attention.append(probabilities[0])                                      # (H,M,T)
    attend = rows[None], everywhere[None], False
    last = lm.run_layers(h, watch, attend=attend, image_mask=mask[None])
    states[-1] = lm.model["norm"](last)[0].float()
    return Inside(ids, mask, rows, len(asked), states, torch.stack(attention))


def words_of_patches(a: Assistant, inside: Inside, image_states: list[Tensor]) -> dict:
    """The 3 nearest words by cosine of every patch and layer. Rows of E without a word (released
    matrices are padded), <image> and <pad> do not count. The cosine of each text token's word with
    each patch. The answer to a prompt whose patches are their nearest words: no image for MoCa."""
    E = F.normalize(a.model.language_model.model["embed_tokens"].weight.float(), dim=1)         # (V,D)
    names = [a.tokenizer.id_to_token(i) for i in range(a.tokenizer.get_vocab_size())]
    known = [i for i, name in enumerate(names) if name not in (IMAGE, "<pad>")]
    known = torch.tensor(known, device=E.device)
    units, words = [F.normalize(h, dim=1) for h in image_states], E[known]
    nearest = [(h @ words.T).topk(3) for h in units]
    cosine, found = (torch.stack(t) for t in zip(*nearest))                     # (L+1,N,3) each
    used, numbers = known[found].unique(return_inverse=True)
    whole = torch.tensor([is_word(names[i]) for i in used.tolist()]).to(E.device)
    image = inside.image[:inside.answer]
    prompt = inside.ids[:inside.answer].masked_scatter(image, known[found[0, :, 0]])
    eos = eos_id(a.tokenizer, a.template)
    said = a.model.generate(prompt, None, torch.zeros_like(image), 32, eos)
    return {"words": [show_token(a.tokenizer, i) for i in used.tolist()], "whole": whole.tolist(),
            "nearest": numbers, "cosine": cosine, "answer_with_words": a.tokenizer.decode(said).strip(),
            "meaningful": whole[numbers[:, :, 0]].float().mean(1).tolist(),     # (L+1,)
            "similarity": torch.stack([E[inside.ids[inside.rows]] @ h.T for h in units])}       # (L+1,M,N)


def both_distances(image: list[Tensor], text: list[Tensor]) -> dict[str, list[float]] | None:
    """Fréchet distances of image (N,D) and text (M,D) tokens in layers 1..L, with α and without, or
    None for fewer than two tokens. Scaling tokens by α scales a distance by α²: computed once."""
    if min(len(image[0]), len(text[0])) < 2:
        return None
    _, plain = mir.modality_integration_rate(list(zip(image[1:], text[1:])), normalise=False)
    alphas = [1 / t.double().norm(dim=1).mean().item() for t in text[1:]]
    return {"with α": [alpha ** 2 * d for alpha, d in zip(alphas, plain)], "without α": plain}


def principal(tokens: Tensor) -> tuple[Tensor, float]:
    """(n,D) → the first two principal components (n,2) and their share of the variance; n < D."""
    x = tokens.double() - tokens.double().mean(0)
    values, vectors = torch.linalg.eigh(x @ x.T)                                # ascending
    xy = vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp(min=0).sqrt()      # (n,2)
    sign = xy.gather(0, xy.abs().argmax(0, keepdim=True)).sign()               # farthest point: > 0
    return (xy * sign).float(), (values[-2:].sum() / values.sum().clamp(min=1e-30)).item()


def neighbours(tokens: Tensor) -> Tensor:
    """(n,D) → t-SNE (n,2). Raises UserError without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("--tsne needs scikit-learn: pip install scikit-learn, or leave it out for "
                        "PCA") from None
    tsne = TSNE(perplexity=min(30, (len(tokens) - 1) / 3), random_state=0)
    return torch.from_numpy(tsne.fit_transform(tokens.cpu().numpy()))


def traces(a: Assistant, inside: Inside) -> dict:
    """What each method's objective is about, of any checkpoint.

    degree (N,)    BASIC eq. (5), over layers 1..L/2, heads and text rows
    vdep (N,)      VDEP eq. (11): mean squared error of a patch predicted from the one before, NaN
                   for patch 0. Training differs: it has no prompt before the image
    vista          eq. (10) of the answer's tokens t = 1..m, d a mean over D, f(t) = t/m
    moca           quantiles of u and v by layer, or None"""
    k = max(1, len(inside.attention) // 2)
    shallow = inside.attention[:k].mean((0, 1))[None, :, inside.image]          # (1,M,N)
    degree = supervision_degree(shallow, torch.ones_like(shallow[..., 0], dtype=torch.bool))[0]
    h, x = inside.states[-1][inside.image], inside.states[0][inside.image]      # (N,D) each
    vdep = F.pad((h[:-1] - x[1:]).pow(2).mean(1), (1, 0), value=float("nan"))
    d = (inside.states[0][inside.answer:] - h[-1]).pow(2).mean(1)               # (m,)
    f = torch.arange(1, len(d) + 1, device=d.device) / len(d)
    moca, lm = None, a.model.language_model
    if lm.config.moca:
        moca = {"u": {}, "v": {}}
        for name, curves in moca.items():
            for q in (0.05, 0.5, 0.95):
                values = [getattr(layer, name).float().quantile(q) for layer in lm.moca]
                curves[f"{100 * q:.0f} %"] = [value.item() for value in values]
    vista = {"d": d.tolist(), "f(t) d": (f * d).tolist()}
    return {"degree": degree, "vdep": vdep, "vista": vista, "moca": moca}


@torch.inference_mode()
def gather(a: Assistant, name: str, image: Image.Image, prompt: str, max_new: int = 32,
           tsne: bool = False) -> dict:
    """Every number of the page for one checkpoint and one question, as tensors, lists and text."""
    inside, c = answer(a, image, prompt, max_new), a.model.vision_tower.config
    queries = getattr(a.model.multi_modal_projector, "queries", 0)
    grid = queries or c.num_patches                     # queries too are drawn as a square
    if queries:
        name = f"{name} (its {queries} image tokens are queries: a cell is no place in the picture)"
    image_states = [h[inside.image] for h in inside.states]                     # (N,D) a layer
    text_states = [h[inside.rows] for h in inside.states]                       # (M,D) a layer
    points = [torch.cat(pair) for pair in zip(image_states, text_states)]       # (N+M,D) a layer
    plane, shares = zip(*[principal(p) for p in points])
    to_image = inside.attention[..., inside.image]                              # (L,H,M,N)
    to_text = inside.attention.mean(1)[..., inside.rows]                        # (L,M,M)
    tokens = [show_token(a.tokenizer, i) for i in inside.ids.tolist()]
    # Single heads of the question's last token, and of as many others as there is room for.
    asked = int((inside.rows < inside.answer).sum())
    last = max(asked - 1, 0)
    order = list(range(last, len(inside.rows))) + list(range(last))
    head_rows = sorted(order[:max(1, HEAD_NUMBERS // to_image[:, :, 0].numel())])
    return {
        "name": name, "prompt": prompt, "template": a.template,
        "picture": a.processor.picture(a.processor(image, a.pad)), "prompt_rows": asked,
        "side": math.ceil(grid ** 0.5), "first": grid - a.model.image_tokens,
        "layers": len(inside.attention), "before": tokens[:int(inside.image.nonzero()[0])],
        "tokens": [tokens[i] for i in inside.rows.tolist()],
        "answer": a.tokenizer.decode(inside.ids[inside.answer:].tolist()).strip(),
        "heads": to_image[:, :, head_rows], "head_rows": head_rows, "attention": to_image.mean(1),
        "to_image": to_image.sum(-1).mean(1).tolist(), "to_text": to_text,
        **words_of_patches(a, inside, image_states), **traces(a, inside),
        "patch_norm": torch.stack([h.norm(dim=1) for h in image_states]),
        "image_norm": [h.norm(dim=1).mean().item() for h in image_states],
        "text_norm": [h.norm(dim=1).mean().item() for h in text_states],
        "distance": both_distances(image_states, text_states),
        "pca": torch.stack(plane), "pca_share": shares,
        "tsne": torch.stack([neighbours(p) for p in points]) if tsne else None}
