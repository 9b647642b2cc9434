"""LC-PFN as the paper trained its largest: 26.8 million parameters on 10 million curves.

    python -m train --config=configs/lc_pfn_large.py --workdir=runs/lc_pfn_large

Not measured: it needs an accelerator.
"""

from configs import lc_pfn
from configs.defaults import Config


def get_config() -> Config:
    """1,000 epochs of 100 updates of 100 curves; the rate rises for 250 epochs from 0, then falls.

    One cut-off per batch, dropout 0.2 and a rate that changes by the epoch, as in the released
    code.
    """
    config = lc_pfn.get_config()
    config.task.network.update(
        {
            "width": 512,
            "layers": 12,
            "heads": 4,
            "ffn": 1024,
            "buckets": 1000,
            "dropout": 0.2,
        }
    )
    config.task.cutoff = "batch"
    config.task.epoch_steps = 100
    config.steps = 100_000
    config.batch_size = 100
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 25_000
    config.log_every = 100
    config.evaluate_every = 10_000
    config.checkpoint_every = 5_000
    return config
