"""openpi's checkpoints: names, files, units."""
