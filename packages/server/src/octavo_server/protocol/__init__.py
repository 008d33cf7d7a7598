"""The request bodies of the HTTP interface."""
