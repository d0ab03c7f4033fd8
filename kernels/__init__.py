"""Triton kernels of fgfast, imported as ``fgfast.kernels``: a folder an operation, or a file where one is enough.

Kernels register nothing: :mod:`fgfast.ops` checks the arguments, chooses a backend and calls them.
"""
