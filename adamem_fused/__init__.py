"""Adaptive Memory optimizers: AM-AdamW and AM-SGD, fused.

    from adamem_fused import AMAdamW
    optimizer = AMAdamW(model.parameters(), lr=3e-4, weight_decay=0.1)

After Topollai & Choromanska, "Adaptive Memory Momentum via a Model-Based Framework for
Deep Learning Optimization", arXiv 2510.04988.
"""

from adamem_fused._version import __version__
from adamem_fused.am_adamw import AMAdamW
from adamem_fused.am_sgd import AMSGD
from adamem_fused.groups import param_groups
from adamem_fused.release import release_gradients

__all__ = ["AMSGD", "AMAdamW", "__version__", "param_groups", "release_gradients"]
