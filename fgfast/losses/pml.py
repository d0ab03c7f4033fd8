"""SupConLoss as a subclass of pytorch-metric-learning's base class, which its DistributedLossWrapper asks for.

``fgfast.losses.SupConLoss`` creates this class in a process that has imported pytorch-metric-learning.
"""

from pytorch_metric_learning.losses import BaseMetricLossFunction

from fgfast.losses import supcon


class SupConLoss(supcon.SupConLoss, BaseMetricLossFunction):
    """``fgfast.losses.SupConLoss``; of the other base class only the type is used.

    The other class's constructor runs as well; ours sets distance, reducer and the regularizer again afterwards.
    """
