"""The rows of a sampling round that are worth learning from: verified, ended, each once.

Rows are kept as ragged token ids, so that of a round's completions only those that are learnt from stay in memory. The
rows of all ranks are joined in the order of ranks, which is that of the prompts: two all-gathers, of lengths and of
tokens, padded to the rank that has most.
"""

from __future__ import annotations

import torch
from effml_shared import distributed
from torch import Tensor

from effml_rl.rank_statistics import means
from effml_rl.rollout_batch import RolloutBatch

__all__ = ["VerifiedRows", "from_all_ranks"]


class VerifiedRows:
    """Collect rows from rollouts, and count what is left out.

    Args:
        deduplicate: keep a completion of a prompt once.
        keep_truncated: keep completions that were cut off.
        max_length: tokens of prompt and completion; None: no limit.

    Attributes:
        prompts, completions: token ids, one list per row.
    """

    def __init__(
        self, *, deduplicate: bool = True, keep_truncated: bool = False, max_length: int | None = None
    ) -> None:
        self.deduplicate, self.keep_truncated, self.max_length = deduplicate, keep_truncated, max_length
        self.prompts: list[list[int]] = []
        self.completions: list[list[int]] = []
        self._seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self._counts = dict.fromkeys(("rows", "verified", "truncated", "groups", "solved", "duplicates", "too_long"), 0)

    def add(self, rollouts: RolloutBatch, verified: Tensor) -> None:
        """Take in rollouts, and which of them (rows,) were verified."""
        rollouts, verified = rollouts.to("cpu"), verified.cpu()
        self._counts["rows"] += len(rollouts)
        self._counts["verified"] += int(verified.sum())
        self._counts["truncated"] += int(rollouts.truncated.sum())
        self._counts["groups"] += len(rollouts.group_index.unique())
        self._counts["solved"] += len(rollouts.group_index[verified].unique())
        for row in (verified if self.keep_truncated else verified & ~rollouts.truncated).nonzero().flatten().tolist():
            prompt = rollouts.prompt_ids[row, rollouts.prompt_mask[row]].tolist()
            completion = rollouts.completion_ids[row, rollouts.completion_mask[row]].tolist()
            key = tuple(prompt), tuple(completion)
            if self.deduplicate and key in self._seen:
                self._counts["duplicates"] += 1
            elif self.max_length is not None and len(prompt) + len(completion) > self.max_length:
                self._counts["too_long"] += 1
            else:
                self._seen.add(key)
                self.prompts.append(prompt)
                self.completions.append(completion)

    def metrics(self) -> dict[str, float]:
        """Return, over all ranks, what `ExpertIteration` reports: shares of completions and prompts, counts of rows."""
        counts, one = self._counts, float(distributed.is_main())  # a denominator of 1, as the sum over ranks
        return means(
            {
                "verified": (counts["verified"], counts["rows"]),
                "truncated": (counts["truncated"], counts["rows"]),
                "solved": (counts["solved"], counts["groups"]),
                "kept": (len(self.completions), one),
                "duplicates": (counts["duplicates"], one),
                "too_long": (counts["too_long"], one),
            }
        )


def from_all_ranks(rows: list[list[int]]) -> list[list[int]]:
    """Return the ragged rows of all ranks, in the order of ranks."""
    if distributed.world_size() == 1:
        return rows
    device = distributed.default_device()
    lengths = _gather(torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device))
    tokens = _gather(torch.tensor([token for row in rows for token in row], dtype=torch.int64, device=device))
    return [row.tolist() for row in tokens.split(lengths.tolist())]


def _gather(values: Tensor) -> Tensor:
    """Return the numbers (n,) of all ranks, n differing, joined."""
    counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(distributed.world_size())]
    torch.distributed.all_gather(counts, torch.tensor([len(values)], device=values.device))
    most = max(1, *(int(count) for count in counts))
    padded = torch.cat([values, values.new_zeros(most - len(values))])
    parts = [torch.zeros_like(padded) for _ in counts]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)]).cpu()
