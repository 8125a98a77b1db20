import effml_arch


def test_the_version_is_the_distributions_and_every_public_name_is_there():
    assert effml_arch.__version__ == "0.1.0"
    assert all(hasattr(effml_arch, name) for name in effml_arch.__all__)
