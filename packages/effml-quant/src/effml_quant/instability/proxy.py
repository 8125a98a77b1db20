"""A student-teacher residual MLP: the smallest model in which block-scaled training goes wrong as in language models.

    student   x_l = x_(l-1) + W2_l phi(W1_l LN_l(x_(l-1))) + b_l,   l = 1 .. L, no norm at the end and no embedding
    teacher   the same blocks without the residual, without LN, without bias; frozen, float32, outside the student
    target    teacher(x) + noise;  loss = mean over batch and features of (student(x) - target)^2

The hidden width is 4d; with SwiGLU it is h = round(8d / 3), W1 has 2h rows, and phi(u) = a silu(c) of the halves a, c.
The teacher's output is small, so the student has to learn to cancel its own residual path.

Two runs that are to be compared need the same initial weights, inputs, noise *and targets*. So weights follow from the
seed alone, the batch of every step from the seed and its number, and the teacher stands outside the student, where no
precision scheme reaches it: what a run computes in low precision changes nothing of what it is asked to learn.
State of the data: one number. Cost per step: 24 L d^2 FLOPs per sample and training pass x 2, plus 4 L d^2 for targets.

Source: arXiv 2506.20752, the synthetic model of its section on a simplified setting, with settings read from the
authors' code, where the teacher is quantised with the student and the noise redrawn between runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from effml_shared import seeding
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import CheckpointError
from torch import Tensor, nn

__all__ = ["ProxyConfig", "ProxyData", "ResidualMLP", "StudentTeacher", "SwiGLU", "proxy_loss"]


class SwiGLU(nn.Module):
    """Return a * silu(c) of the two halves of the last axis, (..., 2h) -> (..., h)."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "identity": nn.Identity,
    "swiglu": SwiGLU,
}


