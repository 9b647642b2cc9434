"""Small vision transformers, trained at one grid of patches to be read at larger ones.

    python -m train --config=configs/seqpe_vit.py --workdir=runs/seqpe_vit

By a word after the file's name: `:no_contrastive`, `:no_transfer`, `:no_both`, and the rivals
`:learned` and `:sinusoidal`. Images are textures made on the spot; MNIST's format is read with

    --config.task.images=FOLDER/t10k-images-idx3-ubyte.gz --config.task.model.classes=10

600 updates on MNIST's images took 3 minutes on 2 cores (AMD EPYC) beside other work and gave 68% at
the trained grid (`:learned` 84%, one minute): `python -m experiments.seqpe_vit`.
"""

from configs import defaults
from configs.defaults import Config
from configs.seqpe import WITHOUT

RIVALS = ("learned", "sinusoidal")


def get_config(variant: str = "seqpe") -> Config:
    """3 layers of width 64; grids of up to 100 by 100 patches; the learning rate is not tuned."""
    if variant not in (*WITHOUT, *RIVALS):
        raise ValueError(f"unknown variant {variant!r}: {', '.join((*WITHOUT, *RIVALS))}.")
    config = defaults.training()
    config.task.update(
        {
            "name": "train.tasks.image_classification:ImageClassification",
            "images": "textures:4096:28",
            "held_out": 1024,
            "evaluation_rows": 128,
            "model": {
                "image_size": (28, 28),
                "patch": 4,
                "channels": 1,
                "classes": 9,
                "hidden_size": 64,
                "num_layers": 3,
                "num_heads": 4,
                "position": variant if variant in RIVALS else "none",
            },
        }
    )
    if variant in WITHOUT:
        _add_seqpe(config, WITHOUT[variant])
    config.steps = 600
    config.batch_size = 64
    config.clip = "group_norm"
    config.clip_threshold = 5.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.05
    config.log_every = 50
    config.checkpoint_every = 300
    return config


def _add_seqpe(config: Config, without: tuple[str, ...]) -> None:
    """The encoder as wide as the model; the samplers' shares are those of the text."""
    config.task.name = "research.context.seqpe.vision:SeqPEVision"
    weights = {name: 0.0 if name in without else 0.1 for name in ("contrastive", "transfer")}
    config.task.update(
        {
            "encoder": {
                "width": config.task.model.hidden_size,
                "heads": config.task.model.num_heads,
                "axis_length": 100,
                "axes": 2,
                "layers": 2,
                "dropout": 0.1,
            },
            "injection": {"method": "attn_mul", "projection": "multi"},
            "regulariser": {
                "sampling": {"candidates": 16, "spread": 256, "transfer_points": 16},
                "weights": weights,
                "pivots": 8,
                "shift_rows": 16,
            },
        }
    )
