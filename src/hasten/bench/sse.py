"""Server-sent events out of timed reads of a socket.

An event has the time of the read that completed it: a client cannot know it earlier. Only the
`data` field is kept, which is all that OpenAI's and Triton's streams use; comments and other fields
are passed over. Bytes behind the last complete event are dropped.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate

_END = re.compile(rb"\r?\n\r?\n")


def timed_events(times_s: Sequence[float], parts: Sequence[bytes]) -> Iterator[tuple[float, bytes]]:
    """Time and data of each event.

    Args:
        times_s: when each of `parts` was read.
        parts: the body of one answer as it came, cut anywhere.
    """
    whole = b"".join(parts)
    part_ends = list(accumulate(len(part) for part in parts))
    start = part = 0
    for end in _END.finditer(whole):
        while part_ends[part] < end.end():
            part += 1
        data = _data(whole[start : end.start()])
        start = end.end()
        if data is not None:
            yield times_s[part], data


def _data(event: bytes) -> bytes | None:
    if event.startswith(b"data:") and b"\n" not in event:
        return event[5:].lstrip(b" ")
    lines = [line[5:].lstrip(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None
