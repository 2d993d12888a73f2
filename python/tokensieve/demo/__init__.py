"""`tokensieve demo`: a photo in, a table and a picture out. Needs the [cli] extra; nothing here is imported by the rest of the package."""
