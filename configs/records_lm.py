"""The base model of the long-context comparisons: 11M parameters, text and retrieval at 256 tokens.

Half of the documents are pieces of Python sources, the others hold numbered lines or hidden numbers
and questions about them, so that the model retrieves within 256 tokens:

    python -m train.data.records --tokenizer=assets/python-5m --length=255 --tokens=24000000 \
        --tasks=lines-short,lines-short,passkey-short,needle,multi-key --out=runs/records.jsonl
    python -m train --config=configs/records_lm.py --workdir=runs/records_lm

Made for an accelerator: 2,400 updates of 65,536 tokens. They took 3 minutes on an NVIDIA
H200, evaluations included (0.4887 bits per byte of the mix); not measured on 2 cores.
"""

from configs import base_lm
from configs.defaults import Config


def get_config() -> Config:
    """Nearly 7 epochs; whole documents per row, so that all positions are trained alike."""
    config = base_lm.get_config()
    config.task.update(
        {
            "corpus": "text:runs/records.jsonl",
            "tokenizer": "assets/python-5m",
            "sequence_length": 256,
            "whole_documents": True,
            "evaluation_rows": 64,
        }
    )
    config.task.model.update(
        {
            "hidden_size": 320,
            "num_layers": 8,
            "num_heads": 5,
            "num_kv_heads": 5,
            "intermediate_size": 864,
            "max_length": 256,
        }
    )
    config.steps = 2400
    config.batch_size = 256
    config.steps_per_call = 10
    config.evaluate_every = 500
    config.checkpoint_every = 500
    return config
