"""The hot operators of nano3.  Each file holds one: the formula in plain PyTorch first, then what runs.

A public function takes ordinary tensors and runs in any floating dtype, float64 included, on any device.  Import the
function from its file: `from kernels.ssd import ssd`.  This package imports torch and triton only, and it defines no
version of its own (an unrelated PyPI package of the same name is probed for one by transformers).
"""
