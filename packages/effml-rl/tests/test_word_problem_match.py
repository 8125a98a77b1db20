"""Word-problem solutions in several formats: the verifier's table, labels, fallback, and rendered solutions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from effml_rl.sandbox import PythonSandbox
from effml_rl.verifiers.word_problem_match import WordProblemMatch
from effml_shared.data.miniature import MINIATURE_FORMATS, miniature_problems
from effml_shared.data.solution_formats import FORMATS, built_in_formats
from effml_shared.data.word_problems import WordProblemGenerator
from effml_shared.errors import ConfigError


@pytest.fixture(scope="module")
def sandbox() -> Iterator[PythonSandbox]:
    with PythonSandbox(timeout=0.5, workers=1) as sandbox:
        yield sandbox


FUNCTION = "def simple_math_problem():\n    {}\n"
TABLE = [
    # completion, label, status, status with fallback: all against 18
    (FUNCTION.format("return 18"), "python_function", "correct", "correct"),
    (FUNCTION.format("return 14.5"), "python_function", "wrong", "wrong"),
    (FUNCTION.format("return 36 / 2"), "python_function", "correct", "correct"),
    ("<llm-code>\nx = 9\nx * 2\n</llm-code>\nso it is 96", "inline_code", "correct", "correct"),
    ("<llm-code>\n96\n</llm-code>\nso it is \\boxed{18}", "inline_code", "wrong", "wrong"),
    ("9 times 2 is \\boxed{18}", "prose", "correct", "correct"),
    ("9 minus 3 is \\boxed{6}", "prose", "wrong", "wrong"),
    ("definitely 18", "prose", "correct", "correct"),
    (FUNCTION.format("while True: pass") + "It is 18.", "python_function", "timeout", "timeout"),
    (FUNCTION.format("raise ValueError") + "It is 18.", "python_function", "runtime_error", "correct"),
    (FUNCTION.format("return 18)") + "It is 18.", "python_function", "syntax_error", "correct"),
    (FUNCTION.format("return None") + "It is 17.", "python_function", "unparseable", "wrong"),
    (FUNCTION.format('"""18"""'), "python_function", "unparseable", "correct"),
    ("<llm-code>\nx = 18\n</llm-code>", "inline_code", "syntax_error", "correct"),
    ("<llm-code>\n18", "prose", "correct", "correct"),
    ("no idea", "other", "unparseable", "unparseable"),
    ("", "other", "unparseable", "unparseable"),
    ("$18.00 dollars", "prose", "correct", "correct"),
    ("def solve():\n    return 18", "prose", "correct", "correct"),
]


@pytest.mark.parametrize("fallback", [False, True])
def test_table(sandbox: PythonSandbox, fallback: bool) -> None:
    texts = [row[0] for row in TABLE]
    verifier = WordProblemMatch(sandbox, fallback=fallback)
    assert verifier.labels(texts) == [row[1] for row in TABLE]
    verdicts = verifier([""] * len(TABLE), texts, ["#### 18"] * len(TABLE))
    for (text, _, plain, with_fallback), verdict in zip(TABLE, verdicts, strict=True):
        expected = with_fallback if fallback else plain
        assert (verdict.status, verdict.reward) == (expected, float(expected == "correct")), (text, verdict)


def test_label_does_not_depend_on_the_answer(sandbox: PythonSandbox) -> None:
    verifier = WordProblemMatch(sandbox)
    for problem in WordProblemGenerator().problems(5):
        for name in ("inline_code", "python_function", "prose"):
            text = FORMATS[name].render(problem)
            other = text.replace(str(problem.start), str(problem.start + 1))
            assert verifier.labels([text, other]) == [name, name]


def test_accuracy_is_the_sum_of_share_times_accuracy(sandbox: PythonSandbox) -> None:
    verifier, texts = WordProblemMatch(sandbox), [row[0] for row in TABLE]
    rewards = [verdict.reward or 0.0 for verdict in verifier([""] * len(TABLE), texts, [18] * len(TABLE))]
    labels = verifier.labels(texts)
    total = 0.0
    for label in set(labels):
        rows = [reward for reward, own in zip(rewards, labels, strict=True) if own == label]
        total += len(rows) / len(labels) * (sum(rows) / len(rows))
    assert total == pytest.approx(sum(rewards) / len(rewards), abs=1e-12)


@pytest.mark.parametrize("fractions", [False, True])
def test_rendered_solutions_are_right_and_those_of_another_problem_wrong(
    sandbox: PythonSandbox, fractions: bool
) -> None:
    problems = WordProblemGenerator(seed=2, fractions=fractions, numbers=(1, 20)).problems(6)
    verifier = WordProblemMatch(sandbox, built_in_formats(*FORMATS))
    for name, spec in FORMATS.items():
        texts = [spec.render(problem) for problem in problems]
        assert verifier.labels(texts) == [name] * len(texts)
        right = verifier([""] * len(texts), texts, [problem.answer for problem in problems])
        wrong = verifier([""] * len(texts), texts, [problem.answer + 1 for problem in problems])
        assert [verdict.status for verdict in right] == ["correct"] * len(texts)
        assert [verdict.status for verdict in wrong] == ["wrong"] * len(texts)


def test_miniature_formats_need_no_sandbox() -> None:
    problems = miniature_problems().problems(20)
    verifier = WordProblemMatch(None, MINIATURE_FORMATS)
    for spec in MINIATURE_FORMATS:
        texts = [spec.render(problem) for problem in problems]
        verdicts = verifier([""] * 20, texts, [str(problem.answer) for problem in problems])
        assert {verdict.status for verdict in verdicts} == {"correct"}
        assert set(verifier.labels(texts)) == {spec.name}


def test_a_program_without_a_sandbox() -> None:
    with pytest.raises(ConfigError, match=r"sandbox: got none"):
        WordProblemMatch()([""], [FUNCTION.format("return 18")], [18])


def test_our_own_failure_is_no_zero() -> None:
    with PythonSandbox(workers=1, setup="import no_such_module") as broken:
        (verdict,) = WordProblemMatch(broken, fallback=True)([""], [FUNCTION.format("return 18")], [18])
    assert (verdict.status, verdict.reward) == ("sandbox_error", None)


@pytest.mark.parametrize("target", [None, "no number", True])
def test_no_gold(target: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a number"):
        WordProblemMatch()([""], ["18"], [target])


def test_no_formats() -> None:
    with pytest.raises(ConfigError, match=r"formats: got none"):
        WordProblemMatch(formats=())
