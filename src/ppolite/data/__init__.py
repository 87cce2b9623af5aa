"""Data: files and the embedded default become the nouns of `ppolite.types`, and those become token ids."""
