"""Does a model's tokenizer still cut text as its parent's did, through the public class too?

transformers picks a tokenizer class by the model's type, so the same files beside another
architecture can give other ids (SmolLM2's files beside a qwen2 config do).
"""

import logging
import sys
from pathlib import Path
from typing import Any

from growmoe.errors import GrowmoeError
from growmoe.files import read_json, write_json
from growmoe.models.config import ModelConfig
from growmoe.models.families import pick_family

PROBE = (
    "The year 2024 had 366 days;  two  spaces,\ttabs\n\nand lines. naïve café ﬁx x² ½ "
    "def f(x): return x**2  # 'it''s' don't DON'T\n中文测试：第12号，价格￥99.50。日本語 한국어 🙂 "
    "https://example.org/a_b?c=1&d=2 1234567890 3.14159 <|im_start|>user<|im_end|>"
)


def check_tokenizer(home: Path, out: Path, config: ModelConfig) -> dict[str, Any]:
    """Compare the ids of a probe text before (`home`: model directory or GGUF file) and after
    (`out`), as the tokenizers library and as transformers read the directory.

    When transformers would pick a class that changes them, the class is named in
    tokenizer_config.json, and tried again; for some architectures (qwen2) it picks its own all the
    same. Returns what goes into the lineage ({} without a tokenizer). Raises GrowmoeError when the
    ids still differ, unless transformers reads the parent in that same way.
    """
    if not (out / "tokenizer.json").exists():
        return {}
    from growmoe.data.tokenizer import load_tokenizer

    ids = load_tokenizer(out).encode(PROBE, add_special_tokens=False).ids
    if home.is_dir():
        before = load_tokenizer(home).encode(PROBE, add_special_tokens=False).ids
        if before != ids:
            raise GrowmoeError(f"{out}: the tokenizer cuts a probe text differently from {home}'s")
    if max(ids, default=0) >= config.vocab_size:
        raise GrowmoeError(
            f"{home}: its tokenizer gives token {max(ids)}, outside the vocabulary of "
            f"{config.vocab_size}; it does not fit the model"
        )
    if pick_family(config) == "growmoe":
        import growmoe.models.hf  # noqa: F401 (registers the architecture)
    said = {"same_ids": True, "probe_tokens": len(ids), "class_pinned": False}
    public = _public_ids(out)
    if public is None or public == ids:
        return {"tokenizer": {**said, "transformers": "same ids" if public else "not readable"}}
    _pin_class(out)
    if _public_ids(out) == ids:
        return {"tokenizer": {**said, "class_pinned": True, "transformers": "same ids"}}
    if not home.is_dir() or _public_ids(home) != public:
        raise GrowmoeError(
            f"{home}: transformers would read this tokenizer beside a {pick_family(config)} model "
            "as a class that changes it (a probe text gets other token ids), whatever "
            "tokenizer_class says; use a tokenizer of that architecture"
        )
    print(
        f"note: transformers reads {home / 'tokenizer.json'} as a class that changes it (a probe "
        "text gets other token ids); that is so for the output too",
        file=sys.stderr,
    )
    return {"tokenizer": {**said, "transformers": "other ids, as for the parent"}}


def _public_ids(folder: Path) -> list[int] | None:
    """Ids by transformers.AutoTokenizer; None when it cannot read the directory."""
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever its many classes raise for files they do not know
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"note: transformers cannot read this tokenizer: {reason}", file=sys.stderr)
        return None
    return tokenizer(PROBE, add_special_tokens=False)["input_ids"]


def _pin_class(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    write_json(path, {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
