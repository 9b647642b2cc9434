"""Medusa-1 heads for the shipped base model: the baseline with independent heads.

Hidden states as for `configs/clover.py`, then:

    python -m train --config=configs/medusa.py --workdir=runs/medusa

Minutes on one core of 2: 3. Expected: `top1/head1` 0.23, `top1/head2` 0.15.
"""

import ml_collections

from configs import clover
from configs.defaults import Config


def get_config() -> Config:
    """The data and number of updates of Clover-2; the authors' cosine schedule, no weight decay.

    Learning rates tried (head 1, otherwise as in `configs/clover.py`): 15% at 1e-3 after 300
    updates of 1,024 positions; after 300 of 2,048 on less text, with 2,048 tokens drafted, 22% at
    3e-3 and 20% at 1e-2; 3e-2 diverged.
    """
    config = clover.get_config()
    config.task.name = "research.speculative.clover.task:MedusaTask"
    config.task.heads = ml_collections.ConfigDict(
        {
            "num_heads": 4,
            "shared_head": False,
            "rank": 64,
            "draft_vocab": config.task.get_ref("draft_vocab"),
            "decay": 0.8,
        }
    )
    config.clip = "none"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = config.steps // 10
    config.optimizer.beta2 = 0.999
    return config
