"""SupConLoss as a subclass of pytorch-metric-learning's base class, which its DistributedLossWrapper asks for.

``fgfast.losses.SupConLoss`` creates this class in a process that has imported pytorch-metric-learning.
"""

from fgfast.losses.supcon import class_for_pml

SupConLoss = class_for_pml()
