from __future__ import annotations

from typing import Any

import pytest
from effml_eval.scoring.scorer import GenerationRequest, SamplingParams
from effml_shared.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("stop", "\n"),
        ("stop", ("a", "")),
        ("stop", (1,)),
    ],
)
def test_refuses(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: got .*expected"):
        SamplingParams(**{name: value})


def test_requests_are_values() -> None:
    assert SamplingParams(stop=["b", "a", "b"]) == SamplingParams(stop=("a", "b"))  # type: ignore[arg-type]
    assert GenerationRequest("x") == GenerationRequest("x", SamplingParams(temperature=0))
    assert len({SamplingParams(), SamplingParams(top_p=1), SamplingParams(top_p=0.5)}) == 2
