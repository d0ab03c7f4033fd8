"""The contrastive loss. Host side: :mod:`launch`; device side: :mod:`tiles`, :mod:`forward`, :mod:`gradient`.

Compiled ahead of time and tuned: :mod:`cases`.
"""
