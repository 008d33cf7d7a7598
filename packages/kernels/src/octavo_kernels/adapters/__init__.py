"""Adapters to the conventions of others; none is imported by the package itself."""
