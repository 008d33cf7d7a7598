"""How quantised checkpoints of Hugging Face's form store a linear, one format per file."""
