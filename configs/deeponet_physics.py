"""Physics-informed DeepONet on the antiderivative: from input functions and the equation alone.

python -m train --config=configs/deeponet_physics.py --workdir=runs/deeponet_physics

Minutes on one core: 2. Expected: `mse` 5e-5 and `relative_l2` 0.016 on new functions.
"""

import ml_collections

from configs import defaults
from configs.deeponet import full_batch
from configs.defaults import Config


def get_config() -> Config:
    """2,000 functions with 20 residual points each, 500 functions per update, tanh."""
    config = defaults.training()
    config.task.name = "research.approximation.deeponet.physics:PhysicsTask"
    config.task.problem = ml_collections.ConfigDict(
        {"name": "ode", "equation": "antiderivative", "sensors": 100}
    )
    config.task.functions = 2000
    config.task.test_functions = 5000
    config.task.queries = 20
    config.task.test_queries = 1
    config.task.residual = "antiderivative"
    config.task.known_weight = 1.0
    config.task.model = ml_collections.ConfigDict(
        {"branch": (100, 40, 40), "trunk": (1, 40, 40), "activation": "tanh"}
    )
    full_batch(config, 500)
    config.steps = 10_000
    config.optimizer.schedule = "cosine"
    config.optimizer.final_fraction = 0.01
    return config
