r"""MetricGrids on an image, the whole image in every step.

    python -m train --config=configs/metric_grids_image.py --workdir=runs/image \
        --config.task.image=FILE.png

Minutes on 2 cores: about 1 for a crop of 128 x 128. Expected: `psnr` 40 dB on the part of
scikit-image's astronaut with the face (rows 0 to 127, columns 150 to 277).

`--config=configs/metric_grids_image.py:official` has the setting of the 24 Kodak images (512 x 768,
20,000 steps, for an accelerator), `:ngp` is instant-ngp in the small setting.
"""

import ml_collections

from configs import defaults
from configs.defaults import Config

TASK = "research.approximation.metric_grids.task"
# levels, coarsest and finest resolution, log2 of the rows per level, steps, learning rate
SIZES = {
    "small": (8, 8, 64, 9, 1000, 4e-3),
    "official": (13, 16, 256, 14, 20_000, 1e-3),
}


def get_config(variant: str = "small") -> Config:
    """``small`` (crops of about 128 x 128) or ``official``; ``ngp`` is instant-ngp, small.

    The official learning rate belongs to 20,000 steps; for 1,000 the small setting has four times
    that. Every optimiser is Adam(0.9, 0.99, 1e-15) without weight decay, one for the table and one
    for the decoder, with a cosine to a hundredth.
    """
    if variant not in (*SIZES, "ngp"):
        raise ValueError(f"unknown variant {variant!r}: choose small, official or ngp.")
    levels, base, finest, log2_size, steps, rate = SIZES.get(variant, SIZES["small"])
    config = defaults.training()
    config.task.update(
        {
            "name": f"{TASK}:MetricGridsImage",
            "image": "",
            "known_rows": True,
            "field": {
                "grid": {
                    "n_dims": 2,
                    "n_levels": levels,
                    "n_features": 2,
                    "log2_size": log2_size,
                    "base_res": base,
                    "max_res": finest,
                },
                "out_dim": 3,
                "hidden": 64,
                "num_layers": 5,
            },
        }
    )
    if variant == "ngp":
        config.task.name = f"{TASK}:InstantNgpImage"
        config.task.field.num_layers = 3
        rate = 1e-2
    else:
        config.task.field.update({"spaces": 3, "modulate": True, "separate_tables": False})
    config.steps = steps
    config.batch_size = 2**18
    config.steps_per_call = config.log_every = 50
    config.clip = "none"
    config.optimizer = ml_collections.ConfigDict(
        {
            "name": "adamw",
            "learning_rate": rate,
            "schedule": "cosine",
            "warmup_steps": 0,
            "final_fraction": 0.01,
            "weight_decay": 0.0,
            "beta1": 0.9,
            "beta2": 0.99,
            "eps": 1e-15,
        }
    )
    return config
