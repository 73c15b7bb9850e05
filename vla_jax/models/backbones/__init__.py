"""The backbones: one file each, one line here."""

from vla_jax.models.backbones import kosmos2, moondream, uform

# name -> (file, its Linen module)
BACKBONES = {
    "kosmos2": (kosmos2, kosmos2.Kosmos2),
    "moondream": (moondream, moondream.Moondream),
    "uform": (uform, uform.UForm),
}
