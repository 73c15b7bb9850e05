"""Transformer and convolution towers that backbones are made of."""
