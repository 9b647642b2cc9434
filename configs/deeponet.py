"""DeepONet on the antiderivative operator: the paper's first example at its code's defaults.

python -m train --config=configs/deeponet.py --workdir=runs/deeponet

Minutes on 2 cores: about 3. Expected: `mse` of 1e-6 to 5e-6 on the 100,000 test functions (the
repository of the paper shows 9.3e-7) and `relative_l2` of 0.002 to 0.005. At a constant rate the
end depends on rounding: two runs of one seed, which read the inputs as sensor values and as
coefficients, gave 8e-7 and 4.8e-6.
"""

import ml_collections

from configs import defaults
from configs.defaults import Config


def get_config() -> Config:
    """10,000 triples of as many functions, full-batch Adam at 1e-3, branch and trunk of 40."""
    config = defaults.training()
    config.task.name = "research.approximation.deeponet.task:DeepONetTask"
    config.task.problem = ml_collections.ConfigDict(
        {"name": "ode", "equation": "antiderivative", "sensors": 100}
    )
    config.task.functions = 10_000
    config.task.test_functions = 100_000
    config.task.queries = 1
    config.task.test_queries = 1
    config.task.model = ml_collections.ConfigDict(
        {"branch": (100, 40, 40), "trunk": (1, 40, 40), "activation": "relu"}
    )
    full_batch(config, 10_000)
    config.steps = 50_000
    config.evaluate_every = 10_000
    return config


def full_batch(config: Config, functions: int) -> None:
    """The authors' optimiser on so many functions per update, 100 updates per call."""
    config.batch_size = functions
    config.steps_per_call = 100
    config.log_every = 1000
    config.checkpoint_every = 1000
    config.clip = "none"
    config.optimizer.update(
        {"learning_rate": 1e-3, "schedule": "constant", "weight_decay": 0.0, "beta2": 0.999}
    )
