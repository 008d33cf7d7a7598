"""Rounding a model's linears to few bits: GPTQ, AWQ, round-to-nearest, and what writes and weighs the result."""
