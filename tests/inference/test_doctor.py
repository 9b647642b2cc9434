import jax

from inference import doctor
from ops.platform import target


def test_it_reports_versions_devices_memory_and_kernels(capsys):
    assert doctor.main() == 0
    text = capsys.readouterr().out
    assert jax.__version__ in text
    assert text.count("cpu:") == len(jax.devices())
    assert "GiB of memory" in text
    assert text.count("plain XLA operations, because the target platform is cpu") == 3


def test_what_is_not_installed_is_said():
    found = doctor.versions()
    assert found["jax"] == jax.__version__
    assert set(doctor.PACKAGES) < set(found)


def test_the_kernel_follows_the_target_platform():
    assert doctor.attention_kernel(1, 256).startswith("plain XLA")
    with target("tpu"):
        assert doctor.attention_kernel(1, 256).startswith("Pallas TPU kernel")
