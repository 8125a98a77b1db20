"""effml-optim."""