@dataclass(frozen=True)
class ProxyConfig:
    """Shape of student and teacher, and what their weights and data are drawn with."""

    width: int = 512  # d: features of input, output and residual stream
    depth: int = 8  # L: blocks of the student
    activation: str = "gelu"  # gelu (exact) | relu | identity | swiglu
    norm: bool = True  # LN at the start of every block of the student
    init: str = "uniform"  # of the student: uniform(+-1/sqrt(fan_in)) | low_gain: Xavier-normal, gain 0.5, zero bias
    teacher_width: int | None = None  # hidden features; None: width
    teacher_depth: int | None = None  # blocks; None: depth
    noise_std: float = 0.005  # of the target's noise
    seed: int = 1337

    def __post_init__(self) -> None:
        for name in ("width", "depth", "teacher_width", "teacher_depth"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        check_choice("activation", self.activation, _ACTIVATIONS)
        check_choice("init", self.init, ("uniform", "low_gain"))
        check_range("noise_std", self.noise_std, 0.0)

    @property
    def hidden(self) -> int:
        """Features that W2 reads."""
        return round(8 * self.width / 3) if self.activation == "swiglu" else 4 * self.width


class _Block(nn.Module):
    def __init__(self, config: ProxyConfig) -> None:
        super().__init__()
        wide = config.hidden * (2 if config.activation == "swiglu" else 1)
        self.norm = nn.LayerNorm(config.width) if config.norm else nn.Identity()
        self.up = nn.Linear(config.width, wide, bias=False)
        self.activation = _ACTIVATIONS[config.activation]()
        self.down = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    """The student: x (batch, width) -> (batch, width). Its blocks hold `norm`, `up` (W1), `activation`, `down` (W2, b).

    >>> sum(p.numel() for p in ResidualMLP(ProxyConfig(width=64, depth=4)).parameters()) == 4 * (8 * 64**2 + 3 * 64)
    True
    """

    def __init__(self, config: ProxyConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        generator = generator or seeding.generator(config.seed, "proxy", "weights")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _initialize(module, config.init, generator)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def gains(self) -> list[tuple[nn.Module, nn.Linear]]:
        """Return each LN with the linear layer that alone reads it, as `rescale_gains` takes them."""
        return [(b.norm, b.up) for b in self.blocks if isinstance(b.norm, nn.LayerNorm)]  # type: ignore[misc]


@torch.no_grad()
def _initialize(layer: nn.Linear, init: str, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(layer.in_features)
    if init == "uniform":
        layer.weight.uniform_(-bound, bound, generator=generator)
        if layer.bias is not None:
            layer.bias.uniform_(-bound, bound, generator=generator)
    else:
        std = 0.5 * math.sqrt(2 / (layer.in_features + layer.out_features))
        layer.weight.normal_(0.0, std, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()


def _teacher(config: ProxyConfig, generator: torch.Generator) -> nn.Sequential:
    width = config.teacher_width or config.width
    gated = config.activation == "swiglu"
    hidden = round(2 * width / 3) if gated else width
    layers: list[nn.Module] = []
    for _ in range(config.teacher_depth or config.depth):
        layers += [
            nn.Linear(config.width, 2 * hidden if gated else hidden, bias=False),
            _ACTIVATIONS[config.activation](),
            nn.Linear(hidden, config.width, bias=False),
        ]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            _initialize(layer, "uniform", generator)
    return nn.Sequential(*layers).requires_grad_(False).eval()


class StudentTeacher:
    """Student, teacher and the data between them.

    Args:
        config: shapes and seed; the same config gives the same numbers on the same kind of device.
        device: where everything lives and batches are drawn.

    >>> proxy = StudentTeacher(ProxyConfig(width=8, depth=1))
    >>> proxy.data().next(4)["targets"].shape
    torch.Size([4, 8])
    """

    def __init__(self, config: ProxyConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        generator = seeding.generator(
            config.seed, "proxy", "weights"
        )  # one stream: first the student, then the teacher
        self.student = ResidualMLP(config, generator).to(self.device)
        self.teacher = _teacher(config, generator).to(self.device)

    def data(self, stream: str = "train") -> ProxyData:
        """Return batches from their start; another stream has other inputs and noise."""
        return ProxyData(self, stream)

    def held_out(self, batches: int, batch_size: int) -> list[dict[str, Tensor]]:
        """Return fixed batches that training never sees."""
        data = self.data("held out")
        return [data.next(batch_size) for _ in range(batches)]


class ProxyData:
    """Batches of a `StudentTeacher` for `effml_shared.loop.Loop`: `{"inputs", "targets"}`, each (batch, width) float32.

    The number of a batch decides what is in it, so going back to a position costs nothing.
    """

    def __init__(self, proxy: StudentTeacher, stream: str) -> None:
        self.proxy, self.stream, self.position = proxy, stream, 0

    @torch.no_grad()
    def next(self, batch_size: int) -> dict[str, Tensor]:
        """Return the next batch."""
        check_count("batch_size", batch_size, 1)
        config, device = self.proxy.config, self.proxy.device
        generator = seeding.generator(config.seed, "proxy", self.stream, self.position, device=device)
        draw = partial(torch.randn, batch_size, config.width, generator=generator, device=device, dtype=torch.float32)
        inputs, noise = draw(), draw()
        self.position += 1
        with torch.autocast(device.type, enabled=False):
            targets = self.proxy.teacher(inputs) + config.noise_std * noise
        return {"inputs": inputs, "targets": targets}

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches were drawn."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Raises:
            CheckpointError: the state is not one of these.
        """
        if not isinstance(state.get("position"), int) or state["position"] < 0:
            raise CheckpointError(f"data: got {state}, expected {{'position': a number of batches}}")
        self.position = state["position"]


def proxy_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the squared error, averaged over features and summed over samples, and their number."""
    error = (model(batch["inputs"]) - batch["targets"]).square().mean(-1)
    return error.sum(), torch.tensor(error.numel(), device=error.device)
