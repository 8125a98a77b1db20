import effml_eval


def test_the_version_is_the_distributions_and_every_public_name_is_there():
    assert effml_eval.__version__ == "0.1.0"
    assert all(hasattr(effml_eval, name) for name in effml_eval.__all__)
