"""The sequential passes of a recurrent layer as operators, which a compiler calls and does not look into.

    scan:        what a layer computes in parallel of its input -> outputs, heads, persistent pairs
    solution:    the layer evaluated once more, in parallel, at the scan's result -> that result, with a backward pass
    cotangents:  that backward pass, see `effml_arch.recurrent.tiled_backward`

`torch.compile` would unroll their loops over positions; so it has one node for each, whatever the length, and what
surrounds them is compiled as that of any layer. Eager calls take the same way. Memory between forward and backward
pass: the operands of `solution`, each of which is an input, a weight or a result of the layer, and dropout's masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from effml_arch.recurrent.attention_state import Geometry, group_queries, ungroup_queries
from effml_arch.recurrent.folding import FoldedBlock
from effml_arch.recurrent.form import Form
from effml_arch.recurrent.graphs import GraphCache
from effml_arch.recurrent.pair_bias import PairBias
from effml_arch.recurrent.schedule import schedule
from effml_arch.recurrent.tiled import Queries, Scan, scan
from effml_arch.recurrent.tiled_backward import Cotangents, Solved

__all__ = ["Operands", "check_transforms", "cotangents", "solution", "solve"]


class Operands(NamedTuple):
    """A layer and its input, as all operators take them."""

    x: Tensor  # (batch, seq, d_model)
    q: Tensor  # (batch, heads, seq, head_dim)
    own_k: Tensor  # (batch, kv_heads, seq, head_dim), as own_v
    own_v: Tensor
    weights: list[Tensor]  # those that the form names
    key_valid: Tensor | None  # as doc_ids: see `PairBias`
    doc_ids: Tensor | None
    cos: Tensor | None  # as sin: see `rotary_tables`
    sin: Tensor | None
    kept: Tensor | None  # (2, batch, seq, d_model) bool, False where dropout leaves out what a branch adds
    spec: str  # of the form
    slot: int  # of the first position: the tokens in the cache


def check_transforms(tensors: Iterable[Tensor]) -> None:
    """Raise a `ConfigError` if somebody else than autograd's backward pass is to see through the operators.

    Forward-mode differentiation would silently find nothing; what else `torch.func` does fails in PyTorch itself.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or any(unpack_dual(t).tangent is not None for t in tensors):
        raise ConfigError("backend: got 'tiled' under torch.func or forward-mode autograd, expected 'naive'")


_OPERANDS = (
    "Tensor x, Tensor q, Tensor own_k, Tensor own_v, Tensor[] weights, "
    "Tensor? key_valid, Tensor? doc_ids, Tensor? cos, Tensor? sin, Tensor? kept, str spec, SymInt slot"
)
_COUNT = len(Operands._fields)
GRAPHS = GraphCache()  # of all layers; those of equal form and shape share a recording


