"""Batched torch: the default on CPU tensors, and on any device for an op that has no kernel there."""
