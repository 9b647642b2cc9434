"""A search over learning rate, decay and width of the tiny language model: 30 runs.

python -m train.data.bpe --corpus=text:train --vocab_size=512 --out=runs/tokenizer512
python -m train.sweep --sweep=configs/sweeps/tiny_lm_search.py --workers=2 --stop=median
"""

from configs import sweep, tiny_lm


def get_sweep() -> sweep.Sweep:
    """Optuna's Parzen estimators, evaluated ten times a run."""
    config = tiny_lm.get_config()
    config.evaluate_every = 20
    space = {
        "optimizer.learning_rate": sweep.log_uniform(1e-3, 1e-1),
        "optimizer.weight_decay": sweep.log_uniform(1e-3, 1.0),
        "task.model.intermediate_size": sweep.choice(32, 64, 128),
    }
    return sweep.Sweep(config=config, points=sweep.Search(space, trials=30), metric="bits_per_byte")
