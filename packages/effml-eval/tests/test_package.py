import effml_eval


def test_version_is_the_distributions_version():
    assert effml_eval.__version__ == "0.1.0"
    assert effml_eval.__all__ == ["__version__"]
