"""Language models from scratch at 128 tokens, to be read at up to 4,096: SeqPE and its rivals.

    python -m train --config=configs/seqpe.py --workdir=runs/seqpe

The others, by a word after the file's name:

    --config=configs/seqpe.py:no_contrastive     and no_transfer, no_both: SeqPE without a loss
    --config=configs/seqpe.py:rope               and learned, sinusoidal, alibi, none: the rivals

The corpus is the standard library's sources; `--config.task.corpus=text:PATH` reads files, and
`--config.compute_dtype=bfloat16` suits a GPU. An export is read by the policy `seqpe:DIR`, those of
rivals by `dense` and `interpolated` (`python -m experiments.long_context`).

Minutes on 2 cores, beside other work, of 800 updates with `--config.batch_size=16` as on the
method's page: 20, of the rivals 13. Expected perplexity in range: 157, of rotary positions 150.
All 4,000 updates of 32 rows were not run.
"""

from configs import defaults
from configs.defaults import Config

LENGTH, REACH = 128, 4096
RIVALS = ("rope", "learned", "sinusoidal", "alibi", "none")
WITHOUT = {
    "seqpe": (),
    "no_contrastive": ("contrastive",),
    "no_transfer": ("transfer",),
    "no_both": ("contrastive", "transfer"),
}
"""SeqPE and its ablations: the losses whose weight is 0."""


def get_config(variant: str = "seqpe") -> Config:
    """A small GPT-2 of 4 layers; the learning rate is not tuned."""
    if variant not in (*WITHOUT, *RIVALS):
        raise ValueError(f"unknown variant {variant!r}: {', '.join((*WITHOUT, *RIVALS))}.")
    config = defaults.training()
    config.task.update(
        {
            "name": "train.tasks.language_model:LanguageModel",
            "corpus": "python_stdlib",
            "tokenizer": "assets/python-5m",
            "sequence_length": LENGTH,
            "evaluation_split": "validation",
            "evaluation_rows": 32,
            "unroll": True,
            "remat": False,
            "model": {
                "vocab_size": 4096,
                "hidden_size": 192,
                "num_layers": 4,
                "num_heads": 4,
                "num_kv_heads": 4,
                "head_dim": 48,
                "intermediate_size": 768,
                # A learned table has a row for every trained position and no more.
                "max_length": LENGTH if variant == "learned" else REACH,
                "activation": "gelu_tanh",
                "gated_mlp": False,
                "norm": "layer",
                "qkv_bias": True,
                "out_bias": True,
                "mlp_bias": True,
                "position": variant if variant in RIVALS else "none",
            },
        }
    )
    if variant in WITHOUT:
        _add_seqpe(config, WITHOUT[variant])
    config.steps = 4000
    config.batch_size = 32
    config.clip = "group_norm"
    config.clip_threshold = 5.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "linear"
    config.optimizer.warmup_steps = 200
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    config.evaluate_every = 1000
    config.checkpoint_every = 500
    return config


def _add_seqpe(config: Config, without: tuple[str, ...]) -> None:
    """The encoder as wide as the model, half the candidates and pivots of the released setting."""
    config.task.name = "research.context.seqpe.task:SeqPETask"
    config.task.encoder = {
        "width": config.task.model.hidden_size,
        "heads": config.task.model.num_heads,
        "axis_length": REACH,
        "axes": 1,
        "layers": 2,
        "causal": True,
        "mask_padding": False,
        "dropout": 0.1,
    }
    config.task.injection = {
        "method": "attn_scalar",
        "projection": "single",
        "scalar_scale": 1.0,
    }
    weights = {name: 0.0 if name in without else 0.1 for name in ("contrastive", "transfer")}
    config.task.regulariser = {
        "sampling": {
            "candidates": 16,
            "hard_rate": 0.4,
            "hard_share": 0.25,
            "spread": 256,
            "transfer_points": 32,
            "shift_rate": 0.1,
        },
        "weights": {**weights, "beta": 1.0, "per_head": True, "measure": "kl"},
        "pivots": 8,
        "shift_rows": 16,
    }
