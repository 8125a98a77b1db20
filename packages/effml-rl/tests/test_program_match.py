import asyncio
import math

import pytest
from effml_rl.sandbox import Program, PythonSandbox
from effml_rl.verifiers import CallMatch, ProgramMatch, fenced_code
from effml_rl.verifiers.program_match import values_equal
from effml_shared.errors import ConfigError


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(timeout=0.4, workers=1) as sandbox:
        yield sandbox


def function(text):
    return Program(fenced_code(text), calls=("solve()",)) if "def solve" in text else None


class TestProgramMatch:
    @pytest.mark.parametrize(
        ("completion", "status"),
        [
            ("def solve():\n    return 18", "correct"),
            ("def solve():\n    return 36 / 2", "correct"),
            ("def solve():\n    return '18 dollars'", "correct"),
            ("def solve():\n    return 14.5", "wrong"),
            ("def solve():\n    return float('nan')", "wrong"),
            ("def solve():\n    return float('inf')", "wrong"),
            ("def solve():\n    return 10 ** 1000", "wrong"),
            ("def solve():\n    return None", "unparseable"),
            ("def solve():\n    return True", "unparseable"),
            ("def solve():\n    return [18]", "unparseable"),
            ("def solve():\n    return 'eighteen'", "unparseable"),
            ("the answer is 18", "unparseable"),
            ("def solve():\n    while True: pass\n# 18", "timeout"),
            ("def solve():\n    return [0] * 10 ** 10", "oom"),
            ("def solve():\n    raise ValueError(18)", "runtime_error"),
            ("def solve(): return 18)", "syntax_error"),
            ("print('18' * 10 ** 5)\ndef solve(): return 18", "output_limit"),
            ("Here:\n```python\ndef solve():\n    return 18\n```\nIt gives 18.", "correct"),
        ],
    )
    def test_status_and_reward(self, sandbox, completion, status):
        (verdict,) = ProgramMatch(sandbox, function)([""], [completion], ["#### 18"])
        assert (verdict.status, verdict.reward) == (status, float(status == "correct")), verdict
        assert bool(verdict.isolation) == ("def solve" in completion)

    def test_last_expression(self, sandbox):
        verifier = ProgramMatch(sandbox, lambda text: Program(text, last_expression=True))
        assert [v.status for v in verifier([""] * 2, ["x = 9\nx * 2", "x = 9"], [18] * 2)] == [
            "correct",
            "syntax_error",
        ]

    def test_rows_keep_their_places(self, sandbox):
        completions = ["no code", "def solve(): return 18", "none", "def solve(): return 17"]
        verdicts = ProgramMatch(sandbox, function)([""] * 4, completions, [18] * 4)
        assert [verdict.status for verdict in verdicts] == ["unparseable", "correct", "unparseable", "wrong"]

    def test_same_verdicts_from_a_thread_and_an_event_loop(self, sandbox):
        verifier = ProgramMatch(sandbox, function)
        rows = ([""] * 2, ["def solve(): return 18", "def solve():\n    while True: pass"], [18] * 2)
        here = [verdict.status for verdict in verifier(*rows)]

        async def inside():
            return [[v.status for v in verifier(*rows)], [v.status for v in await asyncio.to_thread(verifier, *rows)]]

        assert here == ["correct", "timeout"]
        assert asyncio.run(inside()) == [here, here]

    def test_our_own_failure_is_no_zero(self):
        with PythonSandbox(workers=1, setup="import no_such_module") as sandbox:
            (verdict,) = ProgramMatch(sandbox, function)([""], ["def solve(): return 18"], [18])
        assert (verdict.status, verdict.reward) == ("sandbox_error", None)

    def test_no_gold(self, sandbox):
        with pytest.raises(ConfigError, match=r"expected a number"):
            ProgramMatch(sandbox, function)([""], ["def solve(): return 18"], [None])


class TestCallMatch:
    TESTS = ("assert add(1, 2) == 3", "assert add([1], [2]) == [1, 2]", ("add('a', 'b')", "ab"))

    @pytest.mark.parametrize(
        ("code", "status"),
        [
            ("def add(a, b): return a + b", "correct"),
            ("def add(a, b): return b + a", "wrong"),
            ("def add(a, b): return 3", "wrong"),
            ("import sys\nsys.exit(0)", "runtime_error"),
            ("class A:\n    __eq__ = lambda *_: True\ndef add(a, b): return A()", "unparseable"),
            ("def sub(a, b): return a - b", "runtime_error"),
        ],
    )
    def test_status_and_reward(self, sandbox, code, status):
        (verdict,) = CallMatch(sandbox)([""], [code], [self.TESTS])
        assert (verdict.status, verdict.reward) == (status, float(status == "correct")), verdict

    @pytest.mark.parametrize(
        "target",
        [
            [],
            None,
            "assert f() == 1",
            ["assert f()"],
            ["f() == 1"],
            ["assert f() == g()"],
            ["assert f("],
            [("f()",)],
            [3],
        ],
    )
    def test_targets_that_cannot_be_checked_are_errors(self, sandbox, target):
        with pytest.raises(ConfigError, match=r"target: got"):
            CallMatch(sandbox)([""], ["def f(): return 1"], [target])


@pytest.mark.parametrize(
    ("value", "expected", "equal"),
    [
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        (True, 1, False),
        ((1,), [1], False),
        ([1, (2, 0.3)], [1, (2, 0.1 + 0.2)], True),
        ({"a": 1.0}, {"a": 1}, True),
        ({"a": 1}, {"b": 1}, False),
        ({1, 2}, {2, 1}, True),
        (math.inf, math.inf, True),
        (math.nan, math.nan, False),
        (None, None, True),
        ("1", 1, False),
        ([1], [1, 2], False),
    ],
)
def test_values_equal(value, expected, equal):
    assert values_equal(value, expected) is equal


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nor\n```py\ny = 2\n```\nbye", "y = 2\n"),
        ("```python\nx = 1\n", "```python\nx = 1\n"),
    ],
)
def test_fenced_code(text, code):
    assert fenced_code(text) == code
