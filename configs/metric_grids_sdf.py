r"""MetricGrids on the signed distances of a shape: `torus`, `csg` or an OBJ file.

    python -m train --config=configs/metric_grids_sdf.py --workdir=runs/sdf \
        --config.task.shape=torus

Minutes on 2 cores: under 2. Expected: `iou` 0.99 on the torus.

`--config=configs/metric_grids_sdf.py:official` has the authors' setting (20,000 steps of 2^18
points, 4.2 GB of points made beforehand, for an accelerator).
"""

from configs import defaults, metric_grids_image
from configs.defaults import Config

# levels, finest resolution, log2 of the rows per level, batches, their size, steps, rate, grid
SIZES = {
    "small": (8, 128, 12, 32, 4096, 1000, 1e-3, 64),
    "official": (15, 2048, 15, 1000, 2**18, 20_000, 1e-4, 1024),
}


def get_config(variant: str = "small") -> Config:
    """``small`` or ``official``; the optimiser is the image's with a cosine to a tenth."""
    if variant not in SIZES:
        raise ValueError(f"unknown variant {variant!r}: choose small or official.")
    levels, finest, log2_size, batches, size, steps, rate, grid = SIZES[variant]
    config = metric_grids_image.get_config()
    field = config.task.field
    field.out_dim = 1
    field.grid.update(
        {
            "n_dims": 3,
            "n_levels": levels,
            "log2_size": log2_size,
            "base_res": 16,
            "max_res": finest,
        }
    )
    config.task = defaults.training().task
    config.task.update(
        {
            "name": f"{metric_grids_image.TASK}:MetricGridsSdf",
            "shape": "torus",
            "batches": batches,
            "resolution": grid,
            "field": field,
        }
    )
    config.steps = steps
    config.batch_size = size
    config.optimizer.learning_rate = rate
    config.optimizer.final_fraction = 0.1
    return config
