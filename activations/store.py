"""Reading activation files: one file, or a folder of them read as one.

The format is specified in docs/activation-format.md. Nothing is guessed: what is missing, altered or of another
version is an error that names the file and the place in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int

from activations.pooling import TOKENS
from activations.store_format import Place, Rows, dataset_path
from activations.store_join import agreeing_metadata, check_belong_together, join_rows, row_indices, row_mask
from activations.store_shard import Shard, split_by
from activations.store_verify import Problem, shard_problems
from activations.store_writer import ShardWriter, WriterOptions
from mech.errors import FileFormatError, InputError
from mech.files import sha256_file

if TYPE_CHECKING:
    import torch

__all__ = ["ActivationStore", "Problem", "Rows", "ShardWriter", "WriterOptions", "describe"]

LayerSelection = int | np.integer[Any] | Sequence[int] | None
RowSelection = slice | np.ndarray | Sequence[int] | None
Where = Callable[[Rows], np.ndarray] | Mapping[str, Any] | None


class ActivationStore:
    """Activations on disk, opened for reading; a context manager.

    Files are opened in the process that reads them, so a store may be pickled or cross a fork.
    """

    def __init__(self, files: Sequence[Path], *, locking: bool = True) -> None:
        self.files = list(files)
        self._shards = [Shard(file, locking=locking) for file in self.files]
        self._header = self._shards[0].header
        self._rows: Rows | None = None

    @classmethod
    def open(cls, path: Path | str, *, locking: bool = True) -> "ActivationStore":
        """Open a file, or a folder of files in the order of their names.

        Args:
            path: where.
            locking: HDF5's file locks. NFS and SMB mounts without locks fail with errno 11 or 37: pass False there, and
                never read what is still being written. The variable HDF5_USE_FILE_LOCKING overrides this.

        Raises:
            FileFormatError: nothing there, or files that are not of this format, do not belong together, or lack one
                of their number.
        """
        path = Path(path)
        files = sorted(path.glob("*.h5")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise FileFormatError(f"{path}: no activation files there: capture first")
        store = cls(files, locking=locking)
        try:
            check_belong_together(store._shards, whole=path.is_dir())
        except BaseException:
            store.close()
            raise
        return store

    # -- what is in it ---------------------------------------------------------------------------

    @property
    def metadata(self) -> dict[str, Any]:
        """What made the file; of several files, the entries that they share."""
        return agreeing_metadata(self._shards)

    @property
    def rows(self) -> Rows:
        """The rows of all files, in order."""
        if self._rows is None:
            self._rows = join_rows(self._shards)
        return self._rows

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(shard.header.n_rows for shard in self._shards)

    @property
    def sites(self) -> list[str]:
        """Sites."""
        return list(self._header.sites)

    @property
    def poolings(self) -> list[str]:
        """Poolings."""
        return list(self._header.poolings)

    @property
    def layers(self) -> list[int]:
        """Layers, ascending; 0-based block outputs."""
        return list(self._header.layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self._header.d_model

    @property
    def dtype(self) -> str:
        """`float32` or `bfloat16`: the precision on disk. What is read is always float32."""
        return self._header.logical_dtype

    # -- reading ---------------------------------------------------------------------------------

    def read(
        self,
        site: str,
        pooling: str,
        layers: LayerSelection = None,
        rows: RowSelection = None,
        *,
        where: Where = None,
    ) -> Float32[np.ndarray, "n *layers d"]:
        """Vectors as float32.

        Args:
            site: such as `resid_post`.
            pooling: such as `prompt_last`; for `tokens` see `read_tokens`.
            layers: one layer gives [n, d]; several, or all when left out, give [n, layers, d].
            rows: indices in any order, a boolean mask, or a slice; all when left out.
            where: instead of `rows`, a function from the rows' table to a boolean mask, or a value (or list of
                values) for a column, `id` or `question`: `{"sign": 1, "question": ["q1", "q2"]}`.

        Raises:
            InputError: a site, pooling, layer, row or column that is not there; the message lists what is.
            FileFormatError: a file is damaged; the message names it and the place in it.
        """
        if pooling == TOKENS:
            raise InputError("pooling 'tokens' has one vector a token, not one a row: use read_tokens")
        chosen = self._layers(site, pooling, layers)
        out = self._read(site, pooling, chosen, self._indices(rows, where))
        return out[:, 0] if _is_one(layers) else out

    def read_tokens(
        self,
        site: str,
        layers: LayerSelection = None,
        rows: RowSelection = None,
        *,
        where: Where = None,
    ) -> list[Float32[np.ndarray, "_ *layers d"]]:
        """The vectors of every token: for each chosen row an array [its tokens, layers, d] (or [its tokens, d]).

        The arguments and errors are those of `read`.
        """
        chosen = self._layers(site, TOKENS, layers)
        wanted = self._indices(rows, where)
        out = self._read(site, TOKENS, chosen, self.rows.vectors_of(wanted))
        parts = np.split(out, np.cumsum(self.rows.n_tokens[wanted])[:-1]) if len(wanted) else []
        return [p[:, 0] if _is_one(layers) else p for p in parts]

    def chunks(
        self, site: str, pooling: str, layers: LayerSelection = None, *, size: int = 1024
    ) -> Iterator[Float32[np.ndarray, "n *layers d"]]:
        """What `read` gives, the rows in runs of `size`: for stores bigger than memory."""
        for rows in self._runs(size):
            yield self.read(site, pooling, layers, rows)

    def token_chunks(
        self, site: str, layers: LayerSelection = None, *, size: int = 64
    ) -> Iterator[list[Float32[np.ndarray, "_ *layers d"]]]:
        """What `read_tokens` gives, the rows in runs of `size`."""
        for rows in self._runs(size):
            yield self.read_tokens(site, layers, rows)

    def tokens(self, row: int) -> Int[np.ndarray, " tokens"]:
        """The token ids that the model read in one row."""
        return self.rows.tokens[int(self._indices([row], None)[0])]

    def to_torch(
        self,
        site: str,
        pooling: str,
        layers: LayerSelection = None,
        rows: RowSelection = None,
        *,
        where: Where = None,
    ) -> "torch.Tensor":
        """What `read` gives, as a float32 tensor on the CPU."""
        import torch

        return torch.from_numpy(self.read(site, pooling, layers, rows, where=where))

    def to_numpy(
        self,
        site: str,
        pooling: str,
        layers: LayerSelection = None,
        rows: RowSelection = None,
        *,
        where: Where = None,
    ) -> Float32[np.ndarray, "n *layers d"]:
        """What `read` gives: it is numpy's already."""
        return self.read(site, pooling, layers, rows, where=where)

    def to_xarray(
        self,
        site: str,
        pooling: str,
        layers: LayerSelection = None,
        rows: RowSelection = None,
        *,
        where: Where = None,
    ) -> Any:
        """What `read` gives, labelled by row, layer and feature (extra `xarray`). See `store_export`."""
        from activations.store_export import to_xarray

        return to_xarray(self, site, pooling, layers, self._indices(rows, where))

    def export(self, path: Path | str) -> None:
        """Write everything as `.npz`, `.safetensors` or persona_vectors' `.pt`; the store must fit in memory. See `store_export`."""
        from activations.store_export import export

        export(self, Path(path))

    # -- checking --------------------------------------------------------------------------------

    def verify(self, digests: Mapping[str, str] | None = None) -> list[Problem]:
        """Read everything back: checksums, shapes, values that are not finite, the format's rules. An empty list is a sound store.

        Args:
            digests: SHA-256 of each file by its name, as a manifest holds them: it must name the files that are there, and no other.
        """
        problems = []
        for shard in self._shards:
            expected = (digests or {}).get(shard.path.name)
            if digests and not expected:
                problems.append(Problem(shard.path, "/", "not in the manifest"))
            elif expected and sha256_file(shard.path) != expected:
                problems.append(Problem(shard.path, "/", "not the bytes of the manifest (SHA-256 differs)"))
            problems += shard_problems(shard)
        for name in sorted(set(digests or {}) - {file.name for file in self.files}):
            problems.append(
                Problem(self.files[0].parent / name, "/", "in the manifest, and not in this store")
            )
        return problems

    def require(self, **facts: Any) -> None:
        """Refuse a store made by something else than expected: `require(d_model=576, checkpoint=...)`.

        Raises:
            FileFormatError: `d_model` or a metadata entry differs or is missing; the message names it.
        """
        known = {**self.metadata, "d_model": self.d_model}
        for name, expected in facts.items():
            found = known.get(name, "(missing)")
            if name not in known or found != expected:
                raise FileFormatError(
                    f"{self.files[0]}: /metadata: made with {name} = {found!r}, expected {expected!r}: "
                    "this is not the store you mean"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> "ActivationStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside ----------------------------------------------------------------------------------

    def _layers(self, site: str, pooling: str, layers: LayerSelection) -> list[int]:
        chosen = self.layers if layers is None else np.atleast_1d(np.asarray(layers)).tolist()
        for layer in chosen:
            if type(layer) is not int or (site, pooling, layer) not in self._header.places:
                raise InputError(
                    f"{self.files[0]}: no {dataset_path(site, pooling, layer)}; there are sites {self.sites}, "
                    f"poolings {self.poolings}, layers {_in_words(self.layers)}"
                )
        return chosen

    def _runs(self, size: int) -> Iterator[slice]:
        if size < 1:
            raise InputError(f"chunks of {size} rows: the size must be 1 or more")
        yield from (slice(start, start + size) for start in range(0, self.n_rows, size))

    def _indices(self, rows: RowSelection, where: Where) -> Int[np.ndarray, " n"]:
        if where is None:
            return row_indices(rows, self.n_rows)
        if rows is not None:
            raise InputError("give rows or where, not both")
        return row_indices(row_mask(self.rows, where), self.n_rows)

    def _read(
        self, site: str, pooling: str, layers: Sequence[int], wanted: Int[np.ndarray, " n"]
    ) -> Float32[np.ndarray, "n layers d"]:
        """Read in ascending order, file by file, and hand out in the caller's order."""
        as_is = bool((np.diff(wanted) > 0).all())
        ascending, order = (wanted, wanted) if as_is else np.unique(wanted, return_inverse=True)
        width = self._header.width(site)
        out = np.empty((len(wanted), len(layers), width), dtype=np.float32)
        lengths = [shard.n_vectors(pooling) for shard in self._shards]
        # One layer in ascending order goes straight to its place, without a copy.
        direct = as_is and len(layers) == 1
        buffer = out[:, 0] if direct else np.empty((len(ascending), width), dtype=np.float32)
        for i, layer in enumerate(layers):
            for file, part, first in split_by(lengths, ascending):
                place: Place = (site, pooling, layer)
                self._shards[file].read_into(buffer[part], place, ascending[part] - first)
            if not direct:
                out[:, i] = buffer if as_is else buffer[order]
        return out


def describe(path: Path | str) -> dict[str, Any]:
    """What is in an activation file or a folder of them, for people."""
    with ActivationStore.open(path) as store:
        return {
            "file": str(path),
            "files": len(store.files),
            "n_rows": store.n_rows,
            "n_tokens": int(store.rows.n_tokens.sum()),
            "sites": store.sites,
            "poolings": store.poolings,
            "layers": store.layers,
            "d_model": store.d_model,
            "dtype": store.dtype,
            "bytes": sum(f.stat().st_size for f in store.files),
            "columns": sorted(store.rows.columns),
            "metadata": store.metadata,
        }


def _in_words(layers: list[int]) -> str:
    gapless = layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if gapless else str(layers)


def _is_one(layers: LayerSelection) -> bool:
    return isinstance(layers, (int, np.integer))
