"""Settings for all tests: operators wait without spinning, so that tests do not fight for the cores."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
