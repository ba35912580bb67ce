"""CORPUS directories: tokenised shards, memory-mapped, with document boundaries and a manifest.

Layout: manifest.json, tokenizer files, and for each split and source
`train/NAME-00000.bin` (little-endian token ids) with `train/NAME-00000.idx` (uint64 offsets in
tokens where documents start, plus the end).
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from growmoe.errors import GrowmoeError, UsageError
from growmoe.files import read_json

SPLITS = ("train", "validation")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned integer that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Appends documents of one source and split, starting a new file every `shard_tokens`."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.shard_tokens = shard_tokens
        self.tokens = self.documents = 0
        self.digest = hashlib.sha256()
        self._shard = -1
        self._fill = shard_tokens
        self._bin: Any = None
        self._idx: Any = None

    def add(self, ids: list[int]) -> None:
        """Write one document."""
        if self._fill >= self.shard_tokens:
            self._next_shard()
        raw = np.asarray(ids, dtype=self.dtype).tobytes()
        self._bin.write(raw)
        self.digest.update(raw)
        self._fill += len(ids)
        self._idx.write(np.uint64(self._fill).tobytes())
        self.tokens += len(ids)
        self.documents += 1

    def _next_shard(self) -> None:
        self.close()
        self._shard += 1
        stem = self.folder / f"{self.name}-{self._shard:05d}"
        self._bin, self._idx = open(f"{stem}.bin", "wb"), open(f"{stem}.idx", "wb")
        self._idx.write(np.uint64(0).tobytes())
        self._fill = 0

    def close(self) -> None:
        """Finish the open files."""
        for file in (self._bin, self._idx):
            if file is not None:
                file.close()


class TokenStream:
    """All shards of one source and split, seen as one sequence of tokens."""

    def __init__(self, files: list[Path], dtype: np.dtype[Any]) -> None:
        self.shards = [np.memmap(file, dtype=dtype, mode="r") for file in files]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.shards) else 0

    def read(self, start: int, count: int) -> np.ndarray[Any, Any]:
        """Tokens [start, start+count) as int64, across shard borders."""
        pieces = []
        shard = int(np.searchsorted(self.ends, start, side="right"))
        offset = start - (int(self.ends[shard - 1]) if shard else 0)
        while count > 0:
            piece = self.shards[shard][offset : offset + count]
            pieces.append(piece)
            count -= len(piece)
            shard, offset = shard + 1, 0
        return np.concatenate(pieces).astype(np.int64)


class Corpus:
    """A prepared corpus, opened; raises GrowmoeError when files are missing or short."""

    def __init__(self, path: Path) -> None:
        if not (path / "manifest.json").exists():
            raise UsageError(f"{path} holds no manifest.json, so it is not a corpus directory")
        self.path = path
        self.manifest: dict[str, Any] = read_json(path / "manifest.json")
        try:
            self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
            self.end_of_text = int(self.manifest["tokenizer"]["end_of_text_id"])
            self.sources = [entry["name"] for entry in self.manifest["sources"]]
            self.weights = {s["name"]: float(s["weight"]) for s in self.manifest["sources"]}
            counts = {s["name"]: s["tokens"] for s in self.manifest["sources"]}
        except (KeyError, TypeError) as error:
            raise GrowmoeError(f"{path / 'manifest.json'}: key {error} is missing") from None
        dtype = token_dtype(self.vocab_size)
        self.streams: dict[str, dict[str, TokenStream]] = {}
        for split in SPLITS:
            self.streams[split] = {}
            for name in self.sources:
                files = sorted((path / split).glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].bin"))
                stream = TokenStream(files, dtype)
                if len(stream) != counts[name][split]:
                    raise GrowmoeError(
                        f"{path / split}: source {name} has {len(stream)} tokens, but the "
                        f"manifest says {counts[name][split]}"
                    )
                self.streams[split][name] = stream

    def tokens(self, split: str = "train") -> int:
        """Tokens of all sources in a split."""
        return sum(len(stream) for stream in self.streams[split].values())

    def validation_windows(self) -> dict[str, np.ndarray[Any, Any]]:
        """{source: [n, length+1] token ids}: the first windows of each source's validation split,
        as many as the manifest says; the same ones for every model and stage. A source too short
        for one window is left out; raises UsageError when none is long enough."""
        length, tokens = (int(self.manifest["validation"][key]) for key in ("length", "tokens"))
        windows = {}
        for name, stream in self.streams["validation"].items():
            count = min(max(1, tokens // length), (len(stream) - 1) // length)
            if count > 0:
                rows = [stream.read(i * length, length + 1) for i in range(count)]
                windows[name] = np.stack(rows)
        if not windows:
            raise UsageError(
                f"{self.path}: no source has a validation split of {length + 1} tokens; "
                "prepare it with a smaller validation_length or a larger validation_fraction"
            )
        return windows
