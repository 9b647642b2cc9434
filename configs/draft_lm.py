"""The draft model: 1.0M parameters, with the tokenizer and the data of the base model.

    python -m train --config=configs/draft_lm.py --workdir=runs/draft_lm

Minutes on 2 cores: about 20 (0.47 s per update). Expected validation bits per byte: 1.30.
"""

from configs import base_lm
from configs.defaults import Config


def get_config() -> Config:
    """The base config at half the width, half the depth and half the updates."""
    config = base_lm.get_config()
    config.task.model.update(
        {
            "hidden_size": 128,
            "num_layers": 3,
            "num_heads": 2,
            "num_kv_heads": 1,
            "intermediate_size": 320,
        }
    )
    config.steps = 2500
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 100
    config.evaluate_every = 500
    return config
