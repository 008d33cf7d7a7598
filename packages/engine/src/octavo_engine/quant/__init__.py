"""How a linear's weights are held and multiplied, one method per file."""
