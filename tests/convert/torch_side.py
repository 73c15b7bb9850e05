"""Run by an interpreter that has torch and transformers: load an exported folder, print what it is.

python torch_side.py FOLDER IO.npz OUT.npz FILE.pt
"""

import json
import sys

import numpy as np
import torch  # type: ignore[import-not-found]
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

folder, io, out, pt = sys.argv[1:]
model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
model.eval()
given = np.load(io)
with torch.no_grad():
    from_ids = model(
        pixel_values=torch.from_numpy(given["in/pixel_values"]),
        input_ids=torch.from_numpy(given["in/input_ids"]),
        attention_mask=torch.from_numpy(given["in/attention_mask"]),
        image_embeds_position_mask=torch.from_numpy(given["in/image_embeds_position_mask"]),
    )
state = torch.load(pt, weights_only=True)["state_dict"]
prefix = "model.backbone."
differing = [
    name
    for name, value in model.state_dict().items()
    if not torch.equal(state[prefix + name], value)
]
tied = [state[prefix + f"text_model.{n}.weight"] for n in ("lm_head", "model.embed_tokens")]
text = "<grounding>An image of a robot lift the block"
np.savez(
    out,
    logits=from_ids.logits.numpy(),
    ids=np.array(AutoTokenizer.from_pretrained(folder)(text)["input_ids"]),
    report=json.dumps(
        {
            "missing": sorted(loading["missing_keys"]),
            "unexpected": sorted(loading["unexpected_keys"]),
            "mismatched": [str(key) for key in loading["mismatched_keys"]],
            "dtype": str(model.dtype),
            "differing": differing,
            "tied": tied[0].data_ptr() == tied[1].data_ptr(),
            "others": sorted(n for n in state if not n.startswith(prefix))[:1],
            "image_mean": list(AutoImageProcessor.from_pretrained(folder).image_mean),
        }
    ),
)
