"""Benchmarks: ours, the best peer and the floor in one run.  `python -m benchmarks.kernels_<name>` in the source."""

import os

# as train.py does
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
