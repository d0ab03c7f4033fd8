"""The contrastive loss. Host side: :mod:`launch`; device side: :mod:`kernels`; compiled and tuned: :mod:`cases`."""
