"""Low-rank adapters (LoRA): their files, their weights in the host's memory, and who uses which."""
