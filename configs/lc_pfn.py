"""LC-PFN for learning curves of up to 100 epochs: the small one that ships with this workspace.

python -m train --config=configs/lc_pfn.py --workdir=runs/lc_pfn
python -m train.export --run=runs/lc_pfn --out=runs/lc-pfn-small

Minutes on one core: about 60 (0.45 s per update, 512,000 curves). Expected: `log_likelihood/5`
1.32, `log_likelihood/20` 2.03, `log_likelihood/80` 2.46.
"""

from configs import defaults
from configs.defaults import Config


def get_config() -> Config:
    """Width 128, 3 layers, 200 bins; fresh curves of the prior in every update.

    Beside the paper's setting (`configs/lc_pfn_large.py`): a hundredth of the parameters, so a
    learning rate ten times as high and no dropout, and a cut-off for every row.
    """
    config = defaults.training()
    config.task.update(
        {
            "name": "research.approximation.lc_pfn.task:LCPFNTask",
            "network": {
                "width": 128,
                "layers": 3,
                "heads": 4,
                "ffn": 256,
                "buckets": 200,
                "seq_len": 100,
                "dropout": 0.0,
            },
            "families": ("pow3", "ilog2", "janoschek"),
            "kind": "peaked",
            "cutoff": "row",
            "border_curves": 10_000,
            "eval_curves": 256,
            "eval_cutoffs": (5, 10, 20, 40, 80),
        }
    )
    config.steps = 8_000
    config.batch_size = 64
    config.steps_per_call = 10
    config.clip = "norm"
    config.clip_threshold = 1.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 500
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.beta2 = 0.999
    config.log_every = 50
    config.evaluate_every = 1000
    config.checkpoint_every = 500
    return config
