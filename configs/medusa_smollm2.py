"""Medusa heads for SmolLM2-135M-Instruct that share its frozen head: block plus a rank-64 map.

Hidden states as for `configs/clover_smollm2.py`, then:

    python -m train --config=configs/medusa_smollm2.py --workdir=runs/medusa_smollm2

Minutes on one core of 2: 18. Expected: `top1/head1` 0.18, `top1/head2` 0.11. A departure from the
paper, whose heads each have a matrix over the whole vocabulary.
"""

from configs import clover_smollm2, medusa
from configs.defaults import Config


def get_config() -> Config:
    """The data and number of updates of Clover-2 on the same target.

    The learning rate is that of width 256 divided by the ratio of widths; it was not swept.
    """
    config, like = medusa.get_config(), clover_smollm2.get_config()
    for name in ("target", "hidden", "draft_vocab"):
        config.task[name] = like.task[name]
    config.task.heads.shared_head = True
    for name in ("steps", "batch_size", "evaluate_every", "checkpoint_every"):
        config[name] = like[name]
    config.optimizer.learning_rate = 1.3e-3
    config.optimizer.warmup_steps = config.steps // 10
    return config
