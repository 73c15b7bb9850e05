"""The heads: one file each, one line here."""

from vla_jax.models.heads import lstm

# name -> (file, its Linen module)
HEADS = {
    "lstm": (lstm, lstm.LSTMHead),
}
