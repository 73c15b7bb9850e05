"""Run by an interpreter that has torch and transformers: load what the exports wrote.

python torch_side.py folder FOLDER IO.npz OUT.npz CLASS TEXT INPUT...
python torch_side.py pt FOLDER FILE.pt OUT.npz
python torch_side.py adapter FOLDER ADAPTER MERGED OUT.npz
"""

import json
import sys
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
import transformers
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor


def folder(where, io, out, class_name, text, *inputs):
    """The golden inputs through the exported model; its tokenizer's and processor's outputs."""
    kind = getattr(transformers, class_name)
    loaded = np.load(io)
    model, loading = kind.from_pretrained(
        where, output_loading_info=True, attn_implementation=str(loaded["attention"])
    )
    batch = {name: torch.from_numpy(loaded["in/" + name]) for name in inputs}
    if "image_grid_thw" in batch:  # without it, images have the positions of text
        batch["mm_token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).int()
    with torch.no_grad():
        result = model.eval()(**batch)
    images = AutoImageProcessor.from_pretrained(where)
    try:
        processor = type(AutoProcessor.from_pretrained(where)).__name__
    except (ImportError, ValueError) as error:  # those for videos ask for torchvision
        processor = str(error)
    report = {
        "missing": sorted(loading["missing_keys"]),
        "unexpected": sorted(loading["unexpected_keys"]),
        "mismatched": [str(key) for key in loading["mismatched_keys"]],
        "dtype": str(model.dtype),
        "processor": processor,
    }
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(where)
    np.savez(
        out,
        logits=result.logits.numpy(),
        ids=np.array(tokenizer(text)["input_ids"]),
        pixels=images(list(loaded["photo"][None]), return_tensors="np")["pixel_values"],
        report=json.dumps(report),
    )


def pt(where, file, out):
    """Which tensors of a .pt file differ from those of the model."""
    model = AutoModelForImageTextToText.from_pretrained(where)
    state = torch.load(file, weights_only=True)["state_dict"]
    prefix = "model.backbone."
    pairs = {name: (state[prefix + name], value) for name, value in model.state_dict().items()}
    tied = [state[f"{prefix}text_model.{n}.weight"] for n in ("lm_head", "model.embed_tokens")]
    report = {
        "differing": [name for name, (a, b) in pairs.items() if not torch.equal(a, b)],
        "tied": tied[0].data_ptr() == tied[1].data_ptr(),
        "others": sorted(n for n in state if not n.startswith(prefix))[:1],
    }
    np.savez(out, report=json.dumps(report))


def adapter(where, beside, merged, out):
    """The largest difference of PEFT's own merge from ours, and the largest change of a weight."""
    from peft import PeftModel  # type: ignore[import-not-found]

    plain = AutoModelForImageTextToText.from_pretrained(where)
    before = {name: x.clone() for name, x in plain.state_dict().items()}
    reference = PeftModel.from_pretrained(plain, beside).merge_and_unload().state_dict()
    ours = AutoModelForImageTextToText.from_pretrained(merged).state_dict()
    report = {
        "error": max(float((reference[name] - x).abs().max()) for name, x in ours.items()),
        "change": max(float((before[name] - x).abs().max()) for name, x in ours.items()),
    }
    np.savez(out, report=json.dumps(report))


if __name__ == "__main__":
    {"folder": folder, "pt": pt, "adapter": adapter}[sys.argv[1]](*sys.argv[2:])
