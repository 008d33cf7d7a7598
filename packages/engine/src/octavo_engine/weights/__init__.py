"""Model files: finding them, reading them safely, and streaming their weights."""
