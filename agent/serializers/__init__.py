"""How a frame becomes bytes: one file per format."""
