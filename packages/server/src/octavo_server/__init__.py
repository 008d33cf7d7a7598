"""An OpenAI-compatible HTTP server and command line for the Octavo engine."""
