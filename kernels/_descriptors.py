"""Tensor descriptors: how kernels ask the copy engine (TMA) for tiles."""

import threading

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_thread = threading.local()


def describable(t: Tensor) -> bool:
    """Whether the copy engine can read t: unit last stride, address and all other strides in multiples of 16 bytes."""
    size = t.element_size()
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in t.stride()[:-1])


def descriptor(
    t: Tensor, block: list[int], shape: list[int] | None = None, strides: list[int] | None = None
) -> TensorDescriptor:
    """A descriptor of blocks of t, or of the tensor of that shape and those strides (in elements) at t's address."""
    if t.is_cuda:
        _attach(t.device.index)
    return TensorDescriptor(t, list(t.shape) if shape is None else shape, strides or list(t.stride()), block)


def _attach(device: int) -> None:
    """Make the device's context current in this thread: filling a descriptor is a driver call and needs one.

    Any launch or runtime call does that, but a backward pass runs in a thread of its own, and its first act there may
    be to fill a descriptor.
    """
    attached = _thread.__dict__.setdefault("attached", set())
    if device not in attached:
        torch.cuda.mem_get_info(device)  # the cheapest runtime call that asks for the context
        attached.add(device)
