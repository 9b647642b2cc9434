"""Giraffe: the base model, trained at 256 tokens, fine-tuned at 512 under another basis.

    python -m train.data.records --tokenizer=assets/python-5m --length=511 --tokens=6000000 \
        --seed=1 --tasks=lines-short,lines-short,passkey-short,needle,multi-key \
        --out=runs/records512.jsonl
    python -m train --config=configs/giraffe.py --workdir=runs/giraffe

The bases of the survey, the first of which is the one above:

    --config.task.basis.scale=4
    --config.task.basis.scale=1 --config.task.basis.power=0.5
    --config.task.basis.scale=1 --config.task.basis.truncate=256
    --config.task.basis.scale=1 --config.task.basis.randomize=True
    --config.task.basis.scale=1 --config.task.basis.xpos=True
    --config.task.basis.scale=1

The last is plain RoPE, and the baseline. With `--config.task.basis.scale=1`,
`--config.task.model.rope.rope_type=yarn` and `--config.task.model.rope.factor=4` it is YaRN.
`python -m experiments.context_methods` trains and compares all of them.

Minutes: 30 updates of 4,096 tokens, as in the committed comparison, took about 2.5 on 2 cores (AMD
EPYC), two trainings at a time; all of this config was not run. What to expect of each basis after
those 30: `research/context/README.md`.
"""

from configs import records_lm
from configs.defaults import Config


def get_config() -> Config:
    """300 updates of 16,384 tokens at twice the trained length."""
    config = records_lm.get_config()
    config.task.update(
        {
            "name": "research.context.giraffe.task:GiraffeTask",
            "start_from": "records-11m",
            "corpus": "text:runs/records512.jsonl",
            "sequence_length": 512,
            "evaluation_rows": 32,
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
        "original_max_position": 256,
    }
    config.steps = 300
    config.batch_size = 32
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0
    config.evaluate_every = 300
    config.checkpoint_every = 300
    return config
