"""Sources of the files that an export for transformers carries; `write.py` makes the folder."""
