"""What a policy-gradient step is: sampling, rewards, advantages, objective, updates. Published methods are presets.

A preset is a function that returns a `PolicyConfig`; whatever it does not fix, and whatever it does, may be overridden:
`dapo(samples=16, lr=2e-6)`. The formulas are in the modules that the fields name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError

from effml_rl.advantages import KINDS as GROUP_ESTIMATORS
from effml_rl.aggregation import REDUCTIONS
from effml_rl.kl import KINDS as KL_KINDS
from effml_rl.policy_loss import REDUCTIONS as LOSSES
from effml_rl.policy_loss import check_clip

__all__ = [
    "PolicyConfig",
    "cispo",
    "dapo",
    "dr_grpo",
    "grpo",
    "gspo",
    "ppo",
    "reinforce_pp",
    "rloo",
    "sapo",
]

TOKEN_ESTIMATORS = ("reinforce_pp", "gae")  # these credit tokens, the others whole completions
ESTIMATORS = (*GROUP_ESTIMATORS, *TOKEN_ESTIMATORS)


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """One step: `prompts_per_step` x `samples` completions, then `epochs` x `mini_batches` updates.

    Raises:
        ConfigError: a field is out of range, or two of them exclude each other.

    >>> PolicyConfig(kl_loss=0.1, kl_reward=0.1)
    Traceback (most recent call last):
    ...
    effml_shared.errors.ConfigError: kl_loss, kl_reward: got 0.1 and 0.1, expected one of them at most to be above 0
    """

    # Sampling
    prompts_per_step: int = 16  # prompts over all ranks
    samples: int = 8  # completions per prompt
    max_completion: int = 512  # tokens, after which a completion is cut off; also the constant of "dr_grpo"
    temperature: float = 1.0  # divides the logits in sampling and in every log-probability
    top_p: float = 1.0  # mass kept, 1: all
    top_k: int = 0  # tokens kept, 0: all
    min_p: float = 0.0  # least probability kept, as a fraction of the largest
    seed: int = 0  # of the sampling noise and of the composition of mini-batches
    refills: int = 0  # dynamic sampling: drop tied prompts, draw others in their place, up to so many times; 0: off

    # Rewards
    reward_weights: tuple[float, ...] | None = None  # one per verifier; None: all 1
    multi: str = "sum_then_normalize"  # or normalize_then_sum: how several verifiers are joined, see `advantages`
    overlong_margin: int | None = (
        None  # tokens before max_completion over which a penalty grows to -1; None: no penalty
    )
    mask_truncated: bool = False  # keep completions that were cut off out of the loss (their rewards count in groups)
    kl_reward: float = 0.0  # weight of k1, subtracted from the rewards, per nat
    reward_limit: float | None = 10.0  # token estimators clamp a completion's reward to +- this; None: not at all

    # Advantages
    estimator: str = "grpo"  # reinforce | group_mean | rloo | grpo | batch_std | reinforce_pp | gae
    eps: float = 1e-4  # added to a standard deviation of rewards
    gamma: float = 1.0  # discount per token, of reinforce_pp and gae
    lam: float = 0.95  # of gae: 1 gives return minus value, 0 the one-step error
    whiten: bool | None = None  # bring advantages to mean 0, variance 1 over all tokens; None: for token estimators

    # Objective
    loss: str = "ppo"  # ppo | gspo | cispo | sapo
    clip: tuple[float, float] | None = None  # (low, high) of the ratio; None: the loss's own
    delta: float | None = None  # cap of the ratio, see `policy_loss`
    dual_clip: float | None = None  # bound of the loss at negative advantages, in units of the advantage
    reduction: str | None = None  # over tokens, see `aggregation`; None: the loss's own
    kl_loss: float = 0.0  # weight of the KL term in the loss, per nat
    kl_kind: str = "k3_corrected"  # estimator in the loss: k2 | k3 | k3+ | k3_corrected, see `kl`
    entropy: float = 0.0  # weight of the entropy bonus, per nat
    mismatch: str | None = None  # weights trainer / sampler: truncate | mask; None: off
    mismatch_level: str = "token"  # or sequence
    mismatch_cap: float = 2.0  # largest weight
    mismatch_floor: float = 0.0  # smallest weight, of mask

    # Updates
    epochs: int = 1  # passes over the completions of a step
    mini_batches: int = 1  # updates per pass
    micro_batch: int | None = None  # completions per forward pass and rank; None: all of a mini-batch
    old_logps: str = "trainer"  # or sampler: spares a pass if there are several updates; exact up to its rounding
    lr: float = 1e-6  # of the AdamW that is made where no optimizer is given
    clip_norm: float | None = 1.0  # largest gradient norm; None: no clipping
    precision: str = "float32"  # or bfloat16: autocast of the trainer's passes
    logit_chunk: int = 1024  # tokens whose float32 logits are alive at a time
    log_entropy: bool = True  # compute the entropy for the log where the loss has no use for it

    # The critic of gae
    critic_lr: float = 9e-6  # of the AdamW that is made where no optimizer is given
    value_clip: float | None = 0.2  # in units of value; None: the plain squared error

    def __post_init__(self) -> None:
        for name in ("prompts_per_step", "samples", "max_completion", "epochs", "mini_batches", "logit_chunk"):
            check_count(name, getattr(self, name), 1)
        check_count("refills", self.refills, 0)
        for name in ("micro_batch", "overlong_margin"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)
        check_range("temperature", self.temperature, 0.0)
        if not self.temperature:
            raise ConfigError(f"temperature: got {self.temperature}, expected a number > 0: greedy samples are all one")
        if self.overlong_margin is not None and self.overlong_margin > self.max_completion:
            raise ConfigError(f"overlong_margin: got {self.overlong_margin}, expected at most max_completion")
        for name in ("kl_loss", "kl_reward", "entropy", "eps", "lr", "critic_lr", "mismatch_floor"):
            check_range(name, getattr(self, name), 0.0)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected a number in [0, 1]")
        for name in ("clip_norm", "value_clip", "reward_limit", "mismatch_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}: got {value}, expected a number > 0")
        if self.mismatch_floor > self.mismatch_cap:
            raise ConfigError(f"mismatch_floor: got {self.mismatch_floor}, expected at most mismatch_cap")
        check_choice("multi", self.multi, ("sum_then_normalize", "normalize_then_sum"))
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("kl_kind", self.kl_kind, KL_KINDS)
        check_choice("reduction", self.reduction, (None, *REDUCTIONS))
        check_choice("mismatch", self.mismatch, (None, "truncate", "mask"))
        check_choice("mismatch_level", self.mismatch_level, ("token", "sequence"))
        check_choice("old_logps", self.old_logps, ("trainer", "sampler"))
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        check_clip(self.loss, self.clip, self.delta, self.dual_clip)
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.kl_loss and self.kl_reward:
            got = f"{self.kl_loss} and {self.kl_reward}"
            raise ConfigError(f"kl_loss, kl_reward: got {got}, expected one of them at most to be above 0")
        if self.kl_kind == "k1":
            raise ConfigError("kl_kind: got 'k1', expected another: its gradient in a loss is 0, use kl_reward for it")
        if self.loss == "gspo" and self.reduction not in (None, "seq_mean_token_mean"):
            raise ConfigError(f"reduction: got {self.reduction!r} with loss 'gspo', expected 'seq_mean_token_mean'")
        if self.samples < 2 and self.estimator not in ("reinforce", *TOKEN_ESTIMATORS):
            raise ConfigError(f"samples: got {self.samples}, expected at least 2: {self.estimator} compares them")
        if self.samples < 2 and self.refills:
            raise ConfigError(
                f"samples: got {self.samples} with refills, expected at least 2: one sample is always tied"
            )
        if self.multi == "normalize_then_sum" and self.estimator != "grpo":
            raise ConfigError(f"multi: got 'normalize_then_sum' with {self.estimator!r}, expected estimator 'grpo'")

    @property
    def updates(self) -> int:
        """Optimizer steps per step; 1 means on-policy, with ratios of exactly 1."""
        return self.epochs * self.mini_batches

    @property
    def token_reduction(self) -> str:
        """The reduction in force."""
        return self.reduction or LOSSES[self.loss]

    @property
    def max_len(self) -> int | None:
        """What `aggregate` divides by."""
        return self.max_completion if self.token_reduction == "dr_grpo" else None

    @property
    def whitened(self) -> bool:
        """Whether advantages are whitened."""
        return self.estimator in TOKEN_ESTIMATORS if self.whiten is None else self.whiten

    @property
    def penalised(self) -> bool:
        """Whether tokens of advantage 0 have a gradient."""
        return bool(self.kl_loss or self.entropy)

    @property
    def needs_reference(self) -> bool:
        """Whether a KL term is in use."""
        return bool(self.kl_loss or self.kl_reward)


def grpo(**overrides: Any) -> PolicyConfig:
    """Return GRPO, arXiv 2402.03300; without its KL term (there `kl_loss=0.04, kl_kind="k3"`), as is usual by now."""
    return _with(overrides, reduction="seq_mean_token_mean")


def dr_grpo(**overrides: Any) -> PolicyConfig:
    """Return Dr. GRPO, arXiv 2503.20783: no division by deviations or lengths."""
    return _with(overrides, estimator="group_mean", reduction="dr_grpo")


def dapo(**overrides: Any) -> PolicyConfig:
    """Return DAPO, arXiv 2503.14476: a higher upper clip, token_mean, dynamic sampling, the soft overlong penalty."""
    longest = overrides.get("max_completion", PolicyConfig.max_completion)
    check_count("max_completion", longest, 1)
    margin = max(longest // 5, 1)  # 4096 of 20480
    return _with(overrides, clip=(0.2, 0.28), reduction="token_mean", refills=3, overlong_margin=margin)


def gspo(**overrides: Any) -> PolicyConfig:
    """Return GSPO, arXiv 2507.18071: ratios of sequences."""
    return _with(overrides, loss="gspo")


def cispo(**overrides: Any) -> PolicyConfig:
    """Return CISPO, arXiv 2506.13585: capped ratios as constant weights."""
    return _with(overrides, loss="cispo")


def sapo(**overrides: Any) -> PolicyConfig:
    """Return SAPO, arXiv 2511.20347: a soft gate in place of the clip."""
    return _with(overrides, loss="sapo")


def rloo(**overrides: Any) -> PolicyConfig:
    """Return RLOO, arXiv 2402.14740: each sample against the mean of the others, one update, whole sequences."""
    return _with(overrides, estimator="rloo", reduction="seq_mean_token_sum")


def reinforce_pp(**overrides: Any) -> PolicyConfig:
    """Return REINFORCE++, arXiv 2501.03262: one sample per prompt, the whole batch as baseline."""
    return _with(overrides, estimator="reinforce_pp", samples=1)


def ppo(**overrides: Any) -> PolicyConfig:
    """Return PPO with a critic, arXiv 1707.06347 as of arXiv 2203.02155, without its KL term (`kl_reward=0.01`)."""
    return _with(overrides, estimator="gae", samples=1)


def _with(overrides: dict[str, Any], **preset: Any) -> PolicyConfig:
    for name in overrides:
        check_choice("option", name, (field.name for field in fields(PolicyConfig)))
    return PolicyConfig(**{**preset, **overrides})
