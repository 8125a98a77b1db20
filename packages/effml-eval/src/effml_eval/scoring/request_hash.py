"""The identity of a request: what its stored answer is found by, and what its random numbers are seeded from.

The hash is sha256 over JSON in one canonical form (keys sorted, no white space, ASCII), so that it is the same in every
process and on every machine. Of a generation it covers the prompt and the parameters and not which sample is asked
for: samples of one prompt share a hash and differ in their number.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed

from effml_eval.scoring.scorer import GenerationRequest

__all__ = ["canonical_json", "request_hash", "sample_seed"]


def canonical_json(value: Any) -> str:
    """Return the one JSON text of a tree of plain values.

    >>> canonical_json({"b": (1, 0.5), "a": "é"})
    '{"a":"\\\\u00e9","b":[1,0.5]}'

    Raises:
        ConfigError: the value holds something else than JSON can say, a NaN for instance.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"request: got a value that JSON cannot hold ({error}), expected plain values") from None


def request_hash(request: tuple[str, str] | str | GenerationRequest, **extra: Any) -> str:
    """Return the sha256 of a request as 64 hexadecimal digits.

    Args:
        request: a pair of context and continuation, a document, or a generation request.
        extra: whatever else tells requests apart, such as the ids of the examples in the prompt.
    """
    content: dict[str, Any]
    if isinstance(request, GenerationRequest):
        content = {"kind": "generate", "prompt": request.prompt, **asdict(request.sampling)}
    elif isinstance(request, str):
        content = {"kind": "rolling", "document": request}
    else:
        context, continuation = request
        content = {"kind": "score", "context": context, "continuation": continuation}
    return hashlib.sha256(canonical_json({**content, **({"extra": extra} if extra else {})}).encode()).hexdigest()


def sample_seed(request: GenerationRequest) -> int:
    """Return the seed of one sample, 63 bits, from the base seed, the request's hash and the sample's number."""
    return derive_seed(request.seed, request_hash(request), request.sample)
