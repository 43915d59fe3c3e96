"""Stopping a run from outside: the update is finished, the state saved, then the process ends.

======== ==================================================== =========
signal   what happens                                         exit code
======== ==================================================== =========
SIGINT   (Ctrl-C) saves and ends; a second one ends at once   130
SIGTERM  saves and ends; further ones change nothing          143
SIGUSR1  the same, for a cluster to announce its time limit   138
======== ==================================================== =========
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Windows lacks the last.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal, its state saved. ``code`` is what the command exits with."""

    def __init__(self, message: str, number: int, run: str = "RUN"):
        super().__init__(message)
        self.code, self.run = 128 + number, run


class Signals:
    """While entered, takes note of signals instead of ending the process; ``asked`` is the one that came, or 0.

    Signals that the process ignores stay ignored, and outside the main thread, where Python allows no handlers,
    nothing changes. ``run`` is the run's folder, for messages.

    Example:
        >>> with Signals() as signals:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(signals.asked == signal.SIGTERM)
        True
    """

    def __init__(self, run: str = "RUN") -> None:
        self.asked, self.run = 0, run
        self.at_once: str | None = None

    def __enter__(self) -> Signals:
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked == number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: files are whole at any moment
        self.asked = self.asked or number
        if self.at_once is not None:
            raise Stopped(self.at_once, self.asked, self.run)

    @contextmanager
    def saved(self, message: str, *, alone: bool = True) -> Iterator[None]:
        """While everything is saved and other processes do not wait, a signal ends the run at once."""
        if self.asked and alone:
            raise Stopped(message, self.asked, self.run)
        self.at_once = message if alone else None
        try:
            yield
        finally:
            self.at_once = None
