"""Shared library of dcr-mllm: configs, run directories, vision towers, the miniature and tower-level measurement."""

__version__ = "0.1.0"
