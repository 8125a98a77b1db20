import effml_arch


def test_version_is_the_distributions_version():
    assert effml_arch.__version__ == "0.1.0"
    assert effml_arch.__all__ == ["__version__"]
