"""The backbones: one file each, one line here."""

from vla_jax.models.backbones import kosmos2, ofa

# name -> (file, its Linen module)
BACKBONES = {
    "kosmos2": (kosmos2, kosmos2.Kosmos2),
    "ofa": (ofa, ofa.OFA),
}
