"""Conformance kits: classes of tests that every implementation of one contract inherits. They need pytest."""

from effml_shared.errors import require

require("pytest", extra="effml-shared[testing]", purpose="by effml_shared.testing")
