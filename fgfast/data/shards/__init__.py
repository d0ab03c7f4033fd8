"""Shards: tar files of images in the WebDataset convention, with an index of where each image lies."""
