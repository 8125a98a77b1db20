"""What a program can do and what it gets back: the server's side."""

import textwrap

import pytest
from effml_rl.sandbox import Program, PythonSandbox


@pytest.fixture(scope="module")
def sandbox():
    with PythonSandbox(timeout=1.0, workers=1) as sandbox:
        yield sandbox


def test_values_are_plain_data(sandbox):
    calls = ("1", "2.5", "'x'", "[1, (2, {'a': {3}})]", "None", "True", "float('inf')")
    assert sandbox.run(Program("", calls=calls)).values == (
        1,
        2.5,
        "x",
        [1, (2, {"a": {3}})],
        None,
        True,
        float("inf"),
    )


def test_output_and_success_without_calls(sandbox):
    execution = sandbox.run(Program("import sys\nprint('hi')\nprint('no', file=sys.stderr)\nsys.exit()"))
    assert (execution.status, execution.stdout, execution.stderr) == ("completed", "hi\n", "no\n")


def test_runs_as_a_module(sandbox):
    # With separate globals and locals neither recursion nor a comprehension in a function would find its names.
    code = """
        import dataclasses
        k = 3
        def factorial(n): return 1 if n == 0 else n * factorial(n - 1)
        def total(): return sum([k * i for i in range(3)])
        @dataclasses.dataclass
        class P:
            x: int
        ok = __name__ == "__main__"
    """
    program = Program(textwrap.dedent(code), calls=("factorial(5)", "total()", "P(3).x", "ok"))
    assert sandbox.run(program).values == (120, 9, 3, True)


@pytest.mark.parametrize(("code", "value"), [("x = 3\nx * 6", 18), ("9*2", 18)])
def test_last_expression(sandbox, code, value):
    assert sandbox.run(Program(code, last_expression=True)).values == (value,)


@pytest.mark.parametrize("code", ["", "x = 18", "18;", "18 ="])
def test_last_expression_must_be_one(sandbox, code):
    status = "completed" if code == "18;" else "syntax_error"
    assert sandbox.run(Program(code, last_expression=True)).status == status


def test_files_of_its_own_directory(sandbox):
    code = "open('a', 'w').write('18')\nimport tempfile\nt = tempfile.NamedTemporaryFile()\nx = int(open('a').read())"
    assert sandbox.run(Program(code, calls=("x",))).values == (18,)


def test_the_same_program_gives_the_same_answer(sandbox):
    program = Program("import random\nx = [random.random(), hash('a'), list({'a', 'b', 'c'})]", calls=("x",))
    executions = sandbox.run_many([program] * 4)
    assert all(execution.values == executions[0].values for execution in executions)


def test_programs_do_not_see_each_other(sandbox):
    sandbox.run(Program("import builtins, math\nbuiltins.leak = math.pi = 3\nopen('leak', 'w')"))
    code = "import builtins, math, os"
    calls = ("hasattr(builtins, 'leak')", "math.pi == 3", "os.listdir()", "sorted(os.environ)")
    names = ["LANG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PYTHONHASHSEED", "TMPDIR"]
    assert sandbox.run(Program(code, calls=calls)).values == (False, False, [], names)


def test_isolation_is_reported(sandbox):
    isolation = sandbox.run(Program("")).isolation
    assert set(isolation.split("+")) <= {"landlock", "seccomp", "rlimit"}


def test_values_of_a_large_source(sandbox):
    code = "x = 0\n" + "x += 1\n" * 20_000
    assert PythonSandbox(timeout=10, workers=1).run(Program(code, calls=("x",))).values == (20_000,)
