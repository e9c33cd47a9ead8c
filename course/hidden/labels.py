"""From a conversation to ids, labels and masks."""
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Tokenizer

from course.hidden import item
from course.hidden.tools import size

TOKENIZER = Tokenizer.from_file(str(Path(__file__).resolve().parents[2] / "toy/llm/tokenizer.json"))
WORDS = "red circle two row Yes No What colour is the square middle objects".split()


def text(g, low=1, high=4):
    return " ".join(WORDS[size(g, 0, len(WORDS) - 1)] for _ in range(size(g, low, high)))


def turns(g, *who, image=None):
    """Turns of human and gpt with random words; <image> in the turn of that number, at its end."""
    said = [{"from": {"h": "human", "g": "gpt"}[w], "value": text(g)} for w in who]
    if image is not None:
        said[image]["value"] += "\n<image>"
    return said


def joined(pieces):
    return "".join(text for text, _ in pieces)


def written(f, said, template):
    """Pieces as a list of (text, 0 or 1), neighbours of one kind joined."""
    kinds = groupby((p for p in f.pieces(said, template) if p[0]), lambda piece: bool(piece[1]))
    return [(joined(pieces), answer) for answer, pieces in kinds]


def encoded(f, g, **options):
    """encode() of fixed pieces, whatever the submission's pieces() does."""
    script = [(text(g) + "<image>" + text(g), False), (" " + text(g) + "</s>", True),
              (text(g), False), (" " + text(g) + "</s>", True)]
    f.encode.__globals__["pieces"] = lambda *a, **k: script
    return f.encode([], TOKENIZER, "v1", size(g, 2, 5), **options)


def answers(r):
    """View of pieces: the supervised texts alone."""
    return [a for a, flag in zip(r[::2], r[1::2]) if flag]


def all_text(r):
    """View of pieces: all their texts, wherever one ends and the next begins."""
    return [torch.cat(r[::2])]


def lengths(r):
    return [torch.tensor([float(len(x)) for x in r])]


@item(15, view=all_text)
def vicuna_text(f, g):
    """v1 is SYSTEM USER: question ASSISTANT: answer</s>USER: …; the system prompt comes once."""
    return written(f, turns(g, *"hghg"), "v1")


@item(15, view=answers)
def vicuna_answers(f, g):
    """v1 supervises from the space before an answer through its </s>, and nothing else."""
    return written(f, turns(g, *"hghg"), "v1")


@item(10)
def plain(f, g):
    """plain is the image, then the caption and a newline, supervised; the request is dropped."""
    return written(f, turns(g, *"hg", image=0), "plain"), written(f, turns(g, *"hg"), "plain")


@item(10, view=lambda r: [x[-60:] for x in r])
def image_first(f, g):
    """<image> moves to the front of its turn, before a newline; not with image_first=False."""
    said = turns(g, *"hgh", image=2)
    return joined(f.pieces(said, "v1")), joined(f.pieces(said, "v1", image_first=False))


@item(10, view=lambda r: [len(r[0]) - r[1], r[2]])
def order_of_turns(f, g):
    """An answer that comes first is dropped; a last question stays open for its answer."""
    said = turns(g, *"hg")
    whole, cut = (joined(f.pieces(t, "phi3")) for t in (said, turns(g, "g") + said))
    return whole, len(cut), f.pieces(turns(g, "h"), "phi3")[-1][0]


@item(5, view=all_text)
def later_turns(f, g):
    """A template's `later` is written in front of every question but the first."""
    return written(f, turns(g, *"hghg"), "phi3"), written(f, turns(g, *"hghg"), "llama_2")


@item(10)
def ids(f, g):
    """Ids are BOS, then each chunk of text around <image> by itself, PLACEHOLDER for the image."""
    return encoded(f, g)[0]


@item(10, view=lambda r: [r[0][r[0] != -100], (r[0] != -100).double()])
def labels(f, g):
    """A label is the id at its position if the assistant wrote its first character, else -100."""
    return encoded(f, g)[1]


@item(5, view=lambda r: [r[0], torch.tensor([float(len(r[0]) - len(r[1]))])])
def image_mask(f, g):
    """image_mask is True at the image positions, as long as ids and labels."""
    result = encoded(f, g)
    return result[2], result[0]


@item(5, view=lengths)
def length(f, g):
    """max_length cuts the end; an image that does not fit whole goes, with all that follows."""
    state = g.get_state()
    at = encoded(f, g)[2].nonzero()[0].item()
    limits = at - 1, at, at + 1, at + 7, 2, None
    return [encoded(f, g.set_state(state), max_length=limit) for limit in limits]


@item(5)
def tokens_that_see_the_image(f, g):
    """text_after_image and answer_tokens leave out padding, the image, and all before it."""
    B, T = 4, size(g, 8, 12)
    ends, start = torch.tensor([[T], [T - 2], [5], [T]]), torch.tensor([[1], [2], [3], [T]])
    at = torch.arange(T)
    image, there = (at >= start) & (at < start + 2), at < ends
    label = torch.randint(-1, 2, (B, T), generator=g).clamp(min=0) * 105 - 100
    batch = f.Batch(at.expand(B, T), label, image & there, there, torch.zeros(B), start[:, 0] < T,
                    there[:, 0])
    return batch.text_after_image(), batch.answer_tokens()
