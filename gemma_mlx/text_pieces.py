"""Text of an answer while its tokens still come: pieces that stand, whatever follows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma_mlx.data.processor import Processor

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet one."""


class TextPieces:
    """Token ids in, text out, as soon as it is certain; the pieces together are what decoding all ids at once gives.

    A character may take several tokens, one for each of its bytes: what they say is known when another token follows,
    since one bad byte spoils all bytes beside it. And what may yet turn out to begin a stop text is kept back.

    Args:
        processor: whose tokens they are.
        stop: texts that end the answer: it goes up to the first one.

    Attributes:
        stopped: whether a stop text has come. All that comes later is no longer part of the answer.
    """

    def __init__(self, processor: Processor, stop: Sequence[str] = ()):
        self.stop, self.stopped = tuple(stop), False
        self._processor = processor
        self._ids: list[int] = []  # shown ones: those of the last piece, then those that are not told yet
        self._told = 0
        self._kept = ""

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; often none."""
        if self.stopped or self._hidden(token):
            return ""
        self._ids.append(token)
        if _BYTE.fullmatch(self._processor.tokenizer.text_of(token) or ""):
            return ""
        piece = self._new()
        return "" if piece.endswith(UNFINISHED) else self._tell(piece)

    def end(self) -> str:
        """All that was kept back, once no token follows."""
        piece = "" if self.stopped else self._tell(self._new())
        kept, self._kept = self._kept, ""
        return piece + ("" if self.stopped else kept)

    def _hidden(self, token: int) -> bool:
        """Whether a token is left out of the text, so that it does not part the bytes around it."""
        return not self._processor.decode([token]) and bool(self._processor.decode([token], skip_special_tokens=False))

    def _new(self) -> str:
        """The text of the ids not told yet. Decoded behind those of the last piece: first tokens may read otherwise."""
        decode = self._processor.decode
        return decode(self._ids)[len(decode(self._ids[: self._told])) :]

    def _tell(self, piece: str) -> str:
        self._ids = self._ids[self._told :]
        self._told = len(self._ids)
        text = self._kept + piece
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        self.stopped = bool(found)
        certain = min(found) if found else len(text) - max((_begun(text, stop) for stop in self.stop), default=0)
        self._kept = text[certain:]
        return text[:certain]


def _begun(text: str, stop: str) -> int:
    """How much of `stop` the end of `text` may be the beginning of."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
