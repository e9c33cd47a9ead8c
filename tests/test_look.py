"""look/: each number of the page by a slow independent computation, and the page in a real browser."""
import base64
import json
import math
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import ROOT, call
from PIL import Image
from test_mir import definition
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.flags import UserError
from common.text import is_word, show_token
from data import ImageProcessor
from evaluate import Assistant
from hub.checkpoint import save_checkpoint
from hub.configs import load_processor
from hub.released import load_llm, load_vision
from hub.tokenizer import load_tokenizer
from look.gather import answer, gather
from look.page import convert, pack, write_page
from look.runs import group_runs, overlay_curves
from methods.basic import supervision_degree
from methods.vdep import reconstruction_loss
from methods.vista import alignment_loss
from model import Decoder, DecoderConfig, Llava, Projector, VisionConfig, ViT, rotary, rotate

WORDS = ["<unk>", "<s>", "</s>", "▁cat", "▁tri", "at", "▁", "<0x0A>", "<0xE2>", "▁سلام", "▁🙂", "▁a",
         "▁" + "long" * 40, "▁USER:", "▁ASSISTANT:", "</script>", "▁What", "▁is", "▁this?", "▁The",
         "▁and", "\u0007"]


def random_assistant(side: int = 3, moca: bool = True, tokenizer: Tokenizer | None = None, **decoder) -> Assistant:
    """A small random model with `side` × `side` patches, and a tokenizer with odd tokens."""
    if tokenizer is None:
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)},
                                               unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        tokenizer.add_special_tokens([AddedToken(t, special=True)
                                      for t in ("<unk>", "<s>", "</s>")])
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "moca": moca, **decoder}
    # padded, as released matrices are
    config = DecoderConfig(tokenizer.get_vocab_size() + 3, **shape)
    model = Llava(ViT(VisionConfig(16, 32, 3, 2, 8 * side, 8)), Projector(16, config.hidden_size),
                  Decoder(config))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name and "weight" in name
                              or ".u" in name else 0.0, std=0.25)
    return Assistant(model.eval(), tokenizer, ImageProcessor(8 * side, 8 * side), "v1", "4.31",
                     True)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return random_assistant()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    image = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
    image.paste((200, 30, 30), (5, 5, 20, 20))
    return image


@pytest.fixture(scope="module")
def seen(assistant, picture) -> dict:
    look = gather(assistant, "random", picture, "What is this?", max_new=5)
    return convert(look, torch.Tensor.tolist, lambda picture: None)


