"""One file per model family: spec, weight names, and how it is drawn."""
