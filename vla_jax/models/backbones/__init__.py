"""The backbones: one file each, one line here."""

from vla_jax.models.backbones import kosmos2, llava, llava_mpt

# name -> (file, what makes its Linen module)
BACKBONES = {
    "kosmos2": (kosmos2, kosmos2.Kosmos2),
    "llava": (llava, llava.build),
    "llava_mpt": (llava_mpt, llava_mpt.build),
}
