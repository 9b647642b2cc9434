"""A sweep that runs in a second, as a file that tests can launch.

The environment changes it: LONGREACH_TEST_SWEEP is JSON with what to set.
"""

import json
import os
from typing import Any

from configs import sweep
from tests.train import regression


def make(**changes: Any) -> sweep.Sweep:
    """Three learning rates of the smallest task, two seeds each."""
    config = regression.get_config()
    config.task.on_device = True
    config.steps, config.evaluate_every, config.log_every = 40, 8, 8
    config.checkpoint_every = 8
    rates = {"optimizer.learning_rate": [1e-3, 1e-2, 1e-1], "seed": [0, 1]}
    values = {"points": sweep.product(rates), "metric": "norm", **changes}
    if "config" in values:
        config.update_from_flattened_dict(values.pop("config"))
    if "rows" in values:
        config.task.on_device, config.task.delay = False, values.pop("rows")
    return sweep.Sweep(config=config, **values)


def get_sweep() -> sweep.Sweep:
    """What the environment asks for."""
    return make(**json.loads(os.environ.get("LONGREACH_TEST_SWEEP", "{}")))
