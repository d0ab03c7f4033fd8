"""What people look at: curves, images and the HTML report of a run. Needs the extra "train"."""
