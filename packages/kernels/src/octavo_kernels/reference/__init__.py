"""The specification of every op in plain torch: slow, clear, on any device, and the oracle of the tests."""
