"""The base language model: 5.2M parameters, Python sources, 4096 byte-level BPE tokens.

Tokenizer first, then the model:

    python -m train.data.bpe --corpus=python_stdlib --vocab_size=4096 --out=runs/tokenizer4096
    python -m train --config=configs/base_lm.py --workdir=runs/base_lm

Minutes on 2 cores: about 140 with nothing beside it (1.6 s per update). Expected validation bits
per byte: 1.09 (1.68 after 1,000 updates, 1.18 after 3,000).
"""

from configs import defaults
from configs.defaults import Config


def get_config() -> Config:
    """20.5M tokens in 5000 updates of 4096."""
    config = defaults.training()
    config.task.update(
        {
            "name": "train.tasks.language_model:LanguageModel",
            "corpus": "python_stdlib",
            "tokenizer": "runs/tokenizer4096",
            "sequence_length": 512,
            "evaluation_split": "validation",
            "evaluation_rows": 8,
            "unroll": True,
            "remat": False,
            "model": {
                "vocab_size": 4096,
                "hidden_size": 256,
                "num_layers": 6,
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 64,
                "intermediate_size": 640,
                "max_length": 512,
            },
        }
    )
    config.steps = 5000
    config.batch_size = 8
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.final_fraction = 0.05
    config.log_every = 10
    config.evaluate_every = 1000
    config.checkpoint_every = 100
    return config
