"""The parts that models are built of: linears, embeddings, norms, rotary tables, attention, feed-forward."""
