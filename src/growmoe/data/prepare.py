"""Raw text to corpus in three streaming passes: clean and deduplicate, train BPE, tokenise.

Memory stays flat: keys of seen documents lie in a SQLite file, cleaned text in spool files, the
tokenizer is trained on a bounded sample.
"""

import hashlib
import itertools
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import Tokenizer

from growmoe.data.clean import clean, complaint, content_key
from growmoe.data.corpus import SPLITS, ShardWriter, token_dtype
from growmoe.data.documents import PROBLEMS, package_origin, read_source
from growmoe.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json, write_json

_BATCH_BYTES = 1 << 20
_PIECE = 1 << 16
Report = Callable[[int, str], None]


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of a mixture; see `documents.read_source` for `path` and `split`."""

    name: str
    path: str
    weight: float
    text_field: str = "text"
    split: str = "file"


@dataclass(frozen=True, kw_only=True)
class PrepareSpec:
    """What to make a corpus of."""

    sources: list[SourceSpec]
    tokenizer: str | None
    """Directory or file of a given tokenizer; None trains one of `vocab_size` tokens."""
    vocab_size: int
    sample_mb: float
    validation_fraction: float
    min_chars: int
    max_document_mb: float
    skip_bad_records: bool
    shard_tokens: int
    validation_length: int = 512
    validation_tokens: int = 16384


@dataclass
class _Tally:
    """What happened to the documents of one source."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    smallest: bytes = b"\xff" * 16
    """Least content key of a kept document."""
    size: Counter[str] = field(default_factory=Counter)


def prepare(spec: PrepareSpec, out: Path, report: Report = lambda done, note: None) -> None:
    """Write a corpus into the existing directory `out`.

    `report(documents, note)` is called as work goes on. Raises GrowmoeError for a broken record
    (unless skipped) and UsageError when a source or a split comes out empty.
    """
    spool = _Spool(out / ".spool")
    tallies = {source.name: _collect(source, spec, spool, report) for source in spec.sources}
    _check_not_empty(spec, tallies, spool)
    tokenizer = _tokenizer(spec, tallies, spool, out, report)
    entries, digest = _tokenise(spec, tallies, spool, tokenizer, out, report)
    spool.delete()
    write_json(
        out / "manifest.json",
        {
            "format": 1,
            "hash": digest,
            "tokenizer": {
                "vocab_size": tokenizer.get_vocab_size(),
                "end_of_text_id": _end_of_text(spec, tokenizer),
                "trained": spec.tokenizer is None,
            },
            "validation": {
                "fraction": spec.validation_fraction,
                "length": spec.validation_length,
                "tokens": spec.validation_tokens,
            },
            "sources": entries,
            "totals": {
                split: {
                    "documents": sum(entry["documents"][split] for entry in entries),
                    "tokens": sum(entry["tokens"][split] for entry in entries),
                }
                for split in SPLITS
            },
        },
    )


