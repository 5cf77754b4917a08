"""The kind of device that JAX computes on."""

import os

import jax

from s3net_common.errors import InputError

DEVICE_VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")


def jax_backend() -> str:
    """Return "cpu", "gpu" or "tpu".

    Raises:
        InputError: JAX cannot use the devices that environment variables such as JAX_PLATFORMS name.
    """
    try:
        jax.numpy.zeros(()).block_until_ready()
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX was installed without CUDA
        values = [f"{name}={os.environ[name]}" for name in DEVICE_VARIABLES if os.environ.get(name)]
        reason = " ".join(str(error).split()) or "JAX was installed without it"
        raise InputError(
            f"JAX cannot use the device that {' and '.join(values) or 'it has chosen'} asks for ({reason[:200]}): "
            'unset the variable, or install JAX for that device, such as with pip install "jax[cuda12]"'
        ) from error
