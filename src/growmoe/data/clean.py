"""Unicode cleaning of one document, and the key by which documents count as the same."""

import hashlib
import re
import unicodedata

from growmoe.data.documents import need

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_NEWLINES = re.compile(r"\r\n?|\u2028|\u2029|\x85")
_SPACE = re.compile(r"\s+")
MAX_REPLACEMENT_SHARE = 0.01


def clean(text: str) -> str:
    r"""One kind of newline, no terminal codes or control characters, mojibake repaired, NFC.

    Chinese punctuation and curly quotes stay as they are (ftfy's defaults would rewrite them).
    """
    text = _NEWLINES.sub("\n", text)
    text = _CONTROLS.sub("", _ANSI.sub("", text))
    if not text.isascii():
        ftfy = need("ftfy")
        if ftfy.badness.is_bad(text):
            text = ftfy.fix_encoding(text)
        text = unicodedata.normalize("NFC", text)
    return text.strip()


def complaint(text: str, min_chars: int) -> str:
    """Why a cleaned document is dropped: 'empty', 'too_short', 'garbled', or '' to keep it."""
    if not text:
        return "empty"
    if len(text) < min_chars:
        return "too_short"
    return "garbled" if text.count("\ufffd") > MAX_REPLACEMENT_SHARE * len(text) else ""


def content_key(text: str) -> bytes:
    """16 bytes equal for texts that differ in white space only: for duplicates and the split."""
    return hashlib.blake2b(_SPACE.sub(" ", text).strip().encode(), digest_size=16).digest()
