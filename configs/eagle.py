"""An EAGLE-like one-layer drafter for the shipped base model: the strong baseline.

Hidden states as for `configs/clover.py`, then:

    python -m train --config=configs/eagle.py --workdir=runs/eagle
"""

import ml_collections

from configs import clover
from configs.defaults import Config


def get_config() -> Config:
    """The data, updates and optimiser of Clover-2, so that the methods differ alone.

    The authors' learning rate of 3e-5 is for 800,000 updates; 1e-3 was not tuned for this size.
    """
    config = clover.get_config()
    config.optimizer.learning_rate = 1e-3
    config.task.name = "research.speculative.clover.task:EagleTask"
    config.task.heads = ml_collections.ConfigDict(
        {"input_norm": False, "v_weight": 1.0, "p_weight": 0.1, "noise": 0.1}
    )
    config.task.eval_heads = 5
    return config
