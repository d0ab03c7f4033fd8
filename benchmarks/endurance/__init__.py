"""Endurance of fgfast: runs that are killed, files that are damaged, images that are lost, and long runs."""