def by_hand(a: Assistant, ids: torch.Tensor, image: torch.Tensor, picture: Image.Image):
    """States (L+1 of (T,D)) and attention (L of (H,T,T)), one
    layer after the other with full attention matrices."""
    lm, T, c = a.model.language_model, len(ids), a.model.language_model.config
    x = lm.model["embed_tokens"].weight[ids].clone()
    x[image] = a.model.embed_images(a.processor(picture, True)[None])[0]
    cos, sin = rotary(torch.arange(T), c.head_dim, c.rope_theta, x.dtype)
    states, attention = [x], []
    for layer, moca in zip(lm.model["layers"], lm.moca):
        y, at = layer.input_layernorm(x), layer.self_attn
        q, k, v = (p(y).view(T, -1, c.head_dim) for p in (at.q_proj, at.k_proj, at.v_proj))
        out, maps = [], []
        for head in range(c.num_attention_heads):
            group = head // (c.num_attention_heads // c.num_key_value_heads)
            scores = rotate(q[:, head], cos, sin) @ rotate(k[:, group], cos, sin).T / math.sqrt(c.head_dim)
            p = torch.zeros(T, T)
            for t in range(T):
                p[t, :t + 1] = scores[t, :t + 1].softmax(0)
            maps.append(p)
            out.append(p @ v[:, group])
        x = x + at.o_proj(torch.cat(out, dim=1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        x = torch.where(image[:, None], moca.u * x + moca.v, x)
        states.append(x)
        attention.append(torch.stack(maps))
    states[-1] = lm.model["norm"](x)
    return states, attention


@pytest.fixture(scope="module")
def reference(assistant, picture):
    """The prompt with its answer, computed by hand."""
    inside = answer(assistant, picture, "What is this?", 5)
    with torch.no_grad():
        return inside, *by_hand(assistant, inside.ids, inside.image, picture)


def close(found, wanted, tolerance=2e-5) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.as_tensor(wanted), atol=tolerance,
                               rtol=2e-4)


# ------------------------------------------------------------------------------------------ numbers
def test_attention_is_that_of_a_full_softmax_and_its_parts_sum_to_one(seen, reference):
    inside, _, attention = reference
    before = ~inside.image & (torch.arange(len(inside.ids)) < inside.rows[0])
    for layer, full in enumerate(attention):
        close(seen["attention"][layer], full.mean(0)[inside.rows][:, inside.image])
        close(seen["heads"][layer], full[:, inside.rows][:, :, inside.image])
        close(seen["to_image"][layer], full.mean(0)[inside.rows][:, inside.image].sum(1))
        to_text = full.mean(0)[inside.rows][:, inside.rows]
        close(seen["to_text"][layer], to_text)
        to_before = full.mean(0)[inside.rows][:, before].sum(1)
        close((torch.tensor(seen["to_image"][layer]) + to_text.sum(1) + to_before).tolist(),
              torch.ones(len(to_text)))


def test_nearest_words_are_those_of_brute_force_and_none_is_padding(assistant, seen, reference):
    inside, states, _ = reference
    n = assistant.tokenizer.get_vocab_size()
    E = assistant.model.language_model.model["embed_tokens"].weight.detach()
    assert len(E) > n
    for k, h in enumerate(states):
        for i, patch in enumerate(h[inside.image]):
            cosines = [float(patch @ E[w] / patch.norm() / E[w].norm()) for w in range(n)]
            order = sorted(range(n), key=lambda w: -cosines[w])[:3]
            nearest = [seen["words"][w] for w in seen["nearest"][k][i]]
            assert nearest == [show_token(assistant.tokenizer, w) for w in order]
            close(seen["cosine"][k][i], [cosines[w] for w in order])
        first = [seen["nearest"][k][i][0] for i in range(9)]
        close(seen["meaningful"][k], sum(seen["whole"][w] for w in first) / 9)


def test_a_whole_word_is_a_space_and_letters():
    words = {"▁cat": True, "▁tri": True, "▁سلام": True, "Ġcat": True, "cat": False, "▁a": False,
             "▁": False, "</s>": False, "▁x1": False, "<0x0A>": False, None: False}
    assert {w: is_word(w) for w in words} == words


def test_similarity_is_the_cosine_of_the_word_with_the_patch(assistant, seen, reference):
    inside, states, _ = reference
    E = assistant.model.language_model.model["embed_tokens"].weight.detach()
    for k, h in enumerate(states):
        for m, row in enumerate(inside.rows.tolist()):
            word = E[inside.ids[row]]
            close(seen["similarity"][k][m],
                  [float(word @ p / word.norm() / p.norm()) for p in h[inside.image]])


def test_norms_and_distances_are_those_of_every_layer(seen, reference):
    inside, states, _ = reference
    for k, h in enumerate(states):
        image, text = h[inside.image], h[inside.rows]
        close(seen["image_norm"][k], sum(float(t.pow(2).sum().sqrt()) for t in image) / len(image))
        close(seen["text_norm"][k], sum(float(t.pow(2).sum().sqrt()) for t in text) / len(text))
        close(seen["patch_norm"][k], image.norm(dim=1))
        if k:
            alpha = 1 / text.norm(dim=1).mean()
            assert seen["distance"]["without α"][k - 1] == pytest.approx(definition(image, text), rel=1e-3)
            assert seen["distance"]["with α"][k - 1] == pytest.approx(definition(alpha * image, alpha * text), rel=1e-3)


def test_the_plane_holds_the_two_directions_of_most_variance(seen, reference):
    inside, states, _ = reference
    for k, h in enumerate(states):
        x = torch.cat([h[inside.image], h[inside.rows]]).double()
        _, s, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        close(torch.tensor(seen["pca"][k]).abs().tolist(),
              ((x - x.mean(0)) @ vectors[:2].T).abs().float(), 1e-4)
        close(seen["pca_share"][k], s[:2].pow(2).sum().item() / s.pow(2).sum().item())


def test_traces_add_up_to_what_the_objectives_compute(assistant, seen, reference):
    inside, states, attention = reference
    m, T = len(inside.ids) - inside.answer, len(inside.ids)
    answers = torch.arange(T)[None] >= inside.answer
    total, _ = alignment_loss(states[0][None], answers, states[-1][inside.image][-1:])
    assert sum(seen["vista"]["f(t) d"]) / m == pytest.approx(total.item(), rel=1e-4)
    total, _ = reconstruction_loss(states[-1][inside.image][None], states[0][inside.image][None])
    assert sum(seen["vdep"][1:]) / 8 == pytest.approx(total.item(), rel=1e-4) and seen["vdep"][0] is None
    rows = sum(layer.mean(0) for layer in attention[:2])[inside.rows][:, inside.image]          # L/2 = 2 layers
    close(seen["degree"], supervision_degree(rows[None], torch.ones(1, len(rows), dtype=torch.bool))[0])
    for name in "uv":
        for share, q in (("5 %", 0.05), ("50 %", 0.5), ("95 %", 0.95)):
            for layer, found in zip(assistant.model.language_model.moca, seen["moca"][name][share]):
                ordered = sorted(getattr(layer, name).tolist())
                low = int(q * 23)
                close(found, ordered[low] + (q * 23 - low) * (ordered[low + 1] - ordered[low]))


def test_each_tokens_distance_is_to_the_last_patch_and_weighs_by_its_place(seen, reference):
    inside, states, _ = reference
    last = states[-1][inside.image][-1]
    words = states[0][inside.answer:]
    for t, word in enumerate(words):
        distance = sum(float(a - b) ** 2 for a, b in zip(word, last)) / len(last)
        assert seen["vista"]["d"][t] == pytest.approx(distance, rel=1e-4)
        assert seen["vista"]["f(t) d"][t] == pytest.approx(distance * (t + 1) / len(words),
                                                           rel=1e-4)


def test_the_answer_is_the_most_likely_token_at_every_place(assistant, seen, reference):
    inside, states, _ = reference
    head = assistant.model.language_model.lm_head
    for position in range(inside.answer, len(inside.ids)):
        assert int(head(states[-1][position - 1]).argmax()) == int(inside.ids[position])
    words = [assistant.tokenizer.id_to_token(i) for i in inside.ids[inside.answer:].tolist()]
    assert len(words) in range(1, 6) and seen["answer"].split() == [w.strip("▁") for w in words if w not in (
        "<unk>", "<s>", "</s>", None)]
    assert seen["prompt_rows"] == len(inside.rows) - len(words) == int((inside.rows < inside.answer).sum())


def test_the_picture_is_the_one_that_the_model_gets(assistant):
    # of the model's size: nothing is scaled
    image = Image.effect_noise((24, 24), 80).convert("RGB")
    shown = gather(assistant, "random", image, "What is this?", max_new=1)["picture"]
    assert shown.tobytes() == image.tobytes()


def test_single_heads_are_those_of_the_questions_last_token_first(assistant, picture, seen, monkeypatch):
    every = seen["head_rows"]
    assert every == list(range(len(seen["tokens"])))
    # two tokens of 4 layers, 4 heads, 9 patches
    monkeypatch.setattr("look.gather.HEAD_NUMBERS", 2 * 4 * 4 * 9)
    few = gather(assistant, "random", picture, "What is this?", max_new=5)
    last = seen["prompt_rows"] - 1
    assert few["head_rows"] == [last, last + 1]
    close(few["heads"][:, :, 0].tolist(),
          [[head[last] for head in layer] for layer in seen["heads"]])


def test_tsne_is_scikit_learns_of_every_layers_tokens(assistant, picture, reference):
    manifold = pytest.importorskip("sklearn.manifold")
    inside, states, _ = reference
    shown = gather(assistant, "random", picture, "What is this?", max_new=5, tsne=True)["tsne"]
    n = int(inside.image.sum()) + len(inside.rows)
    assert shown.shape == (len(states), n, 2) and shown.isfinite().all()
    tokens = torch.cat([inside.states[2][inside.image], inside.states[2][inside.rows]])
    wanted = manifold.TSNE(perplexity=(n - 1) / 3, random_state=0).fit_transform(tokens.numpy())
    close(shown[2].tolist(), wanted)


def test_without_scikit_learn_one_line_says_what_to_do(assistant, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match="--tsne needs scikit-learn: pip install scikit-learn"):
        gather(assistant, "random", picture, "What is this?", max_new=1, tsne=True)


def test_a_released_folder_shows_the_numbers_of_the_checkpoint_it_was_made_from(picture, tmp_path):
    torch.manual_seed(0)
    clip, llm = ROOT / "toy/clip", ROOT / "toy/llm"
    model = Llava(load_vision(clip, torch.float32), Projector(96, 96), load_llm(llm, torch.float32))
    config = {"stage": "finetune", "step": 1, "steps": 1, "template": "v1", "pad": True,
              "after_special": "4.31", "vision": str(clip), "llm": str(llm)}
    ours, exported = tmp_path / "run/finetune-1", tmp_path / "llava-hf"
    save_checkpoint(ours, model, {n for n, _ in model.named_parameters()}, config, {})
    assert call("hub", "export", ours, exported).returncode == 0
    picture.save(tmp_path / "a.png")
    done = call("look", "--ckpt", ours, exported, "--image", tmp_path / "a.png", "--prompt",
                "What colour is it?", "--out", tmp_path / "page.html", "--json",
                tmp_path / "numbers.json", "--png", tmp_path / "maps")
    assert done.returncode == 0, done.stderr
    one, other = json.loads((tmp_path / "numbers.json").read_text())
    assert one.pop("name") == str(ours) and other.pop("name") == str(exported)
    assert one == other and len(one["nearest"]) == 5
    maps = [sorted(p.name for p in (tmp_path / "maps" / f).iterdir())
            for f in ("1-finetune-1", "2-llava-hf")]
    assert maps[0] == maps[1] and "attention-layer04.png" in maps[0] and "similarity-layer00.png" in maps[0]


def test_the_second_answer_sees_words_in_the_images_place(assistant, seen, reference, monkeypatch):
    """Greedy, one token at a time, with the embeddings of the
    nearest words where the patches were, without MoCa."""
    inside, states, _ = reference
    lm, n = assistant.model.language_model, assistant.tokenizer.get_vocab_size()
    E = lm.model["embed_tokens"].weight.detach()
    ids = inside.ids[:inside.answer].tolist()
    for position, patch in zip(inside.image.nonzero()[:, 0].tolist(), states[0][inside.image]):
        ids[position] = max(range(n), key=lambda w: float(patch @ E[w] / E[w].norm()))
    said = []
    while len(said) < 32:
        with torch.no_grad():
            token = int(lm.lm_head(lm(E[torch.tensor([ids + said])]))[0, -1].argmax())
        if token == 2:
            break
        said.append(token)
    assert seen["answer_with_words"] == assistant.tokenizer.decode(said).strip()


def test_tokens_are_shown_with_their_space_and_odd_ones_as_the_vocabulary_spells_them(seen):
    toy, llama = load_tokenizer(ROOT / "toy/llm"), load_tokenizer(ROOT / "tests/fixtures/tokenizers/llama")
    assert show_token(toy, toy.token_to_id("▁circle")) == " circle" and show_token(toy, toy.token_to_id("at")) == "at"
    assert show_token(llama, llama.token_to_id("<0x0A>")) == "\n" and show_token(llama, 2) == "</s>"
    assert show_token(llama, llama.token_to_id("<0xE2>")) == "<0xE2>"
    assert seen["tokens"][seen["prompt_rows"] - 1].strip() == "ASSISTANT:"


# ---------------------------------------------------------------------------------- the page's data
def unpack(packed: dict) -> torch.Tensor:
    """As the page does it."""
    raw = base64.b64decode(packed["data"])
    if packed["type"] == "uint32":
        return torch.tensor(struct.unpack(f"<{len(raw) // 4}I", raw)).view(packed["shape"])
    low, high = (torch.frombuffer(bytearray(base64.b64decode(packed[k])), dtype=torch.float32)
                 for k in ("low", "high"))
    rows = torch.tensor(list(raw)).view(len(low), -1)
    return (low[:, None] + (high - low)[:, None] * rows / 255).view(packed["shape"])


def test_packing_moves_no_number_by_more_than_a_510th_of_its_row():
    torch.manual_seed(0)
    t = torch.randn(3, 2, 50) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    reach = t.amax(-1, keepdim=True) - t.amin(-1, keepdim=True)
    assert ((unpack(pack(t)) - t).abs() <= reach / 509).all()
    assert torch.equal(unpack(pack(torch.full((2, 3), 7.0))), torch.full((2, 3), 7.0))
    whole = torch.tensor([[0, 70000], [5, 3]])
    assert torch.equal(unpack(pack(whole)), whole)


def test_seeds_make_a_band_and_a_running_run_is_read_as_far_as_it_is(tmp_path):
    for seed, lines in ((1, 3), (2, 2)):
        run = tmp_path / f"ce-{seed}"
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"seed": seed, "out": str(run), "loss": "ce",
                                                  "moca": False}))
        rows = [{"stage": "pretrain", "step": s, "ce": float(s * seed), "lr": 1.0}
                for s in range(1, lines + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows)
                                           + '{"stage": "pretr')
    group, = group_runs([tmp_path / "ce-1", tmp_path / "ce-2"])
    assert group["stages"]["pretrain"]["ce"] == {"x": [1, 2, 3], "y": [1.5, 3, 3], "low": [1, 2, 3],
                                                 "high": [2, 4, 3]}
    assert group["finished"] == 0 and group["accuracy"] == {}
    long = overlay_curves([{s: float(s) for s in range(1, 1001)}])
    assert long["x"][:2] == [5, 10] and long["y"][:2] == [3, 8] and len(long["x"]) == 200


