"""The tokenizer of a GGUF file: from a byte-level-BPE tokenizer.json, or from another GGUF file.

llama.cpp splits text before merging by a rule it knows by name (`tokenizer.ggml.pre`), so only a
tokenizer.json with one of those rules can be written. Imports no torch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json
from growmoe.models.config import ModelConfig

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ANY_CASE = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|",
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|",
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# {regular expression of a Split before ByteLevel: rule}
_RULES = {
    **{case + _LETTERS + r"\p{N}" + _REST: "qwen2" for case in _ANY_CASE},
    **{case + _LETTERS + r"\p{N}{1,3}" + _REST: "smaug-bpe" for case in _ANY_CASE},
    _GPT2: "gpt-2",
    _GPT2 + r"|\s+": "gpt-2",
}


def tokenizer_fields(tokenizer: Path | None, config: ModelConfig) -> dict[str, Any]:
    """The `tokenizer.*` fields for the tokenizer in the directory `tokenizer`.

    Raises GrowmoeError where llama.cpp would cut text differently.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab", **_id_fields(dict(config.token_ids))}
    file = tokenizer / "tokenizer.json"
    if not file.exists():
        raise UsageError(f"{tokenizer} holds no tokenizer.json")
    raw = read_json(file)
    try:
        tokens, types = _tokens(raw, config.vocab_size, file)
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
        rule = _rule(raw, file)
        begin, end = _added_around(raw)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise GrowmoeError(f"{file} is not a byte-level BPE tokenizer ({error!r})") from None
    if not merges:
        raise GrowmoeError(
            f"{file} has no merges, which llama.cpp needs; train one with more tokens"
        )
    ids: dict[str, Any] = dict(config.token_ids)
    ids |= {"bos_token_id": begin} if begin is not None else {}
    if ids.get("eos_token_id") is None:
        ids["eos_token_id"] = end if end is not None else _named_end(tokenizer, tokens)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": begin is not None,
        "tokenizer.ggml.add_eos_token": end is not None,
        **_id_fields(ids),
    }
    if template := _chat_template(tokenizer):
        fields["tokenizer.chat_template"] = template
    return fields


def copied_tokenizer(origin: Path, vocab_size: int) -> Iterator[tuple[str, Any, Any, Any]]:
    """(key, value, type, type of its elements) of every `tokenizer.*` field of a GGUF file.

    Lists of one entry per token are padded when `vocab_size` has grown.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(origin)
    except (ValueError, OSError, IndexError) as error:
        raise GrowmoeError(f"{origin} is not a whole GGUF file ({error})") from None
    tokens = reader.get_field("tokenizer.ggml.tokens")
    if tokens is None:
        raise GrowmoeError(f"{origin} holds no tokenizer: key tokenizer.ggml.tokens is missing")
    count = len(tokens.data)
    if count > vocab_size:
        raise GrowmoeError(f"{origin} has {count} tokens, but the model has only {vocab_size}")
    padding: dict[str, list[Any]] = {
        "tokenizer.ggml.tokens": [f"[PAD{i}]" for i in range(count, vocab_size)],
        "tokenizer.ggml.token_type": [UNUSED] * (vocab_size - count),
        "tokenizer.ggml.scores": [-1000.0] * (vocab_size - count),
    }
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            inner = field.types[-1] if len(field.types) > 1 else None
            value = field.contents()
            yield key, value + padding[key] if key in padding else value, field.types[0], inner


def _tokens(raw: dict[str, Any], size: int, file: Path) -> tuple[list[str], list[int]]:
    model = raw["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise ValueError("its model is not BPE over bytes")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("its pieces carry a prefix or suffix")
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    rows = [(text, index, NORMAL) for text, index in model["vocab"].items()]
    rows += [
        (token["content"], token["id"], CONTROL if token.get("special") else USER_DEFINED)
        for token in raw.get("added_tokens") or []
    ]
    for text, index, kind in rows:
        if index >= size:
            raise GrowmoeError(
                f"{file} has a token {index}, but the model has only {size}; the tokenizer does "
                f"not fit the model"
            )
        tokens[index], types[index] = text, kind
    return tokens, types


def _rule(raw: dict[str, Any], file: Path) -> str:
    """The name that llama.cpp has for how this tokenizer splits text; GrowmoeError if none."""
    normalizer = (raw.get("normalizer") or {}).get("type", "NFC")
    whole = raw.get("pre_tokenizer") or {}
    steps = whole["pretokenizers"] if whole.get("type") == "Sequence" else [whole]
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    by_regex = last.get("use_regex", True)
    rule = None
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space") and normalizer == "NFC":
        if kinds == ["ByteLevel"] and by_regex:
            rule = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and by_regex and steps[0].get("individual_digits"):
            rule = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not by_regex and _keeps_all(steps[0]):
            rule = _RULES.get(steps[0]["pattern"].get("Regex", ""))
    whole_words = bool(raw["model"].get("ignore_merges"))
    if rule == "smaug-bpe" and whole_words:
        return "llama-bpe"  # the same split, and words that are tokens are not merged
    if rule is None or whole_words:
        raise GrowmoeError(
            f"{file}: llama.cpp has no rule that growmoe knows for its normalizer, pre_tokenizer "
            f"and ignore_merges; give a GGUF file with this tokenizer as the origin"
        )
    return rule


def _keeps_all(split: dict[str, Any]) -> bool:
    """True when the pieces are the matches (all these expressions match every character)."""
    style = (split.get("behavior"), bool(split.get("invert")))
    return style in (("Isolated", False), ("Removed", True), ("Isolated", True))


def _added_around(raw: dict[str, Any]) -> tuple[int | None, int | None]:
    """Tokens that the post-processor puts before and after a text."""
    step = raw.get("post_processor") or {}
    steps = step["processors"] if step.get("type") == "Sequence" else [step]
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            special = step["special_tokens"]
            around = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
            ids = [special[name]["ids"][0] if name else None for name in (around[0], around[-1])]
            return ids[0], ids[1]
    return None, None


def _id_fields(ids: dict[str, Any]) -> dict[str, int]:
    """Fields of the special tokens; a second end of text is llama.cpp's end of turn."""
    end = ids.get("eos_token_id")
    ends = end if isinstance(end, list) else [end]
    named = {
        "bos": ids.get("bos_token_id"), "eos": ends[0], "padding": ids.get("pad_token_id"),
        "eot": ends[1] if len(ends) > 1 else None,
    }  # fmt: skip
    return {f"tokenizer.ggml.{k}_token_id": int(v) for k, v in named.items() if v is not None}


def _settings(tokenizer: Path) -> dict[str, Any]:
    file = tokenizer / "tokenizer_config.json"
    return read_json(file) if file.exists() else {}


def _named_end(tokenizer: Path, tokens: list[str]) -> int:
    """The end-of-text token that tokenizer_config.json names; llama.cpp would take token 11."""
    name = _settings(tokenizer).get("eos_token")
    name = name.get("content") if isinstance(name, dict) else name
    if name not in tokens:
        raise GrowmoeError(
            f"{tokenizer}: neither eos_token_id in config.json nor eos_token in "
            f"tokenizer_config.json says which token ends a text; add one of them"
        )
    return tokens.index(name)


def _chat_template(tokenizer: Path) -> str | None:
    file = tokenizer / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = _settings(tokenizer).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template
