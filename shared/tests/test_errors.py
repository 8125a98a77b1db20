import pytest
from effml_shared.errors import ConfigError, EffmlError, MissingExtra, require


def test_require_returns_the_module():
    assert require("json", extra="x", purpose="to test").dumps([]) == "[]"


def test_missing_extra_is_one_line_with_the_install_command():
    with pytest.raises(MissingExtra) as caught:
        require("effml_no_such_module", extra="effml-shared[data]", purpose="to read Parquet files")
    message = str(caught.value)
    assert message.count("\n") == 0
    assert "pip install 'effml-shared[data]'" in message
    assert "to read Parquet files" in message
    assert isinstance(caught.value, EffmlError)


def test_a_broken_dependency_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "effml_breaks.py").write_text("import effml_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="effml_no_such_module") as caught:
        require("effml_breaks", extra="x", purpose="y")
    assert not isinstance(caught.value, EffmlError)


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)
