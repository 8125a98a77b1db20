import effml_diffusion


def test_the_version_is_the_distributions_and_every_public_name_is_there():
    assert effml_diffusion.__version__ == "0.1.0"
    assert all(hasattr(effml_diffusion, name) for name in effml_diffusion.__all__)
