"""Curves, figures and the HTML report of a run. Needs the extra "train"."""
