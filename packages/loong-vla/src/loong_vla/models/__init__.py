"""One file per model family, data only: sizes, names, and the rows of its weights."""
