"""Lines for people: the progress of a long task, and text for bytes, seconds and durations."""

import math
import sys
import time
from bisect import bisect
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# plain lines over which a rate is taken: a slow first step is forgotten after so many
RATE_LINES = 6


def format_seconds(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40', 90000 -> '1 d 1:00:00'; '?' where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days} d {clock}" if days else clock


def format_field(value: object) -> str:
    """A number for the console: three or four figures; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class ProgressLine:
    """Counts units of work and shows how far it is, how fast it goes and when it ends.

    On a terminal this is a tqdm bar; elsewhere one plain line every `every_s` seconds and one at the end, so that a log
    file stays readable. Everything goes to standard error.

    Args:
        total: units of the whole work, or None where that is not known.
        unit: what is counted, in the plural: "images", "steps".
        desc: what is being done, in front of every line.
        every_s: seconds between two plain lines.
        initial: units done before this process started: they count as done, but not for the rate.
        enabled: False makes every call do nothing (ranks other than 0).
        stream: where to write; standard error by default.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        desc: str,
        every_s: float = 10.0,
        *,
        initial: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.unit, self.desc, self.every_s = total, unit, desc, every_s
        self.done = self.initial = initial
        self.fields: dict[str, object] = {}
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._start = self._last_line = time.monotonic()
        self._paused_s = 0.0
        self._marks = deque([(self._start, initial)], maxlen=RATE_LINES)
        self._shown: tuple[int, dict[str, object]] | None = None
        self._bar = self._build_bar() if enabled and self._stream.isatty() else None

    def _build_bar(self) -> object:
        from tqdm import tqdm

        return tqdm(
            total=self.total,
            initial=self.initial,
            desc=self.desc,
            unit=f" {self.unit}",
            file=self._stream,
            dynamic_ncols=True,
        )

    def advance(self, count: int = 1, **fields: object) -> None:
        """Add `count` finished units; `fields` (name=value) stay beside the figures until they are replaced."""
        self.done += count
        if not self._enabled:
            return
        self.fields.update(fields)
        if self._bar is not None:
            if fields:
                self._bar.set_postfix_str(self._fields_text(", "), refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= self.every_s:
            self._print_line()

    def message(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, an evaluation say, is other work: its time does not count for rate and ETA."""
        began = time.monotonic()
        yield
        away = time.monotonic() - began
        self._paused_s += away
        self._last_line += away
        self._marks = deque(((moment + away, done) for moment, done in self._marks), maxlen=RATE_LINES)
        if self._bar is not None:
            self._bar.start_t += away
            self._bar.last_print_t += away

    def close(self) -> None:
        """Show the final state; later calls do nothing."""
        if not self._enabled:
            return
        self._enabled = False
        if self._bar is not None:
            self._bar.close()
        elif self._shown != (self.done, self.fields):
            self._print_line()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @property
    def rate(self) -> float:
        """Units a second since this process started to count."""
        return (self.done - self.initial) / max(time.monotonic() - self._start - self._paused_s, 1e-9)

    def _fields_text(self, separator: str) -> str:
        return separator.join(f"{name} {format_field(value)}" for name, value in self.fields.items())

    def _print_line(self) -> None:
        parts = []
        if self.total:
            parts.append(f"{100 * self.done / self.total:3.0f} %")
        counted = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        parts.append(f"{counted} {self.unit}")
        now, is_done = time.monotonic(), self.total is None or self.done >= self.total
        since, done_then = self._marks[0]
        rate = self.rate if is_done else (self.done - done_then) / max(now - since, 1e-9)
        parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s")
        if is_done:
            parts.append(f"took {format_seconds(now - self._start)}")
        else:
            parts.append(f"ETA {format_seconds((self.total - self.done) / rate if rate else math.inf)}")
        if self.fields:
            parts.append(self._fields_text(" | "))
        print(f"{self.desc}: {' | '.join(parts)}", file=self._stream, flush=True)
        self._last_line, self._shown = now, (self.done, dict(self.fields))
        self._marks.append((now, self.done))


def format_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (powers of 1000, as disks are sold)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_duration(seconds: float) -> str:
    """A duration to two figures, in the unit that people would use: seconds, minutes, hours, from 48 h on days."""
    unit, size = (("s", 1), ("min", 60), ("h", 3600), ("days", 86_400))[bisect([60, 3600, 48 * 3600], seconds)]
    count = seconds / size
    return f"{count:.1f} {unit}" if count < 9.95 else f"{count:,.0f} {unit}"
