"""Threads of the numeric libraries, set before they are loaded: several tests run side by side on few cores.

With more threads than cores they wait for one another, and a small update takes ten times as long.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
