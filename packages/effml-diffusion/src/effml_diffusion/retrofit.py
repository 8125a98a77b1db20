"""FlexMDM from someone else's masked language model: what it lacks is added around it, and can be taken off again.

    terminal slot      one more token, so that texts of k tokens have k + 1 gaps
    time               every norm of every block: y (1 + scale) + shift, linear in the embedding of cond, by hooks
    gaps               an `InsertionHead` on the last block's output
    adapters           optional low-rank ones (`effml_diffusion.low_rank`), by hooks

All of it starts as nothing: the logits are bit by bit those of the model itself. The hooks act only inside `forward`,
so the model remains usable beside. One projection of the embedding serves `group_size` neighbouring blocks.

State: the new parameters, and those of the model that are trained: so small are its checkpoints. Cost: that of the
model on one more token, of the adapters, and O(blocks x d x cond_dim) per text.

Source: arXiv 2509.01025 and its code, which does this to LLaDA-8B (groups of 8 blocks, adapters of rank 128).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor, nn

from effml_diffusion.denoiser import logits_of, output_head
from effml_diffusion.diffusion_transformer import DiffusionTransformerOutput
from effml_diffusion.insertion_head import InsertionHead
from effml_diffusion.low_rank import LowRank, LowRankConfig, linear_layers
from effml_diffusion.modulation import ScalarEmbedding, ZeroLinear, modulate
from effml_diffusion.value_checks import check_values

__all__ = ["FlexWrapper"]

Told = list[tuple[Tensor, ...]]
"""Of each group of blocks: (batch, d_model) shift and scale of its first norm, of its second, and so on."""


class FlexWrapper(nn.Module):
    """A network for `FlexMDM` around a bidirectional language model.

    Args:
        backbone: called as `backbone(input_ids, attention_mask=)`, both (batch, seq), and returns an object with
            `.logits`: a masked LM of `transformers`, LLaDA, a shared `Transformer` with `causal=False`. Parameters that
            are not to be trained: `backbone.requires_grad_(False)` before.
        max_length: tokens of the longest text.
        pad_id: what the terminal slot holds.
        d_model: channels of the hidden states; None: what the backbone's config says.
        blocks: its Transformer blocks; None: the longest list of equal modules with norms.
        group_size: blocks that share a projection.
        gap_head: `"expectation"` or `"distribution"`.
        cond_dim: channels of the embedding of cond.
        time_scale: factor of cond before its sinusoids.
        low_rank: adapters; None: none.

    Raises:
        ConfigError: a size is below 1, or something is not found in the backbone.
    """

    extra_columns = 1  # that the backbone's head sees: the terminal slot

    def __init__(
        self,
        backbone: nn.Module,
        max_length: int,
        pad_id: int,
        *,
        d_model: int | None = None,
        blocks: nn.ModuleList | None = None,
        group_size: int = 8,
        gap_head: str = "expectation",
        cond_dim: int = 256,
        time_scale: float = 1.0,
        low_rank: LowRankConfig | None = None,
    ) -> None:
        super().__init__()
        check_count("max_length", max_length, 1)
        check_count("pad_id", pad_id, 0)
        check_count("group_size", group_size, 1)
        check_count("cond_dim", cond_dim, 1)
        dim = _width(backbone) if d_model is None else d_model
        self.backbone, self.pad_id, self.d_model, self.time_scale = backbone, pad_id, dim, time_scale
        blocks = _transformer_blocks(backbone) if blocks is None else blocks
        names = list(dict.fromkeys(name for block in blocks for name in _norms(block)))
        first = next(backbone.parameters(), None)
        with torch.device("cpu" if first is None else first.device):
            self.time_embedding = ScalarEmbedding(cond_dim)
            width = 2 * dim * len(names)
            self.projections = nn.ModuleList(ZeroLinear(cond_dim, width) for _ in range(0, len(blocks), group_size))
            self.gap_head = InsertionHead(dim, max_length, gap_head, cond_dim=cond_dim)
            self.adapters, layers = nn.ModuleDict(), {}
            if low_rank is not None:
                layers = linear_layers(backbone, low_rank)
                for name, layer in layers.items():
                    self.adapters[_key(name)] = LowRank(layer.in_features, layer.out_features, low_rank)

        self._told: Told | None = None  # None outside `forward`, where the hooks do nothing
        self._last: Tensor | None = None  # output of the last block
        self._hooked = True
        self._handles = [blocks[-1].register_forward_hook(self._keep)]
        for number, block in enumerate(blocks):
            for name, norm in _norms(block).items():
                hook = partial(self._modulate, number // group_size, 2 * names.index(name))
                self._handles.append(norm.register_forward_hook(hook))
        for name, layer in layers.items():
            self._handles.append(layer.register_forward_hook(partial(self._adapt, _key(name))))
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_do_not_miss_frozen)

    def forward(self, input_ids: Tensor, lengths: Tensor, cond: Tensor, **inputs: Any) -> DiffusionTransformerOutput:
        """Return logits and gaps of ids (batch, seq), lengths (batch,), cond (batch,); inputs go to the backbone.

        Raises:
            ConfigError: shapes disagree, lengths are out of range (seen on a CPU only), the hooks have been removed, or
                the backbone returned no logits or did something that the hooks do not understand.
        """
        if not self._hooked:
            raise ConfigError("backbone: got one whose hooks have been removed, expected a new wrapper of it")
        batch, seq = input_ids.shape
        for name, given in (("lengths", lengths), ("cond", cond)):
            if given.shape != (batch,):
                raise ConfigError(f"{name}: got shape {tuple(given.shape)}, expected ({batch},)")
        check_values("lengths", lengths, (lengths >= 0) & (lengths <= seq), f"0 to {seq}")
        column = torch.arange(seq + 1, device=input_ids.device)
        ids = F.pad(input_ids, (0, 1)).where(column < lengths[:, None], self.pad_id)
        seen = (column <= lengths[:, None]).long()

        c = F.silu(self.time_embedding(self.time_scale * cond))
        with _Telling(self, [projection(c).split(self.d_model, dim=-1) for projection in self.projections]):
            logits = logits_of(self.backbone(ids, attention_mask=seen, **inputs))
            hidden = self._last
        if hidden is None:
            raise ConfigError("blocks: got a last one that was not called, expected the backbone's")
        gaps = self.gap_head(hidden.to(self.gap_head.hidden.weight.dtype), c)
        if logits.shape[:2] == ids.shape:  # else the head saw only what was asked for: see `extra_columns`
            logits = logits[:, :seq]
        elif len(logits) != 1:
            got = tuple(logits.shape)
            raise ConfigError(f"backbone: got logits of shape {got}, expected ({batch}, {seq + 1}, vocab)")
        return DiffusionTransformerOutput(logits, (), *gaps)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the module that computes the backbone's logits, if one is found."""
        return output_head(self.backbone)

    def trainable_parameter_groups(
        self, lr: float, *, weight_decay: float = 0.01, head_lr_scale: float = 0.25
    ) -> list[dict[str, Any]]:
        """Return an optimizer's groups: adapters without decay, the output head's own weights at a lower rate, others.

        Only parameters that require a gradient are in them, each once, and no group is empty.
        """
        head = self.get_output_embeddings()
        members = [list(self.adapters.parameters()), [] if head is None else list(head.parameters())]
        special = {id(parameter) for group in members for parameter in group}
        members.append([parameter for parameter in self.parameters() if id(parameter) not in special])
        options = [(lr, 0.0), (lr * head_lr_scale, weight_decay), (lr, weight_decay)]
        groups = []
        for group, (rate, decay) in zip(members, options, strict=True):
            if trained := [parameter for parameter in group if parameter.requires_grad]:
                groups.append({"params": trained, "lr": rate, "weight_decay": decay})
        return groups

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return what activation checkpointing of blocks needs, so that recomputing them knows the time again.

        It is `context_fn` of `torch.utils.checkpoint.checkpoint`; of a model of `transformers`, among the keyword
        arguments that its own switch passes on: `{"use_reentrant": False, "context_fn": wrapper.checkpoint_contexts}`.
        """
        return nullcontext(), _Telling(self, self._told)

    def remove_hooks(self) -> nn.Module:
        """Return the backbone without hooks, as it was given; this wrapper cannot be called any more."""
        for handle in self._handles:
            handle.remove()
        self._hooked = False
        return self.backbone

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._told is not None:
            self._last = output if isinstance(output, Tensor) else output[0]

    def _modulate(self, group: int, place: int, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._told is None:
            _check_no_recomputation()
            return None
        shift, scale = (part.to(output.dtype) for part in self._told[group][place : place + 2])
        if output.ndim != 3 or len(output) != len(shift):
            shape = tuple(output.shape)
            raise ConfigError(f"backbone: got a norm's output of shape {shape}, expected ({len(shift)}, seq, d_model)")
        return modulate(output, shift, scale)

    def _adapt(self, key: str, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self._told is None:
            _check_no_recomputation()
            return None
        return output + self.adapters[key](args[0]).to(output.dtype)


class _Telling:
    """While it is open, a wrapper's hooks act, and know the time. May be entered again."""

    def __init__(self, wrapper: FlexWrapper, told: Told | None) -> None:
        self.wrapper, self.told = wrapper, told
        self.before: list[Any] = []

    def __enter__(self) -> None:
        self.before.append((self.wrapper._told, self.wrapper._last))
        self.wrapper._told = self.told

    def __exit__(self, *error: object) -> None:
        self.wrapper._told, self.wrapper._last = self.before.pop()


