import pytest
from effml_shared.cli import parse
from effml_shared.errors import ConfigError


def test_words_may_stand_before_and_after_options():
    options = parse(["run", "toy", "a=1", "--preset", "smoke", "b=2"])
    assert (options.name, options.overrides, options.preset) == ("toy", ["a=1", "b=2"], "smoke")
    options = parse(["reproduce", "x", "--out", "d", "y"])
    assert options.names == ["x", "y"]


def test_a_sweep_tells_its_grid_from_what_is_fixed():
    options = parse(["sweep", "toy", "a=1", "--grid", "b=1,2", "c=3,4", "--at-once", "2", "e=5", "--grid", "d=6,7"])
    assert options.overrides == ["a=1", "e=5"]
    assert options.grid == ["b=1,2", "c=3,4", "d=6,7"]
    assert (options.at_once, options.executor, options.slurm) == (2, "auto", [])
    assert parse(["sweep", "toy", "--grid", "a=1", "--slurm", "partition=x", "mem_gb=4"]).slurm == [
        "partition=x",
        "mem_gb=4",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"COMMAND"),
        (["rnu"], r"invalid choice: 'rnu'"),
        (["run"], r"NAME"),
        (["run", "toy", "--prest", "smoke"], r"unknown argument --prest"),
        (["doctor", "now"], r"unknown argument now"),
        (["sweep", "toy"], r"--grid"),
        (["sweep", "toy", "--grid"], r"expected at least one argument"),
        (["sweep", "toy", "--grid", "a=1", "--executor", "tpu"], r"invalid choice: 'tpu'"),
        (["sweep", "toy", "--grid", "a=1", "--at-once", "many"], r"invalid int value: 'many'"),
    ],
)
def test_what_no_command_takes_is_an_error_that_shows_the_way(words, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(words)
    assert "--help` shows how" in str(error.value)
