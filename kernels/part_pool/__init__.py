"""Part pooling. Host side: :mod:`launch`; device side: :mod:`kernels`."""
