import effml_rl


def test_version_is_the_distributions_version():
    assert effml_rl.__version__ == "0.1.0"
    assert effml_rl.__all__ == ["__version__"]
