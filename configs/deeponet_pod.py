"""POD-DeepONet on diffusion-reaction: the trunk is a basis computed from the training solutions.

python -m train --config=configs/deeponet_pod.py --workdir=runs/deeponet_pod

Minutes on one core: 0.4. Expected: `relative_l2` 0.040 on new functions.
"""

import ml_collections

from configs import defaults
from configs.deeponet import full_batch
from configs.defaults import Config


def get_config() -> Config:
    """500 functions solved on a grid of 50 by 50, 16 modes, 100 functions per update."""
    config = defaults.training()
    config.task.name = "research.approximation.deeponet.task:DeepONetTask"
    config.task.problem = ml_collections.ConfigDict(
        {"name": "diffusion_reaction", "sensors": 50, "nt": 50}
    )
    config.task.functions = 500
    config.task.test_functions = 200
    config.task.queries = 0
    config.task.test_queries = 0
    config.task.model = ml_collections.ConfigDict(
        {
            "kind": "pod",
            "branch": (50, 100, 100, 16),
            "trunk": (2,),
            "modes": 16,
            "points": 2500,
        }
    )
    full_batch(config, 100)
    config.steps = 10_000
    config.optimizer.schedule = "cosine"
    config.optimizer.final_fraction = 0.01
    return config
