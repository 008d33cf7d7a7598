"""Model architectures, one per file, and what a configuration file says about a model."""
