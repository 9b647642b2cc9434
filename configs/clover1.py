"""Clover-1 heads (a reconstruction) for the shipped base model.

Hidden states as for `configs/clover.py`, then:

    python -m train --config=configs/clover1.py --workdir=runs/clover1

Minutes on one core of 2: 7. Expected: `top1/head1` 0.30, `top1/head2` 0.27.
"""

from configs import clover
from configs.defaults import Config


def get_config() -> Config:
    """As Clover-2, with one augmenting layer, residual heads and the text's tokens as labels."""
    config = clover.get_config()
    config.task.heads.update(
        {"variant": "clover1", "num_layers": 1, "num_heads": 5, "distill": False}
    )
    return config
