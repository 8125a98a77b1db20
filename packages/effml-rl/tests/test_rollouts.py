"""Collecting: scorers of all kinds, dynamic sampling with refills and a cap, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from effml_rl.policy_config import PolicyConfig
from effml_rl.prompts import Prompt
from effml_rl.rollout_batch import RolloutBatch
from effml_rl.rollouts import Collector, Rollouts, Scores, VerifierScorer, describe
from effml_rl.verifiers import ExactMatch, RewardFunction
from effml_rl.verifiers.verdict import Verdict
from effml_shared.errors import ConfigError


class Script:
    """A sampler whose completions are written in the prompt: `abc` gives the texts a, b and c, of one token each."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int]] = []

    def generate(self, prompts: Sequence[str], n: int, *, draw: int) -> RolloutBatch:
        self.calls.append((list(prompts), draw))
        ids = torch.tensor([[ord(prompt[i])] for prompt in prompts for i in range(n)])
        mask = torch.ones_like(ids, dtype=torch.bool)
        groups = torch.arange(len(prompts)).repeat_interleave(n)
        return RolloutBatch(ids, mask, ids, mask, torch.zeros(len(ids), dtype=torch.bool), groups)

    def texts(self, batch: RolloutBatch) -> list[str]:
        return [chr(i) for i in batch.completion_ids[:, 0].tolist()]


def right(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float | None]:
    return [None if text == "?" else float(text == "x") for text in completions]


def collector(sampler: Script | None = None, verifier: Any = right, **fields: Any) -> Collector:
    return Collector(sampler or Script(), VerifierScorer(verifier), PolicyConfig(**{"samples": 2, **fields}))


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


def test_without_refills_everything_is_used() -> None:
    sampled, used = collector()(prompts("xx", "xy"))
    assert used is sampled
    assert sampled.completions == ["x", "x", "x", "y"]
    assert sampled.scores.rewards.flatten().tolist() == [1, 1, 1, 0]
    assert [prompt.prompt for prompt in sampled.prompts] == ["xx", "xx", "xy", "xy"]


def test_tied_prompts_are_replaced_until_none_is_missing() -> None:
    script, more = Script(), iter(["yy", "yx", "xz"])
    collect = collector(script, refills=5)
    asked = []

    def refill(count: int) -> list[Prompt]:
        asked.append(count)
        return prompts(*[next(more) for _ in range(count)])

    sampled, used = collect(prompts("xx", "xy", "?x"), refill)
    assert asked == [2, 1]
    assert "".join(used.completions) == "xyyxxz"
    assert used.batch.group_index.tolist() == [1, 1, 4, 4, 5, 5]
    assert sampled.batch.group_index.tolist() == [i // 2 for i in range(12)]
    assert "".join(sampled.completions) == "xxxy?xyyyxxz"
    assert script.calls == [(["xx", "xy", "?x"], 0), (["yy", "yx"], 1), (["xz"], 2)]
    assert collect.draw == 3


def test_refills_have_a_cap_and_may_find_nothing() -> None:
    script = Script()
    sampled, used = collector(script, refills=2)(prompts("xx", "yy"), lambda count: prompts(*["yy"] * count))
    assert (len(sampled), len(used), len(script.calls)) == (12, 0, 3)
    sampled, used = collector(refills=2)(prompts("xx", "xy"))  # nowhere to draw from
    assert (len(sampled), "".join(used.completions)) == (4, "xy")


def test_verifiers_functions_and_lists_of_them() -> None:
    seen = {}

    def columns(prompts: Any, completions: Any, answer: Any, level: Any) -> list[float]:
        seen["answer"] = answer
        return [float(x) for x in level]

    def old_style(prompts: Any, completions: Any, targets: Any) -> list[Verdict]:
        return [Verdict.of(text == target["answer"]) for text, target in zip(completions, targets, strict=True)]

    prompt = Prompt("xy", {"answer": "x", "level": 3})
    sampled, _ = collector(verifier=[columns, old_style, RewardFunction(right)])([prompt])
    assert sampled.scores.rewards.tolist() == [[3, 1, 1], [3, 0, 0]]
    assert seen["answer"] == ["x", "x"]
    assert [verdict.status for verdict in sampled.scores.verdicts[1]] == ["correct", "wrong"]

    class Callable:
        def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
            return [1.0 + len(columns)] * len(completions)

    plain, _ = collector(verifier=Callable())([prompt])
    assert plain.scores.rewards.flatten().tolist() == [3, 3]
    exact, _ = collector(verifier=ExactMatch())([Prompt("xy", "y")])
    assert exact.scores.rewards.flatten().tolist() == [0, 1]


def test_rewards_of_another_kind_take_the_verifiers_place() -> None:
    def by_position(prompts: Any, completions: Any, batch: RolloutBatch) -> Scores:
        return Scores(batch.completion_ids.double() + torch.arange(len(batch))[:, None])

    collect = Collector(Script(), by_position, PolicyConfig(samples=2))
    assert collect(prompts("ab"))[0].scores.rewards.tolist() == [[97.0], [99.0]]
    wrong = Collector(Script(), lambda p, c, b: Scores(torch.zeros(2)), PolicyConfig(samples=2))
    with pytest.raises(ConfigError, match=r"scorer: got rewards \(2,\), expected \(2, R\)"):
        wrong(prompts("ab"))


def test_metrics() -> None:
    collect = collector()
    metrics = describe(collect(prompts("xx", "x?", "xy", "??"))[0], collect.config)
    assert metrics["reward"] == pytest.approx(4 / 5)
    assert metrics["reward_std"] == pytest.approx(torch.tensor([1.0, 1, 1, 1, 0]).std().item())
    assert (metrics["scored"], metrics["tied"], metrics["prompts"]) == (5 / 8, 3 / 4, 4)
    assert (metrics["tokens"], metrics["length"], metrics["truncated"]) == (8, 1, 0)
    assert metrics["status/scored"] == 5 / 8
    assert metrics["status/unscored"] == 3 / 8
    assert "status/correct" not in metrics


def test_nobody_is_a_rank_without_prompts() -> None:
    collect = collector()
    empty, _ = collect([])
    assert len(empty) == 0
    assert describe(empty, collect.config)["reward"] == 0
    assert Rollouts.cat([empty, collect(prompts("xy"))[0]]).completions == ["x", "y"]


def test_bad_verifiers_are_named() -> None:
    for wrong in ([], "exact", [3]):
        with pytest.raises(ConfigError, match=r"verifier: got .*, expected a verifier or reward function"):
            VerifierScorer(wrong)  # type: ignore[arg-type]

    for answer, got in (([1.0, 1.0], r"\[1\.0, 1\.0\]"), (None, "None"), ([Verdict.of(True)], "1 verdicts")):

        def wrong_verifier(prompts: Any, completions: Any, targets: Any, answer: Any = answer) -> Any:
            return answer

        with pytest.raises(ConfigError, match=rf"verifier: got {got}, expected 2"):
            collector(verifier=wrong_verifier)(prompts("xy"))
    with pytest.raises(ConfigError, match=r"reward_weights: got 3"):
        describe(collector()(prompts("xy"))[0], PolicyConfig(samples=2, reward_weights=(1.0, 1.0, 1.0)))
