"""Part pooling. Host side: :mod:`launch`; device side: :mod:`sums`, :mod:`votes`, :mod:`gradient`."""
