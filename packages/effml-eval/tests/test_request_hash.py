from __future__ import annotations

from typing import Any

import pytest
from effml_eval.scoring.request_hash import canonical_json, request_hash, sample_seed
from effml_eval.scoring.scorer import GenerationRequest, SamplingParams, ScoreRequest
from effml_shared.errors import ConfigError

REQUEST = GenerationRequest("why?", SamplingParams(temperature=1, stop=("\n", "Q:")))


def test_equal_requests_have_equal_hashes() -> None:
    assert request_hash(("a", "b")) == request_hash(ScoreRequest("a", "b"))
    assert request_hash(REQUEST) == request_hash(
        GenerationRequest("why?", SamplingParams(temperature=1.0, stop=("Q:", "\n", "Q:")), sample=3, seed=9)
    )
    assert len(request_hash("text")) == 64


def test_different_requests_have_different_hashes() -> None:
    requests: list[Any] = [
        ("a", "b"),
        ("ab", ""),
        "ab",
        GenerationRequest("ab"),
        GenerationRequest("ab", SamplingParams(temperature=0.5)),
        GenerationRequest("ab", SamplingParams(stop=("x",))),
        GenerationRequest("ab", SamplingParams(max_new_tokens=3)),
    ]
    hashes = [request_hash(request) for request in requests] + [request_hash("ab", fewshot=[1])]
    assert len(set(hashes)) == len(hashes)


def test_seeds_differ_by_sample_seed_and_request() -> None:
    changed = [REQUEST, REQUEST._replace(sample=1), REQUEST._replace(seed=1), REQUEST._replace(prompt="why")]
    seeds = [sample_seed(request) for request in changed]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_same_in_every_process() -> None:
    assert request_hash(REQUEST) == "a53a4e33c1c835b10570ccda0e8fdb8e30b48ded9bdb166a9bca181dd8e7a378"
    assert sample_seed(REQUEST) == 3116929397073500555


def test_any_text_can_be_hashed_and_no_nan() -> None:
    assert request_hash(("\ud800 é 😀", "\x00")) != request_hash(("", "\x00"))
    with pytest.raises(ConfigError, match=r"request: got a value that JSON cannot hold"):
        canonical_json({"x": float("nan")})
    with pytest.raises(ConfigError):
        canonical_json({"x": object()})
