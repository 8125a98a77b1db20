import effml_quant


def test_version_is_the_distributions_version():
    assert effml_quant.__version__ == "0.1.0"
    assert effml_quant.__all__ == ["__version__"]
