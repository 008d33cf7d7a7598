"""Turns scheduled batches into tensors, runs the model and draws tokens."""
