"""Solution formats: labels by structure, programs that are cut out, rendered solutions, and hostile text."""

import time

import pytest
from effml_shared.data.solution_formats import FORMATS, SolutionProgram, built_in_formats, find_format
from effml_shared.data.word_problems import WordProblem, WordProblemGenerator
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

PROBLEM = WordProblem('Say "7\\n" halves?', 7, (("+", 5), ("/", 3), ("*", 2)))
ALL = built_in_formats(*FORMATS)


def value(answer):
    """Run a program of our own; what a model wrote belongs into a sandbox."""
    if not isinstance(answer, SolutionProgram):
        return answer
    names = {}
    *statements, last = answer.code.split("\n")
    exec(answer.code if answer.call else "\n".join(statements), names)
    return eval(answer.call or last, names)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), fractions=st.booleans(), name=st.sampled_from([*FORMATS]), change=st.integers(1, 9))
def test_rendered_solutions_are_told_apart_and_right_unless_changed(seed, fractions, name, change):
    (problem,) = WordProblemGenerator(seed, fractions=fractions).problems(1)
    text = FORMATS[name].render(problem)
    assert find_format(text, ALL) is FORMATS[name]
    assert value(FORMATS[name].answer(text)) == pytest.approx(float(problem.answer), rel=1e-12)
    other = WordProblem(problem.question, problem.start, (*problem.steps, ("+", change)))
    assert value(FORMATS[name].answer(FORMATS[name].render(other))) != pytest.approx(float(problem.answer))


def test_renderings_to_the_letter():
    assert FORMATS["python_function"].render(PROBLEM) == (
        'def simple_math_problem():\n    """Say \\"7\\\\n\\" halves?"""\n    value = 7\n    value = value + 5\n'
        "    value = value // 3\n    value = value * 2\n    result = value\n    return result"
    )
    assert FORMATS["inline_code"].render(PROBLEM).split("\n")[1:7] == [
        "<llm-code>",
        "value = 7",
        "value = value + 5",
        "value = value // 3",
        "value = value * 2",
        "value",
    ]
    assert FORMATS["equation"].render(PROBLEM) == "7 + 5 = 12\n12 / 3 = 4\n4 * 2 = 8\n#### 8"
    assert FORMATS["prose"].render(PROBLEM) == (
        "We start with 7. Adding 5 gives 7 + 5 = 12. Dividing by 3 gives 12 / 3 = 4. Multiplying by 2 gives "
        "4 * 2 = 8. The answer is \\boxed{8}."
    )


FUNCTION = "def simple_math_problem():\n    return 1"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("definitely 18", "prose"),
        ("def solve():\n    return 18", "prose"),
        (FUNCTION, "python_function"),
        (f"Here:\n```python\n{FUNCTION}\n```", "python_function"),
        ("text\n    def simple_math_problem ( ) :", "python_function"),
        ("x = def simple_math_problem():", None),
        ("call simple_math_problem() = 3", "prose"),
        (f"<llm-code>{FUNCTION}", "prose"),
        (f"<llm-code>\n{FUNCTION}", "python_function"),
        (f"{FUNCTION}\n<llm-code>3</llm-code>", "inline_code"),
        ("</llm-code>3<llm-code>", "prose"),
        ("</llm-code><llm-code></llm-code>", "inline_code"),
        ("3 + 4 = 7\n\n 7 - 2 = 5 \n#### 5\n", "equation"),
        ("#### 5", "prose"),
        ("3 + 4 = 7\nso\n#### 7", "prose"),
        ("3 = 3\n#### 3", "prose"),
        ("", None),
        ("nothing", None),
    ],
)
def test_labels(text, label):
    found = find_format(text, ALL)
    assert (found.name if found else None) == label


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (FUNCTION, FUNCTION),
        (f"import math\nfrom os import path\nfrom 3 to 4\nimport taxes rise\n{FUNCTION}", None),
        (f"def half(x):\n    return x / 2\n\nIt is:\n{FUNCTION}\nThat gives 1.", None),
        (f"{FUNCTION}\n\n    # more\n\nprint(2)", f"{FUNCTION}\n\n    # more\n"),
        (f"class A:\n    pass\nx = 3\n{FUNCTION}", FUNCTION),
        ("  def simple_math_problem():\n      return 1\n  x", FUNCTION),
        ("def simple_math_problem(): return 1", "def simple_math_problem(): return 1"),
    ],
)
def test_function_that_is_cut_out(text, code):
    expected = {
        1: "import math\nfrom os import path\n" + FUNCTION,
        2: "def half(x):\n    return x / 2\n\n" + FUNCTION,
    }
    answer = FORMATS["python_function"].answer(text)
    wanted = code if code is not None else expected[1 if text.startswith("import") else 2]
    assert answer == SolutionProgram(wanted, "simple_math_problem()")
    compile(answer.code, "", "exec")


def test_the_last_function_counts():
    first = FUNCTION.replace("1", "2")
    answer = FORMATS["python_function"].answer(f"{first}\n{FUNCTION}")
    assert value(answer) == 1


def test_the_first_whole_block_counts():
    text = "<llm-code>\n  1 + 1\n</llm-code> or <llm-code>\n5\n</llm-code>"
    assert FORMATS["inline_code"].answer(text) == SolutionProgram("1 + 1")
    assert FORMATS["inline_code"].answer("<llm-code>1") is None


def test_order_of_names_does_not_matter():
    assert built_in_formats("prose", "inline_code") == (FORMATS["inline_code"], FORMATS["prose"])
    for names in ((), ("latin",)):
        with pytest.raises(ConfigError, match=r"formats: got"):
            built_in_formats(*names)


@given(st.text(alphabet="def simple_math_problem():\n<llm-code>/=+-#0189 ", max_size=300))
def test_any_text(text):
    found = find_format(text, ALL)
    if found is not None:
        found.answer(text)


@pytest.mark.parametrize(
    "piece",
    [
        *("<llm-code>", "</llm-code>", "def simple_math_problem(", FUNCTION + "\n", "def f():\n ", "\n", "\t\n", " "),
        *("1 + 1 = 2\n", "1+", "1", "1.,", "import a\n", "import a."),
    ],
)
def test_time_is_linear_in_the_text(piece):
    started = time.process_time()
    text = piece * (200_000 // len(piece))
    for spec in ALL:
        spec.detect(text)
        spec.answer(text)
    assert time.process_time() - started < 3.0  # quadratic would be minutes
