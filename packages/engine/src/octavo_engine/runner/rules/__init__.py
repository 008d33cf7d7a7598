"""What changes logits before a token is drawn: one kind of rule per file, all behind the interface of `base`."""
