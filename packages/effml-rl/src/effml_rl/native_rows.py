"""Rows of a plain Transformer decoded in C, in float32 on the CPU; where it cannot serve, `effml_rl.torch_rows` does.

A step of torch is some hundred operations of a few microseconds each whatever their size, and its products round
differently with the number of rows. `native_rows.c` does a step in one call per thread, and what it computes of a row
is bit by bit the same in every batch, on any number of threads: sums run in an order that no other row changes, nothing
is padded, and keys lie in pages of 16 positions that are gone through one after the other.

State: the weights once more, in panels as products read them, and 2 x layers x kv_heads x head_dim x 4 bytes per
position. The pages of a prompt are shared by its rows, except the last, which each goes on to fill for itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from effml_shared.layers import ACTIVATIONS, alibi_bias, rotary_tables
from effml_shared.native import library
from torch import Tensor, nn

from effml_rl.plain_transformer import PlainTransformer, plain_transformer

__all__ = ["NativeRows", "native_rows", "one_torch_thread"]

# Above this, torch serves: it can split a product among threads by columns, and need not hold the weights twice.
MAX_WEIGHTS = 10**8
# Fewer rows would leave a core's multipliers idle while each thread reads all weights.
ROWS_PER_THREAD = 4

_SOURCE = Path(__file__).with_name("native_rows.c")
_NORMS = ("rms", "layer")  # in the order of native_rows.c, as are
_GATES = [ACTIVATIONS[name] for name in ("relu", "swiglu", "gelu", "gelu_tanh")]


def _integers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names.split()]


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


class _Model(ctypes.Structure):
    """As in native_rows.c."""

    _fields_ = (
        *_integers("n_layers d_model n_heads kv_heads head_dim d_ff width"),
        *_integers("norm before norm_all_heads activation gated"),
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_double),
        *_pointers("layers embedding norm_weight head cos sin slopes"),
    )


class _Tokens(ctypes.Structure):
    """As in native_rows.c."""

    _fields_ = (
        *_pointers("ids positions pages"),
        *_integers("most_pages"),
        *_pointers("row logits"),
    )


def native_rows(model: nn.Module, max_new_tokens: int) -> NativeRows | None:
    """Return a decoder of at most max_new_tokens per row; None: the model, its weights or the machine is another."""
    plain = plain_transformer(model)
    if plain is None or torch.is_autocast_enabled("cpu"):
        return None
    if sum(weight.numel() for weight in plain.weights.values()) > MAX_WEIGHTS:
        return None
    for weight in plain.weights.values():
        if type(weight) is not Tensor or weight.dtype != torch.float32 or weight.device.type != "cpu":
            return None
    kernels = library(_SOURCE, fused=True)
    return None if kernels is None else NativeRows(plain, max_new_tokens, kernels)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread for a while, as is best around the steps of `NativeRows`, which has threads of its own.

    Torch's threads wait for their next operation by spinning, on the very cores that others then have to share.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class NativeRows:
    """As `effml_rl.torch_rows.TorchRows`, which see, on as many threads as torch has when this is made."""

    def __init__(self, plain: PlainTransformer, max_new_tokens: int, kernels: Any) -> None:
        self.config, self.max_new_tokens, self._kernels = plain.config, max_new_tokens, kernels
        self._columns, self._page, self._chunk = (
            ctypes.c_int64.in_dll(kernels, f"native_rows_{name}").value for name in ("columns", "page", "chunk")
        )
        self._alive: list[Tensor] = []  # what the structures point to
        self._rooms: list[Tensor] = []
        self._model = self._describe(plain)
        config = self.config
        self._page_size = 2 * config.n_layers * config.kv_heads * config.head_dim * self._page
        self._row_pages = torch.empty(0, -(-(self._page + max_new_tokens) // self._page), self._page_size)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads - 1) if self._threads > 1 else None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts in place of any earlier ones, and return the logits (prompts, vocab) that follow each."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        used = (lengths + self._page - 1) // self._page
        ends = used.cumsum(0)
        most = int(lengths.max()) + self.max_new_tokens
        if self.config.position == "rope":
            tables = rotary_tables(torch.arange(most)[None], self.config.head_dim, self.config.rope_base, torch.float32)
            self._tables = [table.contiguous() for table in tables]
            self._model.cos, self._model.sin = (table.data_ptr() for table in self._tables)
        self._prompt_pages = torch.empty(int(ends[-1]), self._page_size)
        place = (ends - used)[:, None] + torch.arange(-(-most // self._page))
        self._lengths, self._last = lengths, ends - 1
        self._prompt_table = self._addresses(self._prompt_pages, place)

        ids = torch.tensor([i for prompt in prompts for i in prompt])
        positions = torch.cat([torch.arange(n) for n in lengths.tolist()])
        row = torch.full_like(ids, -1)
        row[lengths.cumsum(0) - 1] = torch.arange(len(prompts))
        logits = torch.empty(len(prompts), self._padded(self.config.rows))
        share = lengths.cumsum(0) * self._threads // (len(ids) + 1)  # a prompt's tokens stay on one thread
        cuts = [0, *(int(lengths[share <= thread].sum()) for thread in range(self._threads))]
        self._forward(ids, positions, self._prompt_table.repeat_interleave(lengths, 0), row, logits, cuts)
        return logits[:, : self.config.vocab_size]

    def start(self, prompts: Tensor) -> None:
        """Begin rows after these prompts, by number, in place of any earlier rows."""
        self._positions = self._lengths[prompts]
        whole = self._positions // self._page  # pages that nothing more is written to
        if len(self._row_pages) < len(prompts):
            self._row_pages = torch.empty(len(prompts), *self._row_pages.shape[1:])
        self._row_pages[: len(prompts), 0] = self._prompt_pages[self._last[prompts]]  # no use where the last is whole
        index = torch.arange(self._prompt_table.shape[1]) - whole[:, None]
        first = self._row_pages.shape[1] * torch.arange(len(prompts))[:, None]
        mine = self._addresses(self._row_pages, first + index)
        self._table = torch.where(index < 0, self._prompt_table[prompts], mine)
        self._logits = torch.empty(len(prompts), self._padded(self.config.rows))
        self._numbers = torch.arange(len(prompts))

    def step(self, ids: Tensor, kept: Tensor | None = None) -> Tensor:
        """Append ids (rows,) to the rows numbered `kept` of the last step, and return logits (rows, vocab).

        The other rows leave. None: all rows are kept. The logits are overwritten by the next step.
        """
        if kept is not None:
            self._positions, self._table = self._positions[kept], self._table[kept]
        rows = len(ids)
        threads = min(self._threads, -(-rows // ROWS_PER_THREAD))
        cuts = [rows * thread // threads for thread in range(threads + 1)]
        self._forward(ids, self._positions, self._table, self._numbers, self._logits, cuts)
        self._positions = self._positions + 1
        return self._logits[:rows, : self.config.vocab_size]

    def _forward(
        self, ids: Tensor, positions: Tensor, table: Tensor, row: Tensor, logits: Tensor, cuts: list[int]
    ) -> None:
        """Do tokens cuts[i] .. cuts[i + 1] - 1 on thread i."""
        tokens = _Tokens(*(x.data_ptr() for x in (ids, positions, table)), table.shape[1], row.data_ptr())
        tokens.logits = logits.data_ptr()
        arguments = ctypes.byref(self._model), ctypes.byref(tokens)
        scratch = self._scratch(table.shape[1] * self._page)

        def run(thread: int) -> None:
            bounds = ctypes.c_int64(cuts[thread]), ctypes.c_int64(cuts[thread + 1])
            self._kernels.forward(*arguments, *bounds, ctypes.c_void_p(scratch[thread].data_ptr()))

        working = [thread for thread in range(len(cuts) - 1) if cuts[thread] < cuts[thread + 1]]
        others = [self._pool.submit(run, thread) for thread in working[1:]] if self._pool is not None else []
        run(working[0])
        for other in others:
            other.result()

    def _scratch(self, keys: int) -> list[Tensor]:
        """Return room for one chunk of tokens, and the logits of one query over so many keys, for each thread."""
        config = self.config
        qkv = self._padded(config.d_model + 2 * config.kv_heads * config.head_dim)
        wide = max(qkv, self._padded(config.ff_dim) * (2 if config.mlp == "swiglu" else 1))
        size = self._chunk * (3 * self._padded(config.d_model) + wide) + keys
        if not self._rooms or len(self._rooms[0]) < size:
            self._rooms = [torch.empty(size) for _ in range(self._threads)]
        return self._rooms

    def _describe(self, plain: PlainTransformer) -> _Model:
        config, weights = plain
        model = _Model(config.n_layers, config.d_model, config.n_heads, config.kv_heads, config.head_dim, config.ff_dim)
        model.width, model.norm, model.before = config.rows, _NORMS.index(config.norm), config.norm_position == "pre"
        model.norm_all_heads, model.gated = config.qk_norm == "full", config.mlp == "swiglu"
        model.activation = _GATES.index(ACTIVATIONS[config.mlp])
        model.eps = config.norm_eps
        model.scale = config.n_layers**-0.5 if config.residual_scale == "depth" else 1.0
        layers = [self._layer(weights, f"model.layers.{i}.") for i in range(config.n_layers)]
        model.layers = self._pointer(torch.tensor(layers))
        model.embedding = self._pointer(weights["model.embed_tokens.weight"])
        model.norm_weight = self._pointer(weights["model.norm.weight"])
        head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        model.head = self._pointer(self._packed(weights[head]))
        if config.position == "alibi":
            model.slopes = self._pointer(alibi_bias(config.n_heads, torch.ones(1, 1, 1)))
        return model

    def _layer(self, weights: dict[str, Tensor], layer: str) -> list[int]:
        """Return addresses, in the order of native_rows.c."""

        def of(name: str) -> Tensor | None:
            return weights.get(f"{layer}{name}")

        def some(names: str) -> list[Tensor]:
            return [weight for name in names.split() if (weight := of(name)) is not None]

        attention = "self_attn.{0}_proj.weight"
        fused = torch.cat([weights[layer + attention.format(name)] for name in "qkv"])
        up = [self._packed(weight) for weight in some("mlp.gate_proj.weight mlp.up_proj.weight")]
        bias = [F.pad(b, (0, self._padded(len(b)) - len(b))) for b in some("mlp.gate_proj.bias mlp.up_proj.bias")]
        tensors = (
            of("input_layernorm.weight"),
            self._packed(fused),
            of("self_attn.q_norm.weight"),
            of("self_attn.k_norm.weight"),
            self._packed(weights[layer + attention.format("o")]),
            of("post_attention_layernorm.weight"),
            torch.cat(up),
            torch.cat(bias) if bias else None,
            self._packed(weights[f"{layer}mlp.down_proj.weight"]),
            of("mlp.down_proj.bias"),
        )
        return [0 if tensor is None else self._pointer(tensor) for tensor in tensors]

    def _padded(self, width: int) -> int:
        return -(-width // self._columns) * self._columns

    def _packed(self, weight: Tensor) -> Tensor:
        """Return a weight (width, depth) as panels (panels, depth, columns)."""
        whole = F.pad(weight, (0, 0, 0, self._padded(len(weight)) - len(weight)))
        return whole.unflatten(0, (-1, self._columns)).mT.contiguous()

    def _pointer(self, tensor: Tensor) -> int:
        self._alive.append(tensor.contiguous())
        return self._alive[-1].data_ptr()

    def _addresses(self, pages: Tensor, index: Tensor) -> Tensor:
        return pages.data_ptr() + index * self._page_size * pages.itemsize
