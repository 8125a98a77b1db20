"""Problems as text and as ids: the vectorised encoding against the words one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from effml_rl.solution_tree import SolutionTreeTask

FULL = SolutionTreeTask()
SMALL = SolutionTreeTask(n_states=6, n_actions=3, n_contexts=4, n_problem=5, len_range=(1, 4), n_irrelevant=0)


@pytest.mark.parametrize("task", [FULL, SMALL])
def test_ids_are_those_of_the_words(task: SolutionTreeTask) -> None:
    examples, tokenizer = task.sample(200, "sft"), task.tokenizer
    prompts, mask = examples.prompts(tokenizer)
    completions, sequences = examples.completions(tokenizer), examples.sequences(tokenizer)
    assert prompts.shape == mask.shape == (200, task.prompt_length)
    assert completions.shape == (200, task.completion_length)
    assert prompts.dtype == completions.dtype == torch.int64
    for i, example in enumerate(examples):
        prompt, answer = tokenizer.encode(example.prompt).tolist(), tokenizer.encode(example.completion).tolist()
        length = len(example.actions)
        assert len(prompt) == 4 * length + 5 + 2 * task.n_irrelevant
        assert len(answer) == 4 * length + 3
        assert tokenizer.decode(prompt) == example.prompt
        assert prompts[i][mask[i]].tolist() == prompt
        assert prompts[i].tolist() == [tokenizer.pad_id] * (task.prompt_length - len(prompt)) + prompt
        assert completions[i].tolist() == answer + [tokenizer.pad_id] * (task.completion_length - len(answer))
        whole = prompt + answer
        assert sequences[i].tolist() == whole + [tokenizer.pad_id] * (sequences.shape[1] - len(whole))
    assert bool((sequences != tokenizer.unk_id).all())


def test_lengths_of_the_official_setting() -> None:
    for example in FULL.sample(100, "test"):
        if len(example.actions) == 5:
            assert (len(example.prompt.split()), len(example.completion.split())) == (45, 23)
        if len(example.actions) == 10:
            assert (len(example.prompt.split()), len(example.completion.split())) == (65, 43)
    assert (FULL.prompt_length, FULL.completion_length, FULL.tokenizer.vocab_size) == (65, 43, 29)


def test_selected_and_joined_problems_are_the_same_ones() -> None:
    examples = SMALL.sample(10, "rl")
    again = examples.select(slice(0, 3)).join(examples.select(np.arange(3, 10)))
    assert list(again) == list(examples)
    assert len(examples.select(slice(0, 0))) == 0
    assert examples.select(slice(0, 0)).sequences(SMALL.tokenizer).shape[0] == 0
