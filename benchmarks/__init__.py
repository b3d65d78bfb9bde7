"""Measurements: each script says its regime, prints a table, and one line of JSON last."""
