"""Which attention kernels PyTorch may choose from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def attention_for_any_shape() -> Iterator[None]:
    """No attention kernel that prepares itself anew for each shape, while inside.

    cuDNN's does, for about half a second, and PyTorch prefers it on recent GPUs, also where there is a mask (its 2.11 does); here nearly
    every pass has a shape of its own.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # noqa: FBT003 (torch takes it so)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
