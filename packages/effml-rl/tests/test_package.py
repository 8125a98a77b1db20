import effml_rl


def test_the_version_is_the_distributions_and_every_public_name_is_there():
    assert effml_rl.__version__ == "0.1.0"
    assert all(hasattr(effml_rl, name) for name in effml_rl.__all__)
