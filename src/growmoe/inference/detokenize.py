"""Tokens to text, piece by piece: only what can no longer change, and nothing of a stop string."""

from tokenizers import Tokenizer

UNFINISHED = "\ufffd"
MOST_HELD = 64
"""Tokens after which text is shown even if it ends in the middle of a character: bytes that never
become one would otherwise be decoded again and again."""


class Detokenizer:
    """Decodes only the tokens since the last certain piece, and the few before them that may decide
    how they are written (a space, a joined character)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._new: list[int] = []
        self._known = ""  # text of `before` alone

    def push(self, token: int) -> str:
        """The text that has become certain; a character split over tokens is held back."""
        self._new.append(token)
        text = self._decode(self._before + self._new)
        if text.endswith(UNFINISHED) and len(self._new) < MOST_HELD:
            return ""
        piece = text[len(self._known) :]
        # special tokens have no text, so they tell nothing about how later ones are written
        if piece or len(self._new) >= MOST_HELD:
            self._before, self._new = self._new, []
            self._known = self._decode(self._before)
        return piece

    def rest(self) -> str:
        """What was held back, at the end."""
        text = self._decode(self._before + self._new)
        return text[len(self._known) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class TextStream:
    """The text of one sample, which ends before the stop string that is complete first."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.stopped = False
        """A stop string was found; nothing comes after it."""

    def push(self, token: int) -> str:
        """The text that has become certain: neither part of a character nor, maybe, of a stop
        string."""
        return self._passed(self._detokenizer.push(token))

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        piece = self._passed(self._detokenizer.rest())
        if not self.stopped:
            piece, self._held = piece + self._held, ""
        return piece

    def _passed(self, piece: str) -> str:
        if not self._stop or not piece:
            return piece
        text = self._held + piece
        # the one that is complete first, so that it does not matter how tokens cut the text
        places = [
            (place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0
        ]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)[1]]
        keep = 0
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                keep = size
                break
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
