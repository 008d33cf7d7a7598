"""Structured output: what a request's text must look like, and the matcher that says which tokens may come next."""
