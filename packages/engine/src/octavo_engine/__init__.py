"""An LLM inference engine on paged attention: continuous batching, models, sampling, offline LLM."""
