"""Slow, plain torch versions of everything that the package computes. Nothing here imports tokensieve."""
