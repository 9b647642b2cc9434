"""CLEX: the base model, trained at 256 tokens, fine-tuned at 256 for texts of up to 4,096.

The corpus is that of `configs/records_lm.py`:

    python -m train --config=configs/clex.py --workdir=runs/clex

Only the analytic part, dynamic NTK with random factors: `--config.groups.ode.learning_rate=0.0`.
Only the random positions: `--config.task.plain_frequencies=True`.
`python -m experiments.context_methods` trains and compares all of them.

Minutes: 30 updates of 4,096 tokens, as in the committed comparison, took about 2.5 on 2 cores (AMD
EPYC), two trainings at a time; all of this config was not run. What to expect after those 30:
`research/context/README.md`.
"""

from configs import records_lm
from configs.defaults import Config


def get_config() -> Config:
    """300 updates of 16,384 tokens.

    Beside the released setting: 10 solver steps per unit of the factor instead of 100, and a higher
    learning rate for a much smaller model.
    """
    config = records_lm.get_config()
    model = config.task.model
    model.rope_base = 10000.0
    model.max_length = 4096
    config.task.update(
        {
            "name": "research.context.clex.task:CLEXTask",
            "start_from": "records-11m",
            "ode": {
                "head_dim": model.head_dim,
                "base": model.rope_base,
                "max_position": 256,
                "max_factor": 16,
                "param_factor": 1.0,
                "activation": "tanh",
                "time_dt": 0.1,
                "log_scale": False,
                "continuous": False,
            },
            "plain_frequencies": False,
        }
    )
    config.groups = {"ode": {"learning_rate": 5e-4}}
    config.steps = 300
    config.batch_size = 64
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 10
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.evaluate_every = 300
    config.checkpoint_every = 300
    return config
