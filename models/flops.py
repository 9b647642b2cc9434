"""Work of a model's parts: floating-point operations of products, two per multiply-add."""

from models.decoder import Config


def layer_flops(cfg: Config, context: int) -> float:
    """FLOPs of one layer for one token that attends to ``context`` others and to itself."""
    q_width, kv_width = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    projections = 2.0 * cfg.hidden_size * (2 * q_width + 2 * kv_width)
    attention = 4.0 * (context + 1) * q_width
    matrices = 3 if cfg.gated_mlp else 2
    return projections + attention + 2.0 * matrices * cfg.hidden_size * cfg.intermediate_size
