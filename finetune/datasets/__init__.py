"""Dataset builders, one module an experiment arm; each yields rows of chat messages."""