def test_results_of_seeds_are_means_with_their_deviation(tmp_path):
    for seed, right, layers in ((1, 60.0, [1.0, 2.0]), (2, 70.0, [3.0, 4.0]),
                                (3, 80.0, [5.0, 9.0])):
        run = tmp_path / f"ce-{seed}"
        run.mkdir()
        (run / "run.json").write_text(json.dumps({"seed": seed, "out": str(run), "loss": "ce",
                                                  "moca": True}))
        (run / "metrics.jsonl").write_text('{"stage": "finetune", "step": 1, "ce": 1.0}\n')
        (run / "results.json").write_text(json.dumps({
            "accuracy": {"test": {"colour": right}}, "shuffled": {"test": {"colour": right / 2}},
            "stages": {"finetune": {"layers": layers}}}))
    group, = group_runs([tmp_path / f"ce-{seed}" for seed in (1, 2, 3)])
    assert group["name"] == "ce + MoCa" and group["finished"] == 3
    assert group["accuracy"] == {"test": {"colour": [70.0, 10.0]},
                                 "test, images shuffled": {"colour": [35.0, 5.0]}}
    assert group["mir_layers"] == {"finetune": [3.0, 5.0]}


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


def test_bad_flags_are_one_line():
    for flags in ([], ["--ckpt", "x", "--run", "y"], ["--ckpt", "x"],
                  ["--data", "x", "--watch", "3"],
                  ["--run", "nowhere"]):
        done = call("look", *flags)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


