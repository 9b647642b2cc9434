r"""A draft model distilled from SmolLM2-135M-Instruct: 11M parameters, 9.4M of them embeddings.

    python -m train.data.collect --target=smollm2-135m --chat --prompts=FILE.jsonl:FIELD,... \
        --count=1200 --prompt_tokens=128 --max_new_tokens=192 --batch=32 --out=runs/hidden/smollm2
    python -m train --config=configs/draft_smollm2.py --workdir=runs/draft_smollm2

Minutes on 2 cores: about 55 at the 4 seconds that an update takes alone, 174 beside other work.
Expected: `agreement` 0.30, `acceptance` 0.27.
"""

from configs import defaults
from configs.defaults import Config


def get_config() -> Config:
    """Width 192, so that a pass reads a twelfth of the target's weights; nothing is tuned."""
    config = defaults.training()
    config.task.update(
        {
            "name": "train.tasks.distillation:Distillation",
            "target": "smollm2-135m",
            "hidden": "runs/hidden/smollm2",
            "sequence_length": 320,
            "model": {
                "vocab_size": 49152,
                "hidden_size": 192,
                "num_layers": 4,
                "num_heads": 3,
                "num_kv_heads": 3,
                "head_dim": 64,
                "intermediate_size": 512,
                "max_length": 8192,
            },
        }
    )
    config.steps = 800
    config.batch_size = 8
    config.clip = "norm"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0
    config.evaluate_every = 200
    config.checkpoint_every = 100
    return config
