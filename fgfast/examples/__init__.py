"""Short programs that show fgfast at work in other people's code: ``python -m fgfast.examples.NAME``.

Each is a ``main`` of about 30 lines that runs in seconds on a CPU, on drawn or random images and random weights.
"""