# ------------------------------------------------------------------------------------- in a browser
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get "
                                                            "install chromium")


@pytest.fixture(scope="module")
def large() -> Assistant:
    """LLaVA-7B's shape as a page sees it: 576 patches, 32
    layers and the projector, 32 heads, 32,000 words."""
    llama = load_tokenizer(ROOT / "tests/fixtures/tokenizers/llama")
    return random_assistant(24, moca=False, tokenizer=llama, hidden_size=64, intermediate_size=64,
                            num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)


@pytest.fixture(scope="module")
def pages(assistant, large, picture, tmp_path_factory) -> dict[str, Path]:
    """A page of two odd checkpoints side by side, one of 7B's shape, one of the toy's parts."""
    folder = tmp_path_factory.mktemp("pages")
    toy = Llava(load_vision(ROOT / "toy/clip"), Projector(96, 96), load_llm(ROOT / "toy/llm"))
    toy = Assistant(toy.eval(), load_tokenizer(ROOT / "toy/llm"), load_processor(ROOT / "toy/clip"),
                    "v1", "4.31", True)
    odd = gather(assistant, "out/odd", picture, "What is this?", 5)
    odd["tokens"][0:3], odd["words"][0:3] = [" سلام", " 🙂🙂", "</script>"], [WORDS[12], "</script><b>", "سلام"]
    looks = {"odd": [odd, gather(random_assistant(4, moca=False), "out/other", picture,
                                 "What is this cat?", 7)],
             "large": [gather(large, "7b", picture.resize((500, 400)), "What is in this picture?",
                              20)],
             "toy": [gather(toy, "toy", picture, "What colour is the circle?", 4)]}
    for name, look in looks.items():
        write_page(folder / f"{name}.html", f"“{name}” </title>", look)
    return {name: folder / f"{name}.html" for name in looks}


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("name", ["odd", "large", "toy"])
@pytest.mark.parametrize("width, dark", [(1400, False), (390, True)])
def test_the_page_opens_and_follows_the_pointer_without_a_complaint(pages, name, width, dark, tmp_path):
    browser = Browser(width, 900, dark)
    try:
        browser.open(pages[name])
        assert browser.run("document.querySelectorAll('.card canvas').length") >= 3
        before = browser.run("document.getElementById('reading').textContent")
        browser.hover(".pair canvas", 0.45, 0.4)
        assert "patch in row" in browser.run("document.getElementById('reading').textContent")
        for key in "[[]":
            browser.press(key)
        browser.hover(".tokens button", 0.5, 0.5)
        assert browser.run("document.getElementById('reading').textContent") != before
        for kind in ("similarity", "norm", "degree", "vdep", "attention"):
            browser.run(f"document.getElementById('map').value = '{kind}'; "
                        "document.getElementById('map').dispatchEvent(new Event('change'))")
            browser.settle()
        browser.run("document.getElementById('head').value = 1; "
                    "document.getElementById('head').dispatchEvent(new Event('input'))")
        browser.hover(".chart svg", 0.3, 0.5)
        assert browser.run("document.documentElement.scrollWidth") <= width, "the page is wider than the window"
        browser.screenshot(tmp_path / "page.png")
        assert browser.complaints == []
    finally:
        browser.close()


