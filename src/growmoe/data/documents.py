"""Documents from files and installed packages, one at a time.

A source's `path` is a file, a folder (searched recursively), a glob, or one of
- `package:NAME/GLOB`: files inside an installed Python package (found, never imported);
- `docstrings:stdlib,NAME,...`: docstrings of Python sources, and Python's own help topics for
  `stdlib` (parsed, never imported).
"""

import ast
import gzip
import importlib.metadata
import importlib.util
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from growmoe.errors import GrowmoeError, UsageError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".md", ".parquet")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Record:
    """One raw document, or the reason why there is none at this place."""

    where: str
    text: str = ""
    problem: str = ""
    """Empty, or a key of PROBLEMS."""


PROBLEMS = {
    "invalid_utf8": "is not valid UTF-8",
    "not_json": "is not a JSON object",
    "no_text": "has no text",
    "too_long": "is longer than the largest document allowed",
}


def need(module: str) -> Any:
    """Import an optional dependency of the `data` extra, or say how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"this input needs '{module}': install the data extra, pip install 'growmoe[data]'"
        ) from None


def read_source(
    path: str, *, text_field: str, split: str, limit: int
) -> Iterator[Record]:  # fmt: skip
    """Records of one source, in a fixed order. `split` is file | lines | paragraphs for txt and md;
    `limit` is the largest document in bytes. Raises UsageError when nothing is there to read."""
    if path.startswith("docstrings:"):
        yield from _docstrings(path.removeprefix("docstrings:").split(","))
        return
    for file in find_files(path):
        yield from _read_file(file, text_field, split, limit)


def find_files(path: str) -> list[Path]:
    """The readable files of a source, sorted; raises UsageError when there are none."""
    if path.startswith("package:"):
        name, _, pattern = path.removeprefix("package:").partition("/")
        if not pattern or pattern.startswith("/"):
            raise UsageError(f"'{path}' names no files; write package:NAME/GLOB")
        found = sorted(f for f in package_folder(name).glob(pattern) if f.is_file())
        if not found:
            raise UsageError(f"package {name} has no files that match '{pattern}'")
        return found
    place = Path(path).expanduser()
    if place.is_file():
        if not place.name.endswith(SUFFIXES):
            raise UsageError(f"{place}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        return [place]
    if place.is_dir():
        found = sorted(f for f in place.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES))
    elif any(letter in path for letter in "*?["):
        anchor = Path(place.anchor) if place.is_absolute() else Path()
        pattern = str(place.relative_to(place.anchor)) if place.is_absolute() else str(place)
        found = sorted(f for f in anchor.glob(pattern) if f.is_file())
    else:
        raise UsageError(f"{path} does not exist")
    if not found:
        raise UsageError(f"{path} holds no files to read ({', '.join(SUFFIXES)})")
    return found


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"package {name} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def package_origin(path: str) -> dict[str, str]:
    """Name, version and licence of the package that a `package:` source reads, for the manifest."""
    if not path.startswith("package:"):
        return {}
    name = path.removeprefix("package:").partition("/")[0]
    try:
        found: Any = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return {"package": name}
    wanted = {
        "package": "Name", "version": "Version", "licence": "License",
        "licence_expression": "License-Expression", "home": "Home-page",
    }  # fmt: skip
    origin = {key: str(found[field]) for key, field in wanted.items() if found.get(field)}
    classified = [c for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    if "licence" not in origin and classified:
        origin["licence"] = classified[0].rpartition(" :: ")[2]
    return origin


def _read_file(file: Path, text_field: str, split: str, limit: int) -> Iterator[Record]:
    try:
        if file.name.endswith(".parquet"):
            yield from _read_parquet(file, text_field, limit)
            return
        with _open(file) as stream:
            if ".jsonl" in file.name:
                yield from _read_jsonl(file, stream, text_field, limit)
            else:
                yield from _read_text(file, stream, split, limit)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise GrowmoeError(f"{file} is not a whole compressed file ({error})") from None
    except OSError as error:
        raise GrowmoeError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # zstandard is optional, so not imported by name
            raise
        raise GrowmoeError(f"{file} is not a whole compressed file ({error})") from None


def _open(file: Path) -> BinaryIO:
    if file.name.endswith(".gz"):
        return io.BufferedReader(gzip.open(file))
    if file.name.endswith(".zst"):
        zstandard = need("zstandard")
        reader = zstandard.ZstdDecompressor().stream_reader(
            open(file, "rb"), read_across_frames=True, closefd=True
        )
        return io.BufferedReader(reader)
    return open(file, "rb")


def _lines(stream: BinaryIO, limit: int) -> Iterator[bytes | None]:
    r"""Lines split at \n only (texts hold U+2028 and U+0085); None for one over `limit` bytes."""
    while line := stream.readline(limit + 1):
        if len(line) <= limit or line.endswith(b"\n"):
            yield line
            continue
        while not line.endswith(b"\n") and (line := stream.readline(_CHUNK)):
            pass
        yield None


def _read_jsonl(file: Path, stream: BinaryIO, text_field: str, limit: int) -> Iterator[Record]:
    for number, line in enumerate(_lines(stream, limit), 1):
        where = f"{file}:{number}"
        if line is None:
            yield Record(where, problem="too_long")
        elif line.strip():
            yield _parse_row(where, line, text_field)


def _parse_row(where: str, line: bytes, text_field: str) -> Record:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return Record(where, problem="invalid_utf8")
    except (ValueError, RecursionError):
        return Record(where, problem="not_json")
    if not isinstance(row, dict):
        return Record(where, problem="not_json")
    text = row.get(text_field)
    if not isinstance(text, str) or not text.strip():
        return Record(where, problem="no_text")
    try:  # JSON can spell lone surrogates, which no UTF-8 can
        text.encode()
    except UnicodeEncodeError:
        return Record(where, problem="invalid_utf8")
    return Record(where, text)


def _read_text(file: Path, stream: BinaryIO, split: str, limit: int) -> Iterator[Record]:
    if split == "file":
        whole = stream.read(limit + 1)
        yield _decode(str(file), whole if len(whole) <= limit else None)
        return
    block: list[bytes] = []
    size = 0
    for number, line in enumerate(_lines(stream, limit), 1):
        if line is None or split == "lines":
            if line is None or line.strip():
                yield _decode(f"{file}:{number}", line)
        elif line.strip():
            size += len(line)
            if size <= limit:
                block.append(line)
        elif size:
            yield _decode(f"{file}:{number}", b"".join(block) if size <= limit else None)
            block, size = [], 0
    if size:
        yield _decode(str(file), b"".join(block) if size <= limit else None)


def _decode(where: str, raw: bytes | None) -> Record:
    if raw is None:
        return Record(where, problem="too_long")
    try:
        return Record(where, raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Record(where, problem="invalid_utf8")


def _read_parquet(file: Path, text_field: str, limit: int) -> Iterator[Record]:
    parquet = need("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(file)
        if text_field not in table.schema_arrow.names:
            raise UsageError(
                f"{file} has no column '{text_field}'; it has {', '.join(table.schema_arrow.names)}"
            )
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield _column_value(f"{file}:row {number}", text, limit)
    except need("pyarrow").ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise GrowmoeError(f"{file} is not a whole parquet file ({reason})") from None


def _column_value(where: str, text: Any, limit: int) -> Record:
    if not isinstance(text, str) or not text.strip():
        return Record(where, problem="no_text")
    return Record(where, text) if len(text) <= limit else Record(where, problem="too_long")


def _docstrings(names: list[str]) -> Iterator[Record]:
    for name in names:
        if name == "stdlib":
            yield from _help_topics()
            folder = Path(sysconfig.get_paths()["stdlib"])
            files = [f for f in folder.rglob("*.py") if "site-packages" not in f.parts]
        else:
            folder = package_folder(name)
            files = list(folder.rglob("*.py"))
        for file in sorted(files):
            parts = file.relative_to(folder).parts
            if not {"test", "tests", "idlelib", "testing"} & set(parts):
                yield from _file_docstrings(file)


def _help_topics() -> Iterator[Record]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Record(f"pydoc_data.topics[{name}]", text)


def _file_docstrings(file: Path) -> Iterator[Record]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return  # templates and sources of other Python versions hold no docstrings to read
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                name = getattr(node, "name", file.stem)
                yield Record(f"{file}:{getattr(node, 'lineno', 1)}", f"{name}\n\n{text}\n")
