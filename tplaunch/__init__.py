"""tplaunch: plan, launch and train tensor-parallel language models from one recipe."""

__version__ = "0.1.0"
