"""Stop strings in text that comes in pieces.

What may be the beginning of a stop string is held back until the next piece decides. Imports
nothing heavy: it also runs where there is neither torch nor transformers, in Triton's Python backend.
"""

from collections.abc import Sequence


class StopMatcher:
    """Cuts text before the stop string that is complete first, however the text is split into pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False

    def add(self, piece: str) -> str:
        """The text that cannot be part of a stop string; nothing after one was found."""
        if self.is_stopped:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)[1]]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back and turned out not to be a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
