"""A conversation in the terminal: several turns about one image, answered token by token.

Before each answer the model reads all that was said, in its template. What the cache holds of that
is not computed again.
"""
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.flags import UserError
from common.images import open_image
from data import IMAGE, encode, eos_id
from evaluation.generate import shared_prefix
from model import KVCache

HELP = "Ask about the image. /image FILE takes another one, /reset starts again, Ctrl-D ends."


class Chat:
    """A conversation about one image. assistant: evaluate.Assistant; longest: tokens an answer."""
    def __init__(self, assistant, image: Path, longest: int):
        self.assistant, self.longest = assistant, longest
        self.show(image)

    def show(self, image: Path) -> None:
        """Start again with an image. Raises UserError if it cannot be read."""
        a = self.assistant
        try:
            pixels = a.processor(open_image(image), a.pad)[None]                   # (1,3,H,W)
        except ValueError as e:
            raise UserError(f"{image}: {e}") from None
        self.pixels = pixels.to(next(a.model.parameters()).device)
        self.reset()

    def reset(self) -> None:
        """Forget what was said, keep the image."""
        self.turns = []                         # as LLaVA writes them: {from, value}
        self.past = None                        # what the model has read: cache, ids, image mask

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece. Raises UserError if the model has no room for it."""
        a, text = self.assistant, question.replace(IMAGE, "").strip()
        if not self.turns:
            text = IMAGE + "\n" + text
        turns = [*self.turns, {"from": "human", "value": text}]
        ids, _, mask = encode(turns, a.tokenizer, a.template, a.model.image_tokens,
                              after_special=a.after_special, image_first=False)
        answer, said, shown = [], "", ""
        for token in self.tokens(ids.to(self.pixels.device), mask.to(self.pixels.device)):
            answer.append(token)
            said = a.tokenizer.decode(answer).strip()
            # This mark stands for a character whose tokens are not all here yet: wait for them.
            if not said.endswith("\ufffd"):
                yield said[len(shown):]
                shown = said
        yield said[len(shown):]
        self.turns = [*turns, {"from": "gpt", "value": said.replace(IMAGE, "")}]

    @torch.inference_mode()
    def tokens(self, ids: Tensor, mask: Tensor) -> Iterator[int]:
        """Yield the ids that `Llava.generate` returns for ids (T,) and image mask (T,)."""
        model, lm = self.assistant.model, self.assistant.model.language_model
        most = lm.config.max_position_embeddings
        room = min(self.longest, most - len(ids))
        if room < 1:
            raise UserError(f"the conversation has {len(ids)} tokens, the model room for {most}: "
                            "/reset starts again")

        # A cache with room for this answer, filled with what the last one holds of this prompt.
        known, h = 0, lm.embed(ids[None])                                                  # (1,T,D)
        cache = KVCache(lm.config, 1, len(ids) + room, h.dtype, ids.device)
        if self.past is not None:
            old, old_ids, old_mask = self.past
            known = shared_prefix([ids, old_ids], [mask, old_mask])
            cache.keys[..., :known, :] = old.keys[..., :known, :]                      # (L,1,K,S,d)
            cache.values[..., :known, :] = old.values[..., :known, :]

        # Read the rest of the prompt. The image is encoded only if it is not in the cache.
        if mask[known:].any():
            h = model.merge(h, model.embed_images(self.pixels), mask[None])
        at = torch.arange(known, len(ids), device=ids.device)[None]
        h = lm(h[:, known:], cache=cache, positions=at, end=len(ids), image_mask=mask[None, known:])

        eos = eos_id(self.assistant.tokenizer, self.assistant.template)
        for position in range(len(ids), len(ids) + room):
            token = lm.lm_head(h[:, -1]).argmax(-1)                                         # (1,)
            if token.item() == eos:
                break
            yield token.item()
            at = torch.tensor([[position]], device=ids.device)
            h = lm(lm.embed(token[:, None]), cache=cache, positions=at, end=position + 1)
            ids, mask = torch.cat([ids, token]), F.pad(mask, (0, 1))
        self.past = cache, ids, mask


def talk(assistant, image: Path, longest: int) -> None:
    """Answer questions from the terminal or a pipe, until the input ends."""
    chat = Chat(assistant, image, longest)
    print(HELP, flush=True)
    try:
        while True:
            line = input("> " if sys.stdin.isatty() else "").strip()
            try:
                if line == "/reset":
                    chat.reset()
                elif line.startswith("/image "):
                    chat.show(Path(line.removeprefix("/image ").strip()).expanduser())
                elif line.startswith("/"):
                    print(HELP)
                elif line:
                    for piece in chat.ask(line):
                        print(piece, end="", flush=True)
                    print(flush=True)
            except UserError as e:
                print(f"error: {e}", flush=True)
    except (EOFError, KeyboardInterrupt):
        print(flush=True)
