"""Learning curves of the tiny language model: twenty learning rates, forty evaluations of each.

python -m train.data.bpe --corpus=text:train --vocab_size=512 --out=runs/tokenizer512
python -m train.sweep --sweep=configs/sweeps/lm_curves.py --workers=2
python -m train.sweep --sweep=configs/sweeps/lm_curves.py --stop=lc_pfn --folder=runs/sweeps/stopped
"""

from configs import sweep, tiny_lm


def get_sweep() -> sweep.Sweep:
    """Random rates between 1e-4 and 1."""
    config = tiny_lm.get_config()
    config.steps, config.evaluate_every, config.log_every = 400, 10, 10
    rates = {"optimizer.learning_rate": sweep.log_uniform(1e-4, 1.0)}
    return sweep.Sweep(
        config=config,
        points=sweep.sample(rates, count=20, seed=0),
        metric="bits_per_byte",
    )
