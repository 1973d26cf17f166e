"""Tensor descriptors: how kernels ask the copy engine (TMA) for tiles."""

import threading

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_thread = threading.local()


def describable(t: Tensor) -> bool:
    """Whether the copy engine can read t: unit last stride, address and all other strides in multiples of 16 bytes.

    It refuses a stride of 0, that of an expanded tensor.  Along a dimension of length 1 nobody steps: any will do.
    """
    size = t.element_size()
    steps = [n * size for n, length in zip(t.stride()[:-1], t.shape[:-1], strict=True) if length != 1]
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(n > 0 and n % 16 == 0 for n in steps)


def readable(t: Tensor) -> Tensor:
    """t itself if it is describable, else a copy: contiguous() would give back what only begins at a wrong address."""
    return t if describable(t) else t.clone(memory_format=torch.contiguous_format)


def descriptor(
    t: Tensor, block: list[int], shape: list[int] | None = None, strides: list[int] | None = None
) -> TensorDescriptor:
    """A descriptor of blocks of t, or of the tensor of that shape and those strides (in elements) at t's address."""
    if t.is_cuda:
        _attach(t.device.index)
    if strides is None:  # the engine checks even the stride of a dimension of length 1, which may be anything
        legal = 128 * t.shape[-1] * t.shape[-2]
        strides = [legal if n == 1 else stride for n, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
        strides.append(t.stride(-1))
    return TensorDescriptor(t, list(t.shape) if shape is None else shape, strides, block)


def _attach(device: int) -> None:
    """Make the device's context current in this thread: filling a descriptor is a driver call and needs one.

    Any launch or runtime call does that, but a backward pass runs in a thread of its own, and its first act there may
    be to fill a descriptor.
    """
    attached = _thread.__dict__.setdefault("attached", set())
    if device not in attached:
        torch.cuda.mem_get_info(device)  # the cheapest runtime call that asks for the context
        attached.add(device)
