"""Giraffe: the shipped base model, trained at 512 tokens, fine-tuned at 1,024 under another basis.

    python -m train --config=configs/giraffe.py --workdir=runs/giraffe

The bases of the survey, the first of which is the one above:

    --config.task.basis.scale=4
    --config.task.basis.scale=1 --config.task.basis.power=0.5
    --config.task.basis.scale=1 --config.task.basis.truncate=512
    --config.task.basis.scale=1 --config.task.basis.randomize=True
    --config.task.basis.scale=1 --config.task.basis.xpos=True
    --config.task.basis.scale=1

The last is plain RoPE, and the baseline. With `--config.task.model.rope.rope_type=yarn` and
`--config.task.model.rope.factor=4` it is YaRN.

Minutes and expected bits per byte: not measured yet.
"""

from configs import base_lm
from configs.defaults import Config


def get_config() -> Config:
    """300 updates of 4,096 tokens at twice the trained length; the learning rate is not tuned."""
    config = base_lm.get_config()
    config.task.update(
        {
            "name": "research.context.giraffe.task:GiraffeTask",
            "start_from": "python-5m",
            "tokenizer": "assets/python-5m",
            "sequence_length": 1024,
            "evaluation_rows": 4,
            "basis": {
                "scale": 4.0,
                "power": 0.0,
                "truncate": 0,
                "randomize": False,
                "xpos": False,
            },
            "slide": {"start": 8192.0, "end": 128.0, "step": 8.0},
        }
    )
    config.task.model.max_length = 2048
    config.task.model.rope = {
        "rope_type": "default",
        "factor": 1.0,
        "original_max_position": 512,
    }
    config.steps = 300
    config.batch_size = 4
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0
    config.evaluate_every = 150
    config.checkpoint_every = 100
    return config
