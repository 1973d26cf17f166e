"""Benchmarks: ours, the best peer and the floor in one run.  `python -m benchmarks.kernels_<name>` in the source."""

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.py does
