"""What pyproject.toml cannot say yet: the C core is built by cffi, and the wheel is abi3."""

from setuptools import setup

setup(cffi_modules=["apmem2/native/_build.py:ffibuilder"], options={"bdist_wheel": {"py_limited_api": "cp311"}})