@pytest.mark.slow
@needs_browser
def test_a_console_error_or_a_request_is_noticed(tmp_path):
    (tmp_path / "bad.html").write_text("<script>console.error('no'); "
                                       "fetch('http://127.0.0.1:9/x').catch(() => 0); "
                                       "setTimeout(() => { throw new Error('late') })</script>")
    browser = Browser()
    try:
        browser.open(tmp_path / "bad.html")
        said = " ".join(browser.complaints)
        assert "no" in said and "127.0.0.1" in said and "late" in said
    finally:
        browser.close()


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_of_training_data_opens_without_a_complaint_and_fits(small_world, tmp_path, width):
    done = call("hub", "check", small_world / "finetune.json", "--images", small_world / "images", "--llm", "toy/llm",
                "--vision", "toy/clip", "--show", "3", "--vdep", "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    browser = Browser(width, 900)
    try:
        browser.open(tmp_path / "page.html")
        assert browser.run("document.querySelectorAll('img').length") == 6
        assert browser.run("[...document.images].every(image => image.naturalWidth > 0)")
        assert browser.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
        assert not browser.complaints, browser.complaints
    finally:
        browser.close()


@pytest.mark.slow
@needs_browser
def test_the_page_reads_out_the_numbers_that_were_gathered(assistant, picture, seen, tmp_path):
    write_page(tmp_path / "page.html", "one",
               [gather(assistant, "random", picture, "What is this?", max_new=5)])
    row, layer, patch, browser = 2, 3, 4, Browser()
    try:
        fragment = f"#token=p{row}&layer={layer}&patch={patch}"
        browser.open(tmp_path / "page.html", fragment)
        said = browser.run("document.getElementById('reading').textContent")
        share, there = (float(x) for x in re.findall(r"([\d.]+) %", said))
        assert share == pytest.approx(100 * seen["to_image"][layer - 1][row], abs=0.51)
        assert there == pytest.approx(100 * seen["attention"][layer - 1][row][patch], abs=0.51)
        cells = browser.run("[...document.querySelectorAll('.card tr')].map("
                            "row => [...row.cells].map(cell => cell.textContent))")
        assert len(cells) == len(seen["nearest"])
        for k, (name, *words) in enumerate(cells):
            assert name == (f"layer {k}" if k else "projector")
            for rank, text in enumerate(words):
                word, cosine = seen["words"][seen["nearest"][k][patch][rank]], seen["cosine"][k][patch][rank]
                assert text.startswith(word.strip()[:1]) and float(text.split()[-1]) == pytest.approx(cosine, abs=0.011)
        frame = browser.run("document.querySelector('.frame').style.transform")
        assert frame == "translate(100%, 100%)", "patch 4 of nine is in the middle"
        browser.run("choose({map: 'similarity'})")
        browser.settle()
        said = browser.run("document.getElementById('reading').textContent")
        there = float(re.search(r"column 2: (-?[\d.]+),", said)[1])
        assert there == pytest.approx(seen["similarity"][layer][row][patch], abs=0.01)
        assert browser.complaints == []
    finally:
        browser.close()


@pytest.mark.slow
@needs_browser
def test_a_page_of_7b_size_is_small_and_follows_at_once(pages):
    assert pages["large"].stat().st_size < 5e6
    browser = Browser()
    try:
        browser.open(pages["large"])
        times = browser.run("""(async () => {
            const times = [], canvas = document.querySelector('.pair canvas'), box = canvas.getBoundingClientRect();
            const draw = drawHeat;
            drawHeat = (...card) => { window.redrawn = true; draw(...card); };
            for (let i = 0; i < 40; i++) {
                const begin = performance.now();
                const place = {clientX: box.left + 10 + i * 5, clientY: box.top + 50};
                canvas.dispatchEvent(new PointerEvent('pointermove', place));
                await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
                times.push(performance.now() - begin);
            }
            return times.sort((a, b) => a - b);
        })()""")
        assert times[20] < 100, f"median {times[20]:.0f} ms from a move of the pointer to the next frame"
        assert not browser.run("window.redrawn"), "only the marks move: the maps stay as they are"
        browser.press("[")
        assert browser.run("window.redrawn"), "another layer is another map"
        assert browser.complaints == []
    finally:
        browser.close()
