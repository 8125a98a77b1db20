import effml_diffusion


def test_version_is_the_distributions_version():
    assert effml_diffusion.__version__ == "0.1.0"
    assert effml_diffusion.__all__ == ["__version__"]
