"""The backbones: one file each, one line here."""

from vla_jax.models.backbones import flamingo, kosmos2

# name -> (file, its Linen module)
BACKBONES = {
    "flamingo": (flamingo, flamingo.Flamingo),
    "kosmos2": (kosmos2, kosmos2.Kosmos2),
}
