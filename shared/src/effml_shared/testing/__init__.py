"""Conformance kits: classes of tests that every implementation of one contract inherits. They need pytest."""
