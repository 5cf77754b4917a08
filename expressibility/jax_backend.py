"""The kind of device that JAX computes on."""

import os

import jax

from s3net_common.errors import InputError, first_line


def jax_backend() -> str:
    """Return "cpu", "gpu" or "tpu".

    Raises:
        InputError: JAX cannot use the devices that the environment variable JAX_PLATFORMS names.
    """
    try:
        return jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX was installed without CUDA
        platforms = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME", "")
        raise InputError(
            f"JAX cannot use the device that JAX_PLATFORMS={platforms} asks for ({first_line(error)}): unset "
            'JAX_PLATFORMS, or install JAX for that device, such as with pip install "jax[cuda12]"'
        ) from error
