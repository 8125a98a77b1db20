"""Claim-bearing experiments of effml-quant, announced through the entry-point group `effml.experiments`."""
