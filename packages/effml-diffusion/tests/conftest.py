"""A law that can be enumerated and the perfect model of it: what every bound and every sampler is measured against."""

import itertools
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

Law = Mapping[tuple[int, ...], float]
"""Sequences of one length, tokens from 0, and their probabilities."""


@pytest.fixture(scope="session")
def reference_law() -> dict[tuple[int, ...], float]:
    """The law over {0, 1, 2}^3 with p proportional to (j mod 7 + 1)^2, j = 9 x0 + 3 x1 + x2; H(p) = 2.93159784 nats."""
    weight = {x: (j % 7 + 1) ** 2 for j, x in enumerate(itertools.product(range(3), repeat=3))}
    total = sum(weight.values())
    return {x: w / total for x, w in weight.items()}


class ExactPosterior:
    """The model of a law: ids (batch, seq) -> logits (batch, seq, vocab_size + 1), float64, of P(x_i = v | z).

    Tokens are 0 .. vocab_size - 1 and the mask is vocab_size. The mask's logit is 0, so that whoever forgets to exclude
    it is wrong; at clean positions the logits are those of the token that stands there. A context that the law never
    produces gets NaN. `calls` counts forward passes, `rows` the rows they had.
    """

    def __init__(self, law: Law, vocab_size: int | None = None) -> None:
        self.sequences = torch.tensor(list(law))
        self.probs = torch.tensor(list(law.values()), dtype=torch.float64)
        self.vocab_size = int(self.sequences.max()) + 1 if vocab_size is None else vocab_size
        self.mask_id = self.vocab_size
        self.one_hot = torch.nn.functional.one_hot(self.sequences, self.vocab_size).double()
        self.calls = self.rows = 0

    @property
    def entropy(self) -> float:
        """H(p) in nats."""
        return float(torch.special.entr(self.probs).sum())

    def __call__(self, ids: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(ids)
        agrees = (ids[:, None] == self.sequences) | (ids[:, None] == self.mask_id)
        joint = agrees.all(-1) * self.probs  # (batch, sequences)
        posterior = torch.einsum("bn,nlv->blv", joint / joint.sum(-1, keepdim=True), self.one_hot)
        return torch.cat([posterior.log(), posterior.new_zeros(*posterior.shape[:2], 1)], dim=-1)


@pytest.fixture(scope="session")
def exact_posterior() -> Callable[..., ExactPosterior]:
    """`exact_posterior(law, vocab_size=None)`: a fresh `ExactPosterior`, whose `calls` count from 0."""
    return ExactPosterior


class ExactFlexPosterior:
    """The FlexMDM network of a law over texts of several lengths: `(ids, lengths, cond = a(t))` -> logits and gaps.

    Every way to delete tokens of a text x has the weight p(x) a^k (1 - a)^(n - k). Tokens are 0 .. vocab_size - 1; mask
    and pad come next, and their logits are 0, so that whoever forgets to exclude them is wrong. Where no text agrees, f
    is uniform and g is 0. With `counts`, it gives `gap_logits` of the numbers of missing tokens instead of `gaps`.
    """

    def __init__(self, law: Law, vocab_size: int, counts: bool = False) -> None:
        self.law, self.vocab_size, self.counts = dict(law), vocab_size, counts
        self.mask_id, self.pad_id, self.longest = vocab_size, vocab_size + 1, max(map(len, law))
        ways = [(x, s) for x in law for k in range(len(x) + 1) for s in itertools.combinations(range(len(x)), k)]
        rows, gaps = [], []
        for x, s in ways:
            ends = (-1, *s, len(x))
            gap = [ends[i + 1] - ends[i] - 1 for i in range(len(s) + 1)]
            rows.append([x[i] for i in s] + [-1] * (self.longest - len(s)))
            gaps.append(gap + [0] * (self.longest - len(s)))
        self.tokens, self.gaps = torch.tensor(rows), torch.tensor(gaps)
        self.prior = torch.tensor([law[x] for x, _ in ways], dtype=torch.float64)
        self.kept = torch.tensor([len(s) for _, s in ways])
        self.lost = torch.tensor([len(x) for x, _ in ways]) - self.kept
        self.calls = 0

    @property
    def entropy(self) -> float:
        """H(p) in nats, the length included."""
        return float(torch.special.entr(torch.tensor(list(self.law.values()), dtype=torch.float64)).sum())

    def __call__(self, ids: Tensor, lengths: Tensor, cond: Tensor) -> SimpleNamespace:
        self.calls += 1
        seq = ids.shape[1]
        pad = max(0, seq - self.longest)
        tokens = torch.nn.functional.pad(self.tokens, (0, pad), value=-1)[:, :seq]
        gaps = torch.nn.functional.pad(self.gaps, (0, pad))[:, : seq + 1]
        real = torch.arange(seq) < lengths[:, None]
        agrees = (ids[:, None] == tokens) | (ids == self.mask_id)[:, None] | ~real[:, None]
        a = cond.double()[:, None].clamp(max=1 - 2.0**-25)  # float32 rounds to 1 what is not yet the end
        weight = self.prior * a**self.kept * (1 - a) ** self.lost
        weight = torch.where(agrees.all(-1) & (lengths[:, None] == self.kept), weight, 0.0)
        total = weight.sum(1, keepdim=True)
        weight = torch.where(total > 0, weight / total.clamp(min=1e-300), 0.0)
        one_hot = torch.nn.functional.one_hot(tokens.clamp(min=0), self.vocab_size).double()
        f = torch.einsum("bp,plv->blv", weight, one_hot)
        f = torch.where((total > 0)[:, :, None], f, 1 / self.vocab_size)
        logits = torch.cat([f.log(), f.new_zeros(*f.shape[:2], 2)], dim=-1)
        if not self.counts:
            return SimpleNamespace(logits=logits, gaps=weight @ gaps.double())
        chance = torch.einsum("bp,pgn->bgn", weight, torch.nn.functional.one_hot(gaps, self.longest + 1).double())
        impossible = torch.nn.functional.one_hot(torch.tensor(0), self.longest + 1).double()
        chance = torch.where((total > 0)[:, :, None], chance, impossible)
        return SimpleNamespace(logits=logits, gap_logits=chance.log())


@pytest.fixture(scope="session")
def flex_law() -> dict[tuple[int, ...], float]:
    """Texts over a = 0 and b = 1 of lengths 0 to 3; H = 1.504788 nats."""
    return {(): 0.1, (0,): 0.2, (0, 1): 0.3, (1, 0): 0.1, (0, 1, 1): 0.3}


@pytest.fixture(scope="session")
def exact_flex_posterior() -> Callable[..., ExactFlexPosterior]:
    """`exact_flex_posterior(law, vocab_size, counts=False)`: a fresh `ExactFlexPosterior`, `calls` at 0."""
    return ExactFlexPosterior
