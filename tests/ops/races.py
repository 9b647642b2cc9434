"""What the strict interpreter of TPU kernels says of races."""


def races_found() -> bool:
    """Whether it saw one since its state was last reset; its flag has no public name."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    assert races is not None, "nothing was interpreted strictly"
    return races.races_found
