r"""Clover-2 heads for SmolLM2-135M-Instruct, drafting over its 8,192 most frequent tokens.

    python -m train.data.collect --target=smollm2-135m --chat --prompts=FILE.jsonl:FIELD,... \
        --count=1200 --prompt_tokens=128 --max_new_tokens=192 --batch=32 --out=runs/hidden/smollm2
    python -m train --config=configs/clover_smollm2.py --workdir=runs/clover_smollm2

Minutes on one core of 2: 55 for 279,000 tokens, 56 for the heads (beside another job). Expected:
`top1/head1` 0.25, `top1/head2` 0.17. The loss, too, is over the draft vocabulary alone.
"""

from configs import clover
from configs.defaults import Config


def get_config() -> Config:
    """About 280,000 tokens of the target's own text, seen about twice.

    The learning rate is that of width 256 divided by the ratio of widths; it was not swept.
    """
    config = clover.get_config()
    config.task.target = "smollm2-135m"
    config.task.hidden = "runs/hidden/smollm2"
    config.task.draft_vocab = 8192
    config.task.heads.num_layers = 1
    config.steps = 600
    config.batch_size = 4
    config.optimizer.learning_rate = 2.7e-3
    config.optimizer.warmup_steps = 60
    config.evaluate_every = 300
    config.checkpoint_every = 100
    return config
