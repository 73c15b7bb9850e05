"""The camera roles, importable without jax."""

# A dataset or a robot maps its own camera names onto these.
CAMERAS = ("primary", "secondary", "wrist")
