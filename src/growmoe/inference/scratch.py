"""A scratch file of equal records that nobody else sees and that never outlives its process."""

import errno
import os
import tempfile
from pathlib import Path

from growmoe.errors import GrowmoeError, UsageError
from growmoe.models.footprint import size

_PAGE = 4096


class Scratch:
    """`count` records of `nbytes` bytes in a file without a name, so that its space is free again
    when it is closed, whatever ends the process.

    The space is taken when it is made: raises GrowmoeError at once when the disk has not enough,
    and UsageError for a folder that is no place for it. With `page_cache` False the kernel is told
    to forget what was read, as if memory were full.
    """

    def __init__(
        self, nbytes: int, count: int, folder: Path | None = None, page_cache: bool = True
    ) -> None:
        self.folder = default_folder() if folder is None else folder
        self._nbytes, self._page_cache = nbytes, page_cache
        self._stride = -(-nbytes // _PAGE) * _PAGE  # pages of one record hold no other
        if in_memory(self.folder):
            raise UsageError(
                f"{self.folder} lies in memory (tmpfs), so experts would not leave it; name a "
                "folder on a disk for them (TMPDIR)"
            )
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0, prefix="growmoe-")
        except OSError as error:
            raise UsageError(f"cannot write in {self.folder}: {error.strerror}") from None
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, self._stride * count)
        except OSError as error:
            self._file.close()
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            raise GrowmoeError(
                f"experts on disk need {size(self._stride * count)} in {self.folder}: "
                f"{error.strerror}; name another folder (TMPDIR) or keep all experts in memory"
            ) from None

    def write(self, index: int, record: memoryview) -> None:
        """Write one record; raises GrowmoeError when the disk does not take it."""
        at = index * self._stride
        try:
            while record:
                done = os.pwrite(self._file.fileno(), record, at)
                record, at = record[done:], at + done
        except OSError as error:
            raise GrowmoeError(
                f"cannot write experts into {self.folder}: {error.strerror}"
            ) from None

    def flush(self) -> None:
        """Bring everything to the disk, so that memory holds no pages that must be kept."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise GrowmoeError(
                f"cannot write experts into {self.folder}: {error.strerror}"
            ) from None
        if not self._page_cache:
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, index: int, record: memoryview) -> None:
        """Read one record into `record`. Raises OSError, or GrowmoeError when it is cut short."""
        start = at = index * self._stride
        while record:
            done = os.preadv(self._file.fileno(), [record], at)
            if not done:
                raise GrowmoeError("the file is cut short")
            record, at = record[done:], at + done
        if not self._page_cache:
            os.posix_fadvise(self._file.fileno(), start, self._stride, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Free the space."""
        self._file.close()


def default_folder() -> Path:
    """TMPDIR where it is set, else /var/tmp, which lies on a disk where /tmp may not."""
    if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK):
        return Path("/var/tmp")
    return Path(tempfile.gettempdir())


def in_memory(folder: Path) -> bool:
    """Whether files in `folder` are held in memory anyway (Linux tells)."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return False
    place, kind = folder.resolve(), ""
    longest = -1
    for line in mounts.read_text().splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if place.is_relative_to(point) and len(point) >= longest:
            longest, kind = len(point), found
    return kind in ("tmpfs", "ramfs")
