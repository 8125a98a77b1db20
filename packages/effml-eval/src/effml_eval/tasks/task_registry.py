"""Tasks by name: `NAME:FILE` for a registered convention on local data, or the path of a YAML file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError

from effml_eval.tasks.task import Task
from effml_eval.tasks.task_files import from_yaml

__all__ = ["load_task", "register_task", "registered_tasks"]

_Maker = TypeVar("_Maker", bound=Callable[..., Task])
_MAKERS: dict[str, Callable[..., Task]] = {}


def register_task(name: str) -> Callable[[_Maker], _Maker]:
    """Make a function from the path of a file (and `shots`, the path of another) to a task known by a name.

    Raises:
        ConfigError: the name is taken.
    """

    def register(make: _Maker) -> _Maker:
        if name in _MAKERS or not name or ":" in name:
            raise ConfigError(f"name: got {name!r}, expected one that is not taken, without a colon")
        _MAKERS[name] = make
        return make

    return register


def registered_tasks() -> list[str]:
    """Return the names of registered tasks."""
    import effml_eval.tasks.standard_tasks  # noqa: F401 (registers them)

    return sorted(_MAKERS)


def load_task(name: str, /, **options: Any) -> Task:
    """Return the task `NAME:FILE`, or that of a YAML file.

    Args:
        name: such as `"piqa:data/piqa-valid.jsonl"` or `"my_task.yaml"`.
        options: of the registered function, such as `shots`.

    Raises:
        ConfigError: there is no such task, or its description is wrong.
        DataError: its data cannot be read.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        return from_yaml(name)
    registered, _, path = name.partition(":")
    check_choice("task", registered, registered_tasks())
    if not path:
        raise ConfigError(f"task: got {name!r}, expected {registered}:FILE, with the path of its data")
    return _MAKERS[registered](path, **options)