def _check_no_recomputation() -> None:
    """Raise if a hook is idle while a backward pass recomputes a block: gradients would be those of another model."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise ConfigError("checkpoint: got none of a FlexWrapper's, expected context_fn=wrapper.checkpoint_contexts")


def _transformer_blocks(backbone: nn.Module) -> nn.ModuleList:
    """Return the longest list of equal modules with norms that is not inside such a list."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in backbone.named_modules():  # outer ones first
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if not inside and isinstance(module, nn.ModuleList) and len({*map(type, module)}) == 1 and _norms(module[0]):
            lists[name] = module
    if not lists:
        raise ConfigError(
            f"blocks: got None, expected the blocks of {type(backbone).__name__}, which has no list of them"
        )
    return max(lists.values(), key=len)


def _norms(block: nn.Module) -> dict[str, nn.Module]:
    """Return a block's norms of hidden states, by name: not those of queries and keys."""
    return {
        name: module
        for name, module in block.named_modules()
        if type(module).__name__.endswith("Norm") and not name.rpartition(".")[2].startswith(("q_", "k_"))
    }


def _width(backbone: nn.Module) -> int:
    config = getattr(backbone, "config", None)
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
    if width is None:
        raise ConfigError("d_model: got None, expected the width of a backbone whose config does not say it")
    return int(width)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name may not have dots


def _frozen(wrapper: nn.Module) -> set[str]:
    """Return the names of a wrapper's state that belong to its backbone and are not trained."""
    backbone: Any = wrapper.backbone
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    return {f"backbone.{name}" for name in backbone.state_dict() if name not in trained}


def _leave_out_frozen(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in _frozen(wrapper):
        state_dict.pop(prefix + name, None)


def _do_not_miss_frozen(wrapper: nn.Module, incompatible: Any) -> None:
    frozen = _frozen(wrapper)
    missing = [key for key in incompatible.missing_keys if not any(f".{key}".endswith(f".{name}") for name in frozen)]
    incompatible.missing_keys[:] = missing
