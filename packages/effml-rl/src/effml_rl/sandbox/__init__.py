"""Run Python that a model wrote, outside the trainer's process and within limits."""

from effml_rl.sandbox.program import Execution, Program
from effml_rl.sandbox.python_sandbox import PythonSandbox

__all__ = ["Execution", "Program", "PythonSandbox"]
