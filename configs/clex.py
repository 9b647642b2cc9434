"""CLEX: the shipped base model, trained at 512 tokens, fine-tuned at 512 for texts of up to 8,192.

    python -m train --config=configs/clex.py --workdir=runs/clex

Only the analytic part, dynamic NTK with random factors: `--config.groups.ode.learning_rate=0.0`.

Minutes and expected bits per byte: not measured yet.
"""

from configs import base_lm
from configs.defaults import Config


def get_config() -> Config:
    """300 updates of 4,096 tokens; the learning rate is not tuned.

    Beside the released setting: 10 solver steps per unit of the factor instead of 100, and a higher
    learning rate for a much smaller model.
    """
    config = base_lm.get_config()
    model = config.task.model
    model.rope_base = 10000.0
    model.max_length = 8192
    config.task.update(
        {
            "name": "research.context.clex.task:CLEXTask",
            "start_from": "python-5m",
            "tokenizer": "assets/python-5m",
            "sequence_length": 512,
            "ode": {
                "head_dim": model.head_dim,
                "base": model.rope_base,
                "max_position": 512,
                "max_factor": 16,
                "param_factor": 1.0,
                "activation": "tanh",
                "time_dt": 0.1,
                "log_scale": False,
                "continuous": False,
            },
        }
    )
    config.groups = {"ode": {"learning_rate": 5e-4}}
    config.steps = 300
    config.batch_size = 8
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 10
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.evaluate_every = 150
    config.checkpoint_every = 100
    return config
