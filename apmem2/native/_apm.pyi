"""The generated extension. Its functions, structs and constants are those of apm.h, which is their manual."""

from typing import Any

ffi: Any
lib: Any
