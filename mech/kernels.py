"""Which attention kernels PyTorch may choose from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def attention_for_any_shape() -> Iterator[None]:
    """While inside, PyTorch does not choose cuDNN's attention kernel.

    That kernel is compiled anew for each shape, which takes about half a second, and here nearly every pass has a shape of its own. PyTorch
    prefers it on recent GPUs; its version 2.11 does so also where there is a mask.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # noqa: FBT003 (torch takes it so)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
