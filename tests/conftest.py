"""Settings for all tests.

Operators use one thread and wait without spinning, so that tests do not fight for the cores.
Interrupts are on: a shell that starts the tests in the background ignores SIGINT, and so would
the programs that the tests start and interrupt. Without a GPU, Triton's kernels are interpreted; that
is decided when a kernel is defined, so before any test module is imported.
"""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)
