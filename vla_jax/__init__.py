"""Vision-language-action models in JAX: backbone x structure x head."""

__version__ = "0.1.0"
