"""Evaluation and training mode, for a while: what reads a model does so without dropout, whatever mode the model is in."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode while inside; each in its own again afterwards."""
    with _all_set(root, training=False):
        yield


@contextmanager
def training(root: nn.Module) -> Iterator[None]:
    """Every module in training mode while inside; each in its own again afterwards."""
    with _all_set(root, training=True):
        yield


@contextmanager
def _all_set(root: nn.Module, *, training: bool) -> Iterator[None]:
    others = [module for module in root.modules() if module.training != training]
    for module in others:
        module.training = training
    try:
        yield
    finally:
        for module in others:
            module.training = not training
