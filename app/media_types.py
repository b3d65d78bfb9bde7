"""The forms of answers, by their media types. Imports nothing: who asks a service elsewhere needs no torch for them."""

from __future__ import annotations

JSON, PNG, ZIP = "application/json", "image/png", "application/zip"
APNG, WEBP, NPZ = "image/apng", "image/webp", "application/x-npz"
PROBLEM = "application/problem+json"
