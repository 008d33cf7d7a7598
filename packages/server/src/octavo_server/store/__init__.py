"""What outlives a server: stored responses, files and batches."""
