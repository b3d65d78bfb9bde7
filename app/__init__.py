"""The HTTP service: loads one model and serves /generate, /noise and /health."""
