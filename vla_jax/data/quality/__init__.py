"""What is wrong with a dataset although it can be read: see `vla_jax.data.quality.check`."""
