"""The native extension with the CUDA kernels, which a build may lack. Private."""

from typing import Any

architectures: str
driver: Any
is_simulated: bool
toolkit_version: int

def check_available() -> None: ...
def device_count() -> int: ...
def driver_version() -> int: ...
