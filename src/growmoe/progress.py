"""One live line on a terminal, plain lines elsewhere; always on stderr, never on stdout."""

import sys
import time
from collections.abc import Callable


def human_count(value: float) -> str:
    """1234567 -> '1.23M'."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def human_seconds(seconds: float) -> str:
    """75 -> '1m15s'."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
    """Shows how far a long piece of work is.

    `total` and the amounts given to `update` share one unit (tokens, documents, tensors). On a
    terminal the line is redrawn at most five times a second; elsewhere one plain line is printed
    about every `plain_interval` seconds and at the end.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str,
        *,
        plain_interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.clock = clock
        self.live = sys.stderr.isatty()
        self.interval = 0.2 if self.live else plain_interval
        self.start = self.last = clock()
        self.first_done: int | None = None
        self.done = 0

    def update(self, done: int, note: str = "") -> None:
        """Report that `done` units are finished in all; `note` is shown at the end of the line."""
        if self.first_done is None:
            self.first_done = done  # work that an earlier, interrupted run did
        self.done = done
        now = self.clock()
        if now - self.last >= self.interval:
            self.last = now
            self._show(self._line(note))

    def finish(self, note: str = "") -> None:
        """Print the closing line."""
        self._show(self._line(note), end="\n")

    def _line(self, note: str) -> str:
        elapsed = max(self.clock() - self.start, 1e-9)
        rate = (self.done - (self.first_done or 0)) / elapsed
        parts = [f"{self.label}: {human_count(self.done)}"]
        if self.total:
            parts[0] += f"/{human_count(self.total)} {self.unit} ({self.done / self.total:.0%})"
        else:
            parts[0] += f" {self.unit}"
        parts.append(f"{human_count(float(rate))} {self.unit}/s")
        if note:
            parts.append(note)
        if self.total and self.done < self.total and rate > 0:
            parts.append(f"ETA {human_seconds((self.total - self.done) / rate)}")
        return "  ".join(parts)

    def _show(self, line: str, end: str = "") -> None:
        if self.live:
            sys.stderr.write(f"\r\x1b[2K{line}{end}")
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()