class _Spool:
    """Cleaned documents on disk (length, then UTF-8), and the keys of all documents seen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.seen = sqlite3.connect(folder / "seen.sqlite", isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536"):
            self._execute(f"PRAGMA {pragma}")
        self._execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._execute("BEGIN")

    def _execute(self, statement: str, values: tuple[bytes, ...] = ()) -> int:
        try:
            return self.seen.execute(statement, values).rowcount
        except sqlite3.OperationalError as error:
            raise GrowmoeError(f"cannot write in {self.folder.parent}: {error}") from None

    def is_new(self, key: bytes) -> bool:
        return self._execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)) == 1

    def path(self, source: str, split: str) -> Path:
        return self.folder / f"{source}.{split}"

    def documents(self, source: str, split: str) -> Iterator[str]:
        path = self.path(source, split)
        if not path.exists():
            return
        with open(path, "rb") as file:
            while head := file.read(4):
                yield file.read(struct.unpack("<I", head)[0]).decode()

    def delete(self) -> None:
        self.seen.close()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()


def _write_document(file: BinaryIO, text: str) -> int:
    raw = text.encode()
    file.write(struct.pack("<I", len(raw)) + raw)
    return len(raw)


def _split_of(key: bytes, fraction: float) -> str:
    """Validation or train by content, so that a copy of a document never sits in both."""
    share = int.from_bytes(key[8:], "little") / 2**64
    return "validation" if share < fraction else "train"


def _collect(source: SourceSpec, spec: PrepareSpec, spool: _Spool, report: Report) -> _Tally:
    tally = _Tally()
    limit = int(spec.max_document_mb * 2**20)
    records = read_source(
        source.path, text_field=source.text_field, split=source.split, limit=limit
    )
    files = {split: open(spool.path(source.name, split), "wb") for split in SPLITS}
    try:
        for record in records:
            tally.read += 1
            report(1, f"reading {source.name}")
            if record.problem:
                if not spec.skip_bad_records:
                    raise GrowmoeError(_bad_record(record.where, record.problem, source, spec))
                tally.dropped[record.problem] += 1
                continue
            text = clean(record.text)
            reason = complaint(text, spec.min_chars)
            key = content_key(text)
            if not reason and not spool.is_new(key):
                reason = "duplicate"
            if reason:
                tally.dropped[reason] += 1
                continue
            split = _split_of(key, spec.validation_fraction)
            tally.kept[split] += 1
            tally.size[split] += _write_document(files[split], text)
            tally.smallest = min(tally.smallest, key)
    finally:
        for file in files.values():
            file.close()
    if not tally.kept["validation"] and tally.kept["train"] > 1:
        _move_one_to_validation(source.name, spool, tally)
    return tally


def _bad_record(where: str, problem: str, source: SourceSpec, spec: PrepareSpec) -> str:
    detail = {
        "no_text": f" in field '{source.text_field}'",
        "too_long": f" ({spec.max_document_mb:g} MB, max_document_mb)",
    }.get(problem, "")
    return (
        f"{where} {PROBLEMS[problem]}{detail}; mend it, or set bad_records: skip to count and skip"
    )


def _move_one_to_validation(source: str, spool: _Spool, tally: _Tally) -> None:
    """A small source may have no document under the fraction: take the one with the least key."""
    everything = spool.path(source, "all")
    spool.path(source, "train").rename(everything)
    with (
        open(spool.path(source, "train"), "wb") as train,
        open(spool.path(source, "validation"), "wb") as validation,
    ):
        for text in spool.documents(source, "all"):
            chosen = content_key(text) == tally.smallest
            size = _write_document(validation if chosen else train, text)
            if chosen:
                tally.kept.update(validation=1, train=-1)
                tally.size.update(validation=size, train=-size)
    everything.unlink()


def _check_not_empty(spec: PrepareSpec, tallies: dict[str, _Tally], spool: _Spool) -> None:
    for source in spec.sources:
        tally = tallies[source.name]
        if not tally.kept["train"]:
            dropped = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.items())
            raise UsageError(
                f"source {source.name} ({source.path}) gives no training documents: "
                f"{tally.read} read, {dropped or 'none dropped'}, "
                f"{tally.kept['validation']} for validation"
            )
    if not any(tally.kept["validation"] for tally in tallies.values()):
        raise UsageError("the corpus is a single document; training and validation need two")


def _tokenizer(
    spec: PrepareSpec, tallies: dict[str, _Tally], spool: _Spool, out: Path, report: Report
) -> Tokenizer:
    if spec.tokenizer is not None:
        given = Path(spec.tokenizer)
        tokenizer = load_tokenizer(given)
        folder = given if given.is_dir() else given.parent
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).exists():
                (out / name).write_bytes((folder / name).read_bytes())
        return tokenizer
    report(0, "training the tokenizer")
    tokenizer = train_tokenizer(_sample(spec, tallies, spool), spec.vocab_size)
    save_tokenizer(tokenizer, out)
    return tokenizer


def _end_of_text(spec: PrepareSpec, tokenizer: Tokenizer) -> int:
    """The token between documents; a model's directory names its own."""
    config = Path(spec.tokenizer) / "config.json" if spec.tokenizer is not None else None
    known = read_json(config) if config is not None and config.exists() else {}
    return end_of_text_id(tokenizer, known)


def _sample(spec: PrepareSpec, tallies: dict[str, _Tally], spool: _Spool) -> Iterator[str]:
    """Training text by mixture weight, at most `sample_mb`, spread evenly over each source."""
    total = sum(source.weight for source in spec.sources)
    for source in spec.sources:
        budget = spec.sample_mb * 2**20 * source.weight / total
        share = min(1.0, budget / max(tallies[source.name].size["train"], 1))
        owed = 0.0  # in characters, so that one huge document gives its part too
        for text in spool.documents(source.name, "train"):
            owed += share * len(text)
            if owed >= min(len(text), _PIECE):
                yield text[: int(owed) + 1]
                owed -= min(int(owed) + 1, len(text))


def _tokenise(
    spec: PrepareSpec, tallies: dict[str, _Tally], spool: _Spool, tokenizer: Tokenizer, out: Path,
    report: Report,
) -> tuple[list[dict[str, Any]], str]:  # fmt: skip
    end = _end_of_text(spec, tokenizer)
    dtype = token_dtype(tokenizer.get_vocab_size())
    digest = hashlib.sha256()
    entries = []
    for split in SPLITS:
        (out / split).mkdir()
    for source in spec.sources:
        tokens = {}
        for split in SPLITS:
            writer = ShardWriter(out / split, source.name, dtype, spec.shard_tokens)
            for batch in _batches(spool.documents(source.name, split)):
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    writer.add([*encoding.ids, end])
                report(0, f"tokenising {source.name}")
            writer.close()
            digest.update(writer.digest.digest())
            tokens[split] = writer.tokens
        entries.append(_entry(source, tallies[source.name], tokens))
    return entries, digest.hexdigest()


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _entry(source: SourceSpec, tally: _Tally, tokens: dict[str, int]) -> dict[str, Any]:
    return {
        "name": source.name,
        "path": source.path,
        "origin": package_origin(source.path),
        "weight": source.weight,
        "documents": {"read": tally.read, **{split: tally.kept[split] for split in SPLITS}},
        "dropped": dict(sorted(tally.dropped.items())),
        "bytes": {split: tally.size[split] for split in SPLITS},
        "tokens": tokens,
    }


def first_documents(path: str, count: int) -> list[str]:
    """The first documents of a text source, as they are (for verification texts)."""
    records = read_source(path, text_field="text", split="file", limit=1 << 25)
    texts = (record.text for record in records if not record.problem)
    return list(itertools.islice((text for text in texts if text), count))
