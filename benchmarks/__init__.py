"""Benchmarks: ours, the best peer and the floor in one run.  `python -m benchmarks.kernels_<name>` in the source."""
