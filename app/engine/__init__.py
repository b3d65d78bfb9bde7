"""The engine: one worker thread that owns the network. Knows nothing of HTTP."""
