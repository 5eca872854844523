"""Parts of files read into a GPU's memory, through pinned buffers and on several threads.

A thread reads a chunk into its buffer while the buffers of others are on their way to the
GPU, so the slower of the two, reading the page cache or the bus, sets the pace. A call
returns when everything is there. Nothing is mapped and no tensor passes through pageable memory.
"""

import os
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

CHUNK_BYTES = 8 << 20
NUM_THREADS = 8


@dataclass(frozen=True)
class FilePart:
    """Bytes of a file and where they go.

    Args:
        target: contiguous tensor on the GPU, of any dtype; its bytes are overwritten.
    """

    path: Path
    offset: int
    target: torch.Tensor


class FileStager:
    """Pinned buffers and threads for one GPU; keep it while a model loads."""

    def __init__(self, device: torch.device, num_threads: int = NUM_THREADS, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="hasten-load")
        self._buffers: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Stream]] = queue.SimpleQueue()
        for _ in range(num_threads):
            pinned = torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=True)
            self._buffers.put((pinned, torch.cuda.Stream(device)))

    def read(self, parts: Sequence[FilePart]) -> None:
        """Fills every part's target.

        Raises:
            OSError: a file cannot be read, or ends before its part does.
        """
        torch.cuda.current_stream(self._device).synchronize()  # what used the targets' memory before is done
        with _opened({part.path for part in parts}) as files:
            jobs = [
                self._pool.submit(self._read_chunk, files[part.path], offset, target)
                for part in parts
                for offset, target in self._chunks(part)
            ]
            errors = [error for job in jobs if (error := job.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        self._pool.shutdown()

    def _chunks(self, part: FilePart) -> Iterator[tuple[int, torch.Tensor]]:
        target_bytes = part.target.view(-1).view(torch.uint8)
        for start in range(0, target_bytes.numel(), self._chunk_bytes):
            yield part.offset + start, target_bytes[start : start + self._chunk_bytes]

    def _read_chunk(self, file: int, offset: int, target: torch.Tensor) -> None:
        buffer, stream = self._buffers.get()
        try:
            chunk = buffer[: target.numel()]
            _read_fully(file, chunk.numpy().data, offset)
            # a target made in inference mode may be written in that mode only, which each thread has its own
            with torch.inference_mode(), torch.cuda.stream(stream):
                target.copy_(chunk, non_blocking=True)
            stream.synchronize()
        finally:
            self._buffers.put((buffer, stream))


@contextmanager
def _opened(paths: set[Path]) -> Iterator[dict[Path, int]]:
    files: dict[Path, int] = {}
    try:
        for path in paths:
            files[path] = os.open(path, os.O_RDONLY)
        yield files
    finally:
        for file in files.values():
            os.close(file)


def _read_fully(file: int, target: memoryview, offset: int) -> None:
    while target:
        count = os.preadv(file, [target], offset)
        if not count:
            raise OSError("the file ends before the tensor does")
        target, offset = target[count:], offset + count