class _Problem:
    """Operands in the layout and type of the scan."""

    def __init__(self, operands: Operands) -> None:
        x, q, own_k, own_v = operands[:4]
        form, dtype = Form.from_spec(operands.spec), widen(x[:0]).dtype
        kv_heads = own_k.shape[1]
        self.block = FoldedBlock(form, operands.weights, dtype)
        self.x = x.to(dtype).transpose(0, 1).contiguous()
        own = [t.to(dtype).flatten(0, 1).contiguous() for t in (own_k, own_v)]
        self.queries = Queries(group_queries(q.to(dtype), kv_heads) * form.head_dim**-0.5, *own)
        heads = q.shape[1] if form.alibi else None
        self.bias = PairBias(heads, operands.key_valid, operands.doc_ids, form.window or None)
        self.geometry = Geometry(len(x), q.shape[1] // kv_heads, operands.slot)
        cos, sin, kept = operands.cos, operands.sin, operands.kept
        self.settings: dict[str, Any] = {
            "rotary": None if cos is None or sin is None else (cos, sin),
            "write_mix": form.write_mix,
            "base_block": min(form.base_block, len(self.x)),
            "tiles": schedule(form.schedule, len(self.x), form.base_block),
            "kept": None if kept is None else kept.permute(2, 0, 1, 3),
        }


def _pass(run: Callable[..., tuple[Tensor, ...]], operands: Operands, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Run a sequential pass: by a CUDA graph where the form asks for one, but not on a cache, whose length changes."""
    graphed = Form.from_spec(operands.spec).cuda_graphs and not operands.slot
    return GRAPHS(run, *arguments) if graphed else run(*arguments)


def solve(operands: Operands, past: tuple[Tensor, Tensor] | None, *, with_lse: bool) -> Scan:
    """Run the layer; past: keys and values of the cache (batch, kv_heads, slots, head_dim)."""
    with torch.no_grad():
        return Scan(*_scan(*operands, [] if past is None else list(past), with_lse))


@torch.library.custom_op(
    "effml_arch::recurrent_scan",
    mutates_args=(),
    schema=f"({_OPERANDS}, Tensor[] past, bool with_lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan(*arguments: Any) -> tuple[Tensor, ...]:
    return _pass(_run_scan, Operands(*arguments[:_COUNT]), arguments)


def _run_scan(*arguments: Any) -> tuple[Tensor, ...]:
    operands, (past, with_lse) = Operands(*arguments[:_COUNT]), arguments[_COUNT:]
    with torch.autocast(operands.x.device.type, enabled=False):
        problem = _Problem(operands)
        earlier = tuple(t.to(problem.x.dtype).flatten(0, 1) for t in past) or None
        result = scan(
            problem.block,
            problem.x,
            problem.queries,
            problem.bias,
            problem.geometry,
            past=earlier,
            with_lse=with_lse,
            **problem.settings,
        )
    return *result[:4], problem.x.new_empty(0) if result.lse is None else result.lse


@_scan.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    (x, q, own_k, *_), with_lse = arguments[:_COUNT], arguments[-1]
    batch, kv_heads, n, dim = own_k.shape
    wide = x.new_empty(0, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    z, pairs = (n, batch, x.shape[2]), (batch * kv_heads, n, dim)
    lse = (batch * kv_heads, n * (q.shape[1] // kv_heads), 1) if with_lse else (0,)
    return tuple(wide.new_empty(shape) for shape in (z, z, pairs, pairs, lse))


def solution(z: Tensor, k: Tensor, v: Tensor, operands: Operands, result: Scan) -> Tensor:
    """Return the layer's output (batch, seq, d_model), differentiable once.

    z, k, v: output and persistent pairs (batch, kv_heads, seq, head_dim) as autograd knows them, evaluated in parallel
    at the result's heads and outputs, which are constants to it; so are the x and weights of the operands.
    """
    return _solution(z, k, v, *operands, list(result))


@torch.library.custom_op(
    "effml_arch::recurrent_solution",
    mutates_args=(),
    schema=f"(Tensor z, Tensor k, Tensor v, {_OPERANDS}, Tensor[] result) -> Tensor",
)
def _solution(*arguments: Any) -> Tensor:
    z, result = arguments[0], Scan(*arguments[-1])
    return result.z.transpose(0, 1).to(z.dtype, memory_format=torch.contiguous_format, copy=True)


@_solution.register_fake
def _(*arguments: Any) -> Tensor:
    return arguments[0].new_empty(arguments[0].shape)


@torch.library.custom_op(
    "effml_arch::recurrent_cotangents",
    mutates_args=(),
    schema=f"(Tensor dz, {_OPERANDS}, Tensor[] result) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def cotangents(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the total cotangents of a solution's z, k, v, q, own_k and own_v, in their shapes, float32 or wider."""
    return _pass(_run_cotangents, Operands(*arguments[1:-1]), arguments)


def _run_cotangents(*arguments: Any) -> tuple[Tensor, ...]:
    dz, operands, result = arguments[0], Operands(*arguments[1:-1]), Scan(*arguments[-1])
    with torch.autocast(dz.device.type, enabled=False):
        problem = _Problem(operands)
        solved = Solved(result, problem.bias, problem.geometry, **problem.settings)
        dz = dz.to(problem.x.dtype).transpose(0, 1)
        totals = Cotangents(solved, problem.block, problem.x, problem.queries, dz)
        totals.solve()
    batch, group, _ = problem.geometry
    dk, dv, d_own_k, d_own_v = (
        t.unflatten(0, (batch, -1)) for t in (totals.dk, totals.dv, totals.d_own_k, totals.d_own_v)
    )
    dq = ungroup_queries(totals.dq.mul_(problem.block.head_dim**-0.5), batch, group)
    return totals.dz.transpose(0, 1).contiguous(), dk, dv, dq.contiguous(), d_own_k, d_own_v


@cotangents.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    dz, operands = arguments[0], Operands(*arguments[1:-1])
    wide = torch.float64 if operands.x.dtype == torch.float64 else torch.float32
    like = (dz, operands.own_k, operands.own_k, operands.q, operands.own_k, operands.own_k)
    return tuple(t.new_empty(t.shape, dtype=wide) for t in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    operands, result = Operands(*inputs[3:-1]), inputs[-1]
    ctx.dtypes = [t.dtype for t in (*inputs[:3], *operands[1:4])]
    ctx.weights, ctx.settings = len(operands.weights), operands[-2:]
    ctx.save_for_backward(*operands[:4], *operands.weights, *operands[5:-2], *result)


def _backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
    saved, n = list(ctx.saved_tensors), ctx.weights
    before, weights, masks, result = saved[:4], saved[4 : 4 + n], saved[4 + n : -5], saved[-5:]
    grads = cotangents(dz, *before, weights, *masks, *ctx.settings, result)
    dz, dk, dv, dq, d_own_k, d_own_v = (grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
    nothing = (*[None] * len(masks), None, None)
    return dz, dk, dv, None, dq, d_own_k, d_own_v, [None] * n, *nothing, [None] * len(result)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise ConfigError("backward: got a second derivative of a recurrent layer, expected the first, or backend='naive'")


_solution.register_autograd(_backward, setup_context=_save)
cotangents.register_autograd(_refuse)
