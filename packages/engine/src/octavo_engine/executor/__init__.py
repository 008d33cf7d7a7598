"""Executors: what runs batches, behind one contract."""
