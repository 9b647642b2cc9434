"""What the training loop does unless a config says otherwise: the only place of these defaults."""

from typing import Any

import ml_collections

# An `ml_collections.ConfigDict`: its keys are made at run time, out of a type checker's sight.
Config = Any


def training() -> Config:
    """Every key of the loop but the task, the number of steps and the batch size."""
    config = ml_collections.ConfigDict()
    config.task = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 1
    config.batch_size = 1
    config.microbatches = 1
    config.steps_per_call = 1
    config.compute_dtype = "float32"
    config.clip = "norm"
    config.clip_threshold = 1.0
    config.ema_decay = 0.0
    config.max_bad_steps = 10
    config.log_every = 10
    config.evaluate_every = 0
    config.checkpoint_every = 1000
    config.keep_checkpoints = 2
    config.tensorboard = False
    config.optimizer = ml_collections.ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 0,
            "final_fraction": 0.1,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
        }
    )
    config.groups = ml_collections.ConfigDict()
    return config
