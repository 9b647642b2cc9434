"""The base model made fit for early exits: layer dropout and a loss at every exit (LayerSkip).

    python -m train --config=configs/layerskip.py --workdir=runs/layerskip
    python -m train.export --run=runs/layerskip --out=runs/layerskip-export

It goes on from `python-5m` with its corpus and tokenizer. The control without the recipe is
`--config.task.dropout=0.0 --config.task.exit_scale=0.0`.

Minutes and numbers: not measured yet. `nats_per_token/exit1` to `exit6` say how good each exit is;
what early exits need is that the exit after half of the layers lies within about 1 nat of the last.
"""

from configs import base_lm
from configs.defaults import Config


def get_config() -> Config:
    """1500 updates of 4096 tokens; dropout and exits as for fine-tuning."""
    config = base_lm.get_config()
    config.task.update(
        {
            "name": "research.speculative.del_exit.task:LayerSkipTask",
            "start_from": "python-5m",
            "tokenizer": "assets/python-5m",
            "dropout": 0.1,
            "growing_steps": 0,
            "exit_scale": 0.2,
            "rotation": 2,
        }
    )
    config.steps = 1500
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.evaluate_every = 500
    return config
