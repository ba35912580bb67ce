"""Outputs appear whole or not at all: write aside, fsync, rename."""

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growmoe.errors import GrowmoeError, UsageError


def fsync_directory(path: Path) -> None:
    """Flush a directory entry so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Flush every file below `path`, then the directories that hold them."""
    for root, _, names in os.walk(path):
        for name in names:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(root))


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` with `text` (UTF-8) in one atomic step."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace the file `path` with `value` as indented JSON in one atomic step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises GrowmoeError that names the file when it is absent or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GrowmoeError(f"{path} does not exist") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise GrowmoeError(f"{path} is not valid JSON: {error}") from None


def publish(staged: Path, out: Path) -> None:
    """Make the finished directory `staged` visible as `out`, which must not exist."""
    fsync_tree(staged)
    os.rename(staged, out)
    fsync_directory(out.parent)


@contextlib.contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield a hidden directory beside `out` that becomes `out` when the block ends well.

    Raises UsageError when `out` exists and GrowmoeError when its place cannot be written; the
    hidden directory is removed when the block raises.
    """
    if out.exists():
        raise UsageError(f"{out} already exists; choose another output directory or remove it")
    staged = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        staged.mkdir()
    except OSError as error:
        raise GrowmoeError(f"cannot write in {out.parent}: {error.strerror}") from None
    try:
        yield staged
        publish(staged, out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def remove_leftovers(out: Path) -> None:
    """Delete hidden staging directories of `out` whose process is gone (kill -9 leaves one)."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):
        pid = path.name.removesuffix(".tmp").rpartition(".")[2]
        # our own number: an earlier process had it (in a container every run may be number 1)
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
