"""What the streaming benchmark is made of: engines to serve, and a reader of streams in a process of its own."""
