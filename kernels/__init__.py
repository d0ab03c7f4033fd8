"""Triton kernels of fgfast, imported as ``fgfast.kernels``: one folder or file per operation.

In a folder, ``kernels`` (or several such files) is the device side, ``launch`` the host side, and ``cases`` lists what
is compiled ahead of time and timed by the tuner. Kernels register no operators: :mod:`fgfast.ops` checks the arguments,
chooses a backend and calls them.
"""
