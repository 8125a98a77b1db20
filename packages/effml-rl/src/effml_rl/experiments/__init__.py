"""Experiments that test a paper's claims; `effml list` shows them."""
