"""What every test shares: no window system, and one thread, so that timings and sums are the same everywhere."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
