"""The contrastive loss: :mod:`launch` is the host side, :mod:`kernels` the device side."""
