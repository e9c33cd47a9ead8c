"""What happens inside a checkpoint while it answers one question about one picture, as plain numbers.

    picture, prompt ─ ask ─→ prompt + greedy answer ─ run ─→ Inside: states and attention of every layer ─ gather ─→ dict

Layer 0 is what enters the language model: the projector's output and word embeddings. Layer L is taken after the final
norm, the others as they leave the layer (as in mir.py). Attention rows are computed for the text after the image alone.

Shape letters: N image tokens · M text tokens after the image · T all positions · L layers · H heads · D width · V words
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

import mir
from common.files import read_json
from common.flags import UserError
from data import IMAGE, ImageProcessor, encode, eos_id
from evaluate import Assistant
from hub.checkpoint import checkpoint_folder, is_released, load_model
from hub.tokenizer import load_tokenizer
from methods.basic import supervision_degree

WORD_STARTS = ("▁", "Ġ")            # how SentencePiece and byte-level BPE write the space before a word
NEAREST = 3                         # nearest words kept of each patch


# ------------------------------------------------------------------------------------------------ the model
def open_checkpoint(ckpt: str, vision: str | None, llm: str | None, device, dtype: torch.dtype,
                    template: str | None) -> Assistant:
    """Load a checkpoint of a run, the newest of a run's folder, or a released LLaVA. A released one does not say how it
    was asked: template v1 and square padding, unless `template` says otherwise."""
    folder, c = Path(ckpt), {"template": "v1", "after_special": "4.31", "pad": True}
    if not is_released(folder):
        folder = checkpoint_folder(ckpt)
        c = read_json(folder / "config.json")
    model = load_model(folder, vision, llm, dtype, device).eval()
    processor = folder if (folder / "preprocessor_config.json").is_file() else Path(vision)
    return Assistant(model, load_tokenizer(folder), ImageProcessor.from_folder(processor), template or c["template"],
                     c["after_special"], c["pad"])


@dataclass
class Inside:
    """One prompt, its answer, and what every layer made of them."""
    ids: Tensor                 # (T,) prompt and answer
    image: Tensor               # (T,) bool, the image positions
    rows: Tensor                # (M,) positions of the text after the image
    answer: int                 # the position of the answer's first token
    states: list[Tensor]        # L + 1 of (T,D) float32: what enters the language model, then each layer's output
    attention: Tensor           # (L,H,M,T) from the rows to every position


@torch.inference_mode()
def ask(a: Assistant, pixels: Tensor, prompt: str, max_new: int) -> tuple[Tensor, Tensor, int]:
    """Answer a prompt greedily. Returns ids (T,) of prompt and answer, the image positions (T,) bool, and where the
    answer begins. The end token is kept: it is supervised in training."""
    device = pixels.device
    text = prompt if IMAGE in prompt else f"{IMAGE}\n{prompt}"
    n = a.model.vision_tower.config.image_tokens
    ids, _, mask = encode([{"from": "human", "value": text}], a.tokenizer, a.template, n,
                          after_special=a.after_special, image_first=False)
    ids, mask = ids.to(device), mask.to(device)
    eos = eos_id(a.tokenizer, a.template)
    answer = a.model.generate(ids, pixels, mask, max_new, eos)
    if len(answer) < max_new:
        answer = [*answer, eos]
    return torch.cat([ids, ids.new_tensor(answer)]), F.pad(mask, (0, len(answer))), len(ids)


@torch.inference_mode()
def run(a: Assistant, pixels: Tensor, prompt: str, max_new: int) -> Inside:
    """Answer, then one forward pass over prompt and answer that keeps every layer's output."""
    lm = a.model.language_model
    ids, image, answer = ask(a, pixels, prompt, max_new)
    rows = (~image & (image.cumsum(0) > 0)).nonzero()[:, 0]                                 # (M,)
    h = a.model.merge(lm.embed(ids[None]), a.model.embed_images(pixels), image[None])       # (1,T,D)
    states, attention = [h[0].float()], []

    def watch(k: int, h: Tensor, layer_attention: Tensor) -> None:
        states.append(h[0].float())
        attention.append(layer_attention[0])                                                # (H,M,T)
    everywhere = torch.arange(len(ids), device=ids.device)[None]
    last = lm.run_layers(h, watch, attend=(rows[None], everywhere, False), image_mask=image[None])
    states[-1] = lm.model["norm"](last)[0].float()
    return Inside(ids, image, rows, answer, states, torch.stack(attention))


