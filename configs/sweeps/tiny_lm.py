"""Learning rates of the tiny language model, three seeds each: 15 runs.

python -m train.data.bpe --corpus=text:train --vocab_size=512 --out=runs/tokenizer512
python -m train.sweep --sweep=configs/sweeps/tiny_lm.py --workers=2
"""

from configs import sweep, tiny_lm


def get_sweep() -> sweep.Sweep:
    """A grid, evaluated ten times a run."""
    config = tiny_lm.get_config()
    config.evaluate_every = 20
    rates = {"optimizer.learning_rate": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]}
    return sweep.Sweep(
        config=config,
        points=sweep.product(rates, {"seed": [0, 1, 2]}),
        metric="bits_per_byte",
    )
