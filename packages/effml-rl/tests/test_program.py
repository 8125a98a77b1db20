import pytest
from effml_rl.sandbox import Program
from effml_shared.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"code": None}, r"code: got None"),
        ({"code": b"x"}, r"code: got b'x'"),
        ({"code": "", "calls": "f()"}, r"calls: got 'f\(\)'"),
        ({"code": "", "calls": [1]}, r"calls: got \[1\]"),
        ({"code": "", "calls": ["f()"], "last_expression": True}, r"last_expression"),
    ],
)
def test_bad_programs(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Program(**arguments)