# ------------------------------------------------------------------------------------------------ words
def vocabulary(a: Assistant) -> Tensor:
    """E (V,D): the input embeddings of the words that the tokenizer knows (released matrices are padded)."""
    return a.model.language_model.model["embed_tokens"].weight[:a.tokenizer.get_vocab_size()].detach()


def nearest_words(x: Tensor, E: Tensor, k: int = NEAREST, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """The k words nearest to each of x (n,D) by cosine with E (V,D), `chunk` words at a time: ids and cosines (n,k)."""
    x = F.normalize(x.float(), dim=1)
    best, ids = x.new_full((len(x), k), -2), torch.zeros(len(x), k, dtype=torch.long, device=x.device)
    for start in range(0, len(E), chunk):
        cosine = x @ F.normalize(E[start:start + chunk].float(), dim=1).T                   # (n,chunk)
        numbers = torch.arange(start, start + cosine.shape[1], device=x.device).expand_as(cosine)
        best, order = torch.cat([best, cosine], dim=1).topk(k, dim=1)
        ids = torch.cat([ids, numbers], dim=1).gather(1, order)
    return ids, best


def is_word(piece: str) -> bool:
    """True if a vocabulary piece is a whole alphabetic word: it begins with a space and goes on with letters, two at
    least. Our proxy for BASIC's "meaningful" words: "▁tri" counts too, a person would not count it."""
    return piece.startswith(WORD_STARTS) and piece[1:].isalpha() and len(piece) > 2


def show_token(tokenizer: Tokenizer, i: int) -> str:
    """The text of one token, with the space before it; the vocabulary's own spelling of half a character."""
    piece = tokenizer.id_to_token(i) or f"<{i}>"
    text = tokenizer.decode([i], skip_special_tokens=False)
    if text == "\n":
        return text
    if not text.strip() or not text.isprintable() or "\ufffd" in text:
        return piece
    if piece.startswith("▁") and not text.startswith(" "):
        text = " " + text
    return text


def answer_with_words(a: Assistant, inside: Inside, words: Tensor, max_new: int) -> str:
    """The answer when every image token is replaced by the embedding of its nearest word, words (N,). These are words
    then, not an image: MoCa leaves them alone."""
    ids = inside.ids[:inside.answer].clone()
    ids[inside.image[:inside.answer]] = words
    out = a.model.generate(ids, None, torch.zeros_like(ids, dtype=torch.bool), max_new,
                           eos_id(a.tokenizer, a.template))
    return a.tokenizer.decode(out).strip()


# ------------------------------------------------------------------------------------------------ distances
def both_distances(image: list[Tensor], text: list[Tensor]) -> dict[str, list[float]] | None:
    """Fréchet distance of image (N,D) and text (M,D) tokens of every layer 1..L, with α and without. None where there
    are fewer than two tokens of either. Scaling all tokens by α scales the distance by α²: it is computed once."""
    if min(len(image[0]), len(text[0])) < 2:
        return None
    _, plain = mir.modality_integration_rate(list(zip(image[1:], text[1:])), normalise=False)
    alphas = [1 / t.double().norm(dim=1).mean().item() for t in text[1:]]
    return {"with α": [alpha ** 2 * d for alpha, d in zip(alphas, plain)], "without α": plain}


def principal(tokens: Tensor) -> tuple[Tensor, float]:
    """(n,D) → the first two principal components (n,2), and their share of the variance. The eigenvectors of the
    (n,n) products give them: there are fewer tokens than dimensions."""
    x = tokens.double() - tokens.double().mean(0)
    values, vectors = torch.linalg.eigh(x @ x.T)                                            # ascending
    xy = vectors[:, -2:].flip(1) * values[-2:].flip(0).clamp(min=0).sqrt()                  # (n,2)
    sign = xy.gather(0, xy.abs().argmax(0, keepdim=True)).sign()                            # the farthest point is > 0
    share = values[-2:].sum() / values.sum().clamp(min=1e-30)
    return (xy * sign).float(), share.item()


def neighbours(tokens: Tensor) -> Tensor:
    """(n,D) → t-SNE (n,2). Raises UserError without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError("--tsne needs scikit-learn: pip install scikit-learn, or leave --tsne out (PCA is shown "
                        "anyway)") from None
    perplexity = min(30, (len(tokens) - 1) / 3)
    return torch.from_numpy(TSNE(perplexity=perplexity, random_state=0).fit_transform(tokens.cpu().numpy()))


# ------------------------------------------------------------------------------------------------ traces of methods
def basic_degree(inside: Inside) -> Tensor:
    """BASIC's degree of supervision (N,), eq. (5): over the layers 1..L/2, heads and text rows."""
    k = max(1, len(inside.attention) // 2)
    attention = inside.attention[:k].mean((0, 1))[:, inside.image]                          # (M,N)
    every = torch.ones(1, len(attention), dtype=torch.bool, device=attention.device)
    return supervision_degree(attention[None], every)[0]


def vista_terms(inside: Inside) -> dict[str, list[float]]:
    """Of each answer token t = 1..m: d(x_t, S_n), eq. (10) as a mean over D, and f(t) d with f(t) = t / m."""
    x = inside.states[0][inside.answer:]                                                    # (m,D)
    S = inside.states[-1][inside.image.nonzero()[-1, 0]]                                    # (D,)
    d = (x - S).pow(2).mean(1)
    t = torch.arange(1, len(d) + 1, device=d.device)
    return {"d": d.tolist(), "f(t) d": (t / len(d) * d).tolist()}


def vdep_error(inside: Inside) -> Tensor:
    """VDEP's distance (N,) between each patch and its prediction by the patch before it, a mean over D; patch 0, which
    nothing predicts, is not a number. In training a sample of this kind is the image alone: a prompt that stands before
    the image changes it."""
    h, x = inside.states[-1][inside.image], inside.states[0][inside.image]                  # (N,D)
    error = (h[:-1] - x[1:]).pow(2).mean(1)                                                 # eq. (11)
    return F.pad(error, (1, 0), value=float("nan"))


def moca_quantiles(a: Assistant) -> dict[str, dict[str, list[float]]] | None:
    """5 %, 50 % and 95 % of the entries of u and of v in every layer; None without MoCa."""
    lm = a.model.language_model
    if not lm.config.moca:
        return None
    return {name: {f"{100 * q:.0f} %": [getattr(m, name).float().quantile(q).item() for m in lm.moca]
                   for q in (0.05, 0.5, 0.95)} for name in "uv"}


# ------------------------------------------------------------------------------------------------ all of it
@torch.inference_mode()
def gather(a: Assistant, name: str, image: Image.Image, prompt: str, max_new: int = 32, tsne: bool = False,
           distances: dict | None = None) -> dict:
    """Every number of the page for one checkpoint, as tensors, lists and text. distances: Fréchet distances from more
    than this one sample."""
    device = next(a.model.parameters()).device
    inside = run(a, a.processor(image, a.pad)[None].to(device), prompt, max_new)
    image_states = [h[inside.image] for h in inside.states]                                 # (N,D) a layer
    text_states = [h[inside.rows] for h in inside.states]                                   # (M,D) a layer
    words = words_of_patches(a, inside, image_states)
    first_choice = words.pop("ids")[0, :, 0]                                                # (N,)
    points = [torch.cat(pair) for pair in zip(image_states, text_states)]                   # (N+M,D) a layer
    planes = [principal(p) for p in points]
    c = a.model.vision_tower.config
    return {
        "name": name, "prompt": prompt, "template": a.template, "picture": seen_picture(a, image),
        "side": int(c.num_patches ** 0.5), "first": c.num_patches - c.image_tokens, "layers": len(inside.attention),
        **text_of(a, inside), **words, **attention_of(inside),
        "answer_with_words": answer_with_words(a, inside, first_choice, max_new),
        "patch_norm": torch.stack([h.norm(dim=1) for h in image_states]),                   # (L+1,N)
        "image_norm": [h.norm(dim=1).mean().item() for h in image_states],
        "text_norm": [h.norm(dim=1).mean().item() for h in text_states],
        "distance": distances or both_distances(image_states, text_states),
        "pca": torch.stack([xy for xy, _ in planes]), "pca_share": [share for _, share in planes],
        "tsne": torch.stack([neighbours(p) for p in points]) if tsne else None,
        "degree": basic_degree(inside), "vista": vista_terms(inside), "vdep": vdep_error(inside),
        "moca": moca_quantiles(a)}


def text_of(a: Assistant, inside: Inside) -> dict:
    """The tokens as text: those before the image, and those after it, of which the first `prompt_rows` were asked."""
    start = int(inside.image.nonzero()[0])
    return {"before": [show_token(a.tokenizer, i) for i in inside.ids[:start].tolist()],
            "tokens": [show_token(a.tokenizer, i) for i in inside.ids[inside.rows].tolist()],
            "prompt_rows": int((inside.rows < inside.answer).sum()),
            "answer": a.tokenizer.decode(inside.ids[inside.answer:].tolist()).strip()}


def words_of_patches(a: Assistant, inside: Inside, image_states: list[Tensor]) -> dict:
    """The nearest words of every patch in every layer, and the cosine of every text token's own word to it."""
    E = vocabulary(a)
    nearest = [nearest_words(h, E) for h in image_states]
    ids = torch.stack([i for i, _ in nearest])                                              # (L+1,N,3)
    used, numbers = ids.unique(return_inverse=True)
    whole = torch.tensor([is_word(a.tokenizer.id_to_token(i) or "") for i in used.tolist()], device=ids.device)
    asked = F.normalize(E[inside.ids[inside.rows]].float(), dim=1)                          # (M,D)
    return {"ids": ids, "words": [show_token(a.tokenizer, i) for i in used.tolist()], "whole": whole.tolist(),
            "nearest": numbers, "cosine": torch.stack([cosine for _, cosine in nearest]),   # (L+1,N,3) both
            "meaningful": whole[numbers[:, :, 0]].float().mean(1).tolist(),                 # (L+1,)
            "similarity": torch.stack([asked @ F.normalize(h, dim=1).T for h in image_states])}     # (L+1,M,N)


def attention_of(inside: Inside) -> dict:
    """Attention of the text rows: to each patch, to the image as a whole, and to each other."""
    to_image = inside.attention[..., inside.image]                                          # (L,H,M,N)
    mean = inside.attention.mean(1)                                                         # (L,M,T)
    return {"heads": to_image, "attention": to_image.mean(1), "to_image": to_image.sum(-1).mean(1).tolist(),
            "to_text": mean[..., inside.rows]}                                              # (L,M,M)


def seen_picture(a: Assistant, image: Image.Image) -> Image.Image:
    """The picture as the model gets it: padded or cropped, resized, normalisation undone."""
    return undo(a.processor, a.processor(image, a.pad))


def undo(processor: ImageProcessor, pixels: Tensor) -> Image.Image:
    """Normalised pixels (3,H,W) → the picture they show."""
    x = pixels * torch.tensor(processor.image_std)[:, None, None] + torch.tensor(processor.image_mean)[:, None, None]
    return Image.fromarray((x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
