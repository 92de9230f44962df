"""A pytest plugin: any tests as for a Python or torch that there is no compiled extension for.

PYTHONPATH=tests python -m pytest -p without_extension tests/test_layouts.py
"""

from importlib.machinery import EXTENSION_SUFFIXES

# Before anything has imported the package, which then does not load it.
EXTENSION_SUFFIXES.remove(".abi3.so")
