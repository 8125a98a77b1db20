import effml_quant


def test_the_version_is_the_distributions_and_every_public_name_is_there():
    assert effml_quant.__version__ == "0.1.0"
    assert all(hasattr(effml_quant, name) for name in effml_quant.__all__)
    assert effml_quant.__all__ == sorted(effml_quant.__all__, key=lambda name: (not name[0].isupper(), name))
