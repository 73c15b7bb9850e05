"""The heads: one file each, one line here."""

from vla_jax.models.heads import detokenizer, diffusion, flow, gpt2, lstm, mlp

# name -> (file, its Linen module)
HEADS = {
    "mlp": (mlp, mlp.MLPHead),
    "lstm": (lstm, lstm.LSTMHead),
    "gpt2": (gpt2, gpt2.GPT2Head),
    "detokenizer": (detokenizer, detokenizer.Detokenizer),
    "diffusion": (diffusion, diffusion.DiffusionHead),
    "flow": (flow, flow.FlowHead),
}
