"""fgfast: cluster pixels into parts, pool them, contrast them. The public names; importing this loads torch alone."""

from fgfast.backend import use_backend

__version__ = "0.1.0"

__all__ = ["__version__", "use_backend"]
