"""A folder of embeddings of several modalities, with numbers that say which belong together.

    image-00000.safetensors   x (n, d) and pair (n) int64: rows of the modality "image", and whose they are
    text-00000.safetensors    the same of "text"; several captions may have the number of one image
    manifest.json             what the folder holds; written last, so that what was interrupted is never mistaken

Reading memory-maps the shards: 8 bytes per row are in memory, and the rows that are taken are read. Writing holds one
shard per modality.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError, DataError
from effml_shared.files import replacing, write_whole
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from effml_eval.activations.embedding_checks import check_embeddings, match_pairs

__all__ = ["EmbeddingShards", "ShardWriter", "save_embeddings"]

FORMAT = "effml-embeddings-1"
_MANIFEST = "manifest.json"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ShardWriter:
    """Write embeddings into a new folder, as a context manager; the folder is complete when it is left.

    Args:
        directory: made if it is missing; it must not hold embeddings yet.
        rows_per_shard: the last shard of a modality may be smaller.
        dtype: that rows are stored in.

    Raises:
        ConfigError: the folder holds embeddings already, or an argument is out of range.
    """

    def __init__(
        self, directory: str | Path, *, rows_per_shard: int = 1 << 16, dtype: torch.dtype = torch.float32
    ) -> None:
        check_count("rows_per_shard", rows_per_shard, 1)
        check_choice("dtype", dtype, _DTYPES)
        self.directory, self.rows_per_shard, self.dtype = Path(directory), rows_per_shard, dtype
        if (self.directory / _MANIFEST).exists():
            raise ConfigError(f"directory: got {directory}, which holds embeddings, expected a new one")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.dim: int | None = None
        self._pending: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._rows: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []

    def add(self, modality: str, x: Tensor, pair: Tensor | None = None) -> None:
        """Append rows (n, d) of a modality and their pair numbers (n); None: they are numbered as they come.

        Raises:
            ConfigError: a row is not finite or zero, shapes do not fit, or the modality cannot name a file.
            CheckpointError: a shard cannot be written.
        """
        if not modality.isidentifier():
            raise ConfigError(f"modality: got {modality!r}, expected a name of letters, digits and underscores")
        x = x.detach().to("cpu", self.dtype, copy=True)
        start = self._rows.get(modality, 0)
        name = f"{modality} from row {start}, as {self.dtype}"
        check_embeddings(x, dim=self.dim, name=name, warn_of_constants=False)
        numbers = (
            torch.arange(start, start + len(x)) if pair is None else pair.detach().to("cpu", torch.int64, copy=True)
        )
        if numbers.shape != (len(x),):
            raise ConfigError(f"pair: got shape {tuple(numbers.shape)}, expected ({len(x)},)")
        self.dim, self._rows[modality] = x.shape[1], start + len(x)
        self._pending.setdefault(modality, []).append((x, numbers))
        if sum(len(rows) for rows, _ in self._pending[modality]) >= self.rows_per_shard:
            self._write(modality, whole_shards=True)

    def _write(self, modality: str, *, whole_shards: bool) -> None:
        x, pair = (torch.cat(parts) for parts in zip(*self._pending.pop(modality), strict=True))
        size = self.rows_per_shard
        end = len(x) - len(x) % size if whole_shards else len(x)
        for start in range(0, end, size):
            number = sum(shard["modality"] == modality for shard in self._shards)
            path = self.directory / f"{modality}-{number:05d}.safetensors"
            rows = slice(start, min(start + size, end))
            with replacing(path) as partial:
                save_file({"x": x[rows].contiguous(), "pair": pair[rows].contiguous()}, partial)
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            found = {"file": path.name, "modality": modality, "rows": rows.stop - start, "sha256": content}
            self._shards.append(found)
        if end < len(x):
            self._pending[modality] = [(x[end:].clone(), pair[end:].clone())]

    def close(self) -> None:
        """Write what is left, and the manifest.

        Raises:
            ConfigError: nothing was added.
            CheckpointError: a shard or the manifest cannot be written.
        """
        for modality in list(self._pending):
            self._write(modality, whole_shards=False)
        if not self._shards:
            raise ConfigError("embeddings: got none to write, expected at least one row")
        dtype = str(self.dtype).removeprefix("torch.")
        manifest = {"format": FORMAT, "dim": self.dim, "dtype": dtype, "shards": self._shards}
        write_whole(self.directory / _MANIFEST, json.dumps(manifest, indent=1))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()


class EmbeddingShards:
    """Read what a `ShardWriter` wrote.

    Attributes:
        dim: d.
        dtype: of the rows.
        sizes: rows of each modality.
        fingerprint: JSON values that change with what the folder holds.

    Raises:
        DataError: the folder is missing, incomplete or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        manifest = self._manifest()
        self.dim: int = manifest["dim"]
        self.fingerprint: dict[str, Any] = {"embeddings": manifest["shards"], "dim": self.dim}
        self._x: dict[str, list[Tensor]] = {}
        self._pair: dict[str, list[Tensor]] = {}
        for shard in manifest["shards"]:
            x, pair = self._open(shard)
            self._x.setdefault(shard["modality"], []).append(x)
            self._pair.setdefault(shard["modality"], []).append(pair)
        self.dtype = next(iter(self._x.values()))[0].dtype
        self._starts = {name: np.cumsum([0, *map(len, shards)]) for name, shards in self._x.items()}
        self.sizes = {name: int(starts[-1]) for name, starts in self._starts.items()}

    def _manifest(self) -> Any:
        path = self.directory / _MANIFEST
        try:
            manifest = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: got {error}, expected the manifest of whole, finished embeddings") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"{path}: got another format, expected {FORMAT}")
        shards = manifest.get("shards")
        kinds = {"file": str, "modality": str, "rows": int}
        whole = isinstance(shards, list) and all(
            isinstance(shard, dict) and all(isinstance(shard.get(name), kind) for name, kind in kinds.items())
            for shard in shards
        )
        if not whole or not shards or not isinstance(manifest.get("dim"), int):
            raise DataError(f"{path}: got a damaged manifest, expected dim, and file, modality and rows of each shard")
        return manifest

    def _open(self, shard: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        path = self.directory / Path(shard["file"]).name
        try:
            with safe_open(path, framework="pt") as file:
                x, pair = file.get_tensor("x"), file.get_tensor("pair")
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path}: got {error}, expected a readable, whole shard") from None
        if x.shape != (shard["rows"], self.dim) or pair.shape != (shard["rows"],):
            raise DataError(f"{path}: got {tuple(x.shape)}, expected ({shard['rows']}, {self.dim}) as in the manifest")
        return x, pair

    def take(self, modality: str, rows: NDArray[np.int64]) -> Tensor:
        """Return rows (n) of a modality, (n, d), in any order.

        Raises:
            ConfigError: there is no such modality or row.
        """
        check_choice("modality", modality, self.sizes)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.sizes[modality]:
            raise ConfigError(f"rows: got {rows.min()} to {rows.max()}, expected 0 to {self.sizes[modality] - 1}")
        starts = self._starts[modality]
        owners = np.searchsorted(starts, rows, side="right") - 1
        taken = torch.empty(len(rows), self.dim, dtype=self.dtype)
        for shard in np.unique(owners):
            here = np.flatnonzero(owners == shard)
            taken[torch.from_numpy(here)] = self._x[modality][shard][torch.from_numpy(rows[here] - starts[shard])]
        return taken

    def pairs(self, first: str, second: str, *, chunk: int = 4096) -> Iterator[tuple[Tensor, Tensor]]:
        """Return pairs of rows, (at most chunk, d) of each modality at a time, in the order of the second.

        Raises:
            ConfigError: there is no such modality, or a row has no partner; see `match_pairs`.
        """
        check_count("chunk", chunk, 1)
        for modality in (first, second):
            check_choice("modality", modality, self.sizes)
        ids, others = (torch.cat(self._pair[modality]).numpy() for modality in (first, second))
        partners = match_pairs(ids, others, names=(first, second))
        places = np.arange(len(partners))
        cuts = range(0, len(places), chunk)
        return (
            (self.take(first, partners[start : start + chunk]), self.take(second, places[start : start + chunk]))
            for start in cuts
        )


def save_embeddings(
    embed: Mapping[str, Callable[[Any], Tensor]],
    batches: Iterable[tuple[str, Any, Tensor | None]],
    directory: str | Path,
    *,
    rows_per_shard: int = 1 << 16,
    dtype: torch.dtype = torch.float32,
) -> EmbeddingShards:
    """Embed batches of inputs and store the rows.

    Args:
        embed: what makes rows (n, d) from a batch, for each modality.
        batches: (modality, batch, pair numbers (n) or None) each.
        directory, rows_per_shard, dtype: as `ShardWriter`.

    Raises:
        ConfigError: as `ShardWriter`, or a modality has nothing that embeds it.
    """
    with ShardWriter(directory, rows_per_shard=rows_per_shard, dtype=dtype) as writer:
        for modality, batch, pair in batches:
            check_choice("modality", modality, embed)
            writer.add(modality, embed[modality](batch), pair)
    return EmbeddingShards(directory)
