"""Pictures of activations: PCA and UMAP, fitted on the base only, every arm projected into the same plane."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mech.errors import InputError


def embed_arms(
    base: Float[np.ndarray, "n d"],
    arms: Mapping[str, Float[np.ndarray, "n d"]],
    method: Literal["pca", "umap"],
    *,
    seed: int,
    n_neighbors: int = 15,
) -> pd.DataFrame:
    """Coordinates of every arm's rows in a plane fitted on the base.

    A plane fitted on each checkpoint, or on all of them, would show the fit and not the change.

    Returns:
        One row an arm and row: `arm`, `row`, `x`, `y`; for PCA also the shares of variance, `x_share`, `y_share`.

    Raises:
        InputError: fewer than four rows, or an unknown method.
    """
    if len(base) < 4:
        raise InputError(f"a picture needs at least four rows, there are {len(base)}")
    if method == "pca":
        return _pca(base, arms)
    if method == "umap":
        return _umap(base, arms, seed=seed, n_neighbors=min(n_neighbors, len(base) - 1))
    raise InputError(f"unknown method {method!r}; there are pca and umap")


def _pca(base: Float[np.ndarray, "n d"], arms: Mapping[str, Float[np.ndarray, "n d"]]) -> pd.DataFrame:
    from sklearn.decomposition import PCA

    fitted = PCA(n_components=2, svd_solver="full").fit(base)
    frame = _frame({arm: fitted.transform(points) for arm, points in arms.items()})
    frame["x_share"], frame["y_share"] = fitted.explained_variance_ratio_
    return frame


def _umap(
    base: Float[np.ndarray, "n d"],
    arms: Mapping[str, Float[np.ndarray, "n d"]],
    *,
    seed: int,
    n_neighbors: int,
) -> pd.DataFrame:
    with _torch_threads_kept(), warnings.catch_warnings():
        # umap says on import that TensorFlow is missing, and on every seeded fit that it runs on one thread.
        warnings.simplefilter("ignore")
        from umap import UMAP

        fitted = UMAP(n_neighbors=n_neighbors, random_state=seed, n_jobs=1).fit(base)
        return _frame({arm: fitted.transform(points) for arm, points in arms.items()})


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """What umap compiles sets OpenMP's threads for the rest of the process: torch's sums would come out otherwise in their last digit."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _frame(planes: Mapping[str, Float[np.ndarray, "n 2"]]) -> pd.DataFrame:
    frames = [
        pd.DataFrame({"arm": arm, "row": np.arange(len(p)), "x": p[:, 0], "y": p[:, 1]})
        for arm, p in planes.items()
    ]
    return pd.concat(frames, ignore_index=True)
