"""What people look at: curves, pictures and the HTML report of a run. Needs the extra "train"."""
