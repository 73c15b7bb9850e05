"""Run by a Python that has OpenVLA's or OpenVLA-OFT's code: a small model of it, and our export.

    python openvla_side.py make KIND FOLDER                 writes FOLDER and FOLDER/io.npz
    python openvla_side.py load KIND FOLDER EXPORTED OUT    reads both, writes OUT

KIND is base or oft (L1 head, state, one image). Of the towers, which timm names, small ones are
made. OFT takes the sizes of a chunk, 8 x 7, from words of the command line; LIBERO's by default.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm  # type: ignore[import-not-found]
import torch  # type: ignore[import-not-found]
import transformers
from prismatic.extern.hf import (  # type: ignore[import-not-found]
    configuration_prismatic,
    modeling_prismatic,
)
from timm.models.vision_transformer import (  # type: ignore[import-not-found]
    VisionTransformer,
)

TEXT = {"vocab_size": 32064, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
TOWERS: dict[str, dict[str, Any]] = {
    "dinov2": {"embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 2, "reg_tokens": 4},
    "siglip": {"embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2},
}
TOWERS["dinov2"] |= {"init_values": 0.1, "no_embed_class": True}
TOWERS["siglip"] |= {"class_token": False, "global_pool": "map"}
MEANS = [[0.48, 0.46, 0.41], [0.5, 0.5, 0.5]]
STDS = [[0.23, 0.22, 0.22], [0.5, 0.5, 0.5]]
DIM, STATE, SUITE = 7, 8, "libero_spatial_no_noops"
HEAD, PROJECTOR = "action_head", "proprio_projector"


def tower(name: str, pretrained: bool, **rest: Any) -> VisionTransformer:
    (sizes,) = (sizes for part, sizes in TOWERS.items() if part in name)
    rest = {k: v for k, v in rest.items() if v is not None}
    return VisionTransformer(patch_size=14, **{**sizes, **rest})


def statistics() -> dict[str, Any]:
    rng = np.random.default_rng(3)

    def columns(size: int) -> dict[str, list[float]]:
        rows = np.sort(rng.normal(size=(4, size)), axis=0).tolist()
        ends = dict(zip(("min", "q01", "q99", "max"), rows, strict=True))
        return {"mean": [0.0] * size, "std": [1.0] * size, **ends}

    action = {**columns(DIM), "mask": [True] * (DIM - 1) + [False]}
    counts = {"num_transitions": 9, "num_trajectories": 2}
    return {SUITE: {"action": action, "proprio": columns(STATE), **counts}}


def parts() -> dict[str, Any]:
    """What OFT has beside the VLM."""
    from prismatic.models import action_heads, projectors  # type: ignore[import-not-found]

    width = TEXT["hidden_size"]
    head = action_heads.L1RegressionActionHead(width, hidden_dim=width, action_dim=DIM)
    return {HEAD: head, PROJECTOR: projectors.ProprioProjector(width, proprio_dim=STATE)}


def shaken(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def make(kind: str, where: str) -> None:
    """Random parameters, none of them zero, statistics and a prompt with its image."""
    folder, rng = Path(where), np.random.default_rng(0)
    torch.manual_seed(0)
    config = configuration_prismatic.OpenVLAConfig(
        norm_stats=statistics(),
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        arch_specifier="no-align+fused-gelu-mlp",
        image_resize_strategy="resize-naive",
        text_config=TEXT,
        torch_dtype="float32",
    )
    shaken(modeling_prismatic.OpenVLAForActionPrediction(config)).save_pretrained(folder)
    if kind == "oft":
        for name, part in parts().items():
            state = {f"module.{k}": v for k, v in shaken(part).state_dict().items()}
            torch.save(state, folder / f"{name}--100_checkpoint.pt")
        (folder / "dataset_statistics.json").write_text(json.dumps(statistics()))
    described = {"means": MEANS, "stds": STDS}
    (folder / "preprocessor_config.json").write_text(json.dumps(described))
    image = rng.integers(0, 256, (1, 224, 224, 3)).astype(np.uint8)
    ids = np.concatenate([[[1]], rng.integers(3, 31000, (1, 9))], axis=1)
    np.savez(folder / "io.npz", image=image, ids=ids, state=rng.uniform(-1, 1, STATE))


def load(kind: str, where: str, exported: str, out: str) -> None:
    """Both folders; an action of each."""
    io = dict(np.load(Path(where, "io.npz")))
    scaled = io["image"].astype(np.float32) / 255
    units = zip(np.array(MEANS, np.float32), np.array(STDS, np.float32), strict=True)
    pixels = [(scaled - mean) / deviation for mean, deviation in units]
    pixels = torch.from_numpy(np.concatenate(pixels, axis=-1).transpose(0, 3, 1, 2))
    ids = torch.from_numpy(io["ids"])
    recorded = {"pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    collected, states, loading = {}, {}, {}
    for name, folder in (("theirs", Path(where)), ("ours", Path(exported))):
        kinds = {"attn_implementation": "sdpa", "torch_dtype": torch.float32}
        model, info = modeling_prismatic.OpenVLAForActionPrediction.from_pretrained(
            folder, output_loading_info=True, **kinds
        )
        state, more = dict(model.state_dict()), {}
        if kind == "oft":
            model.vision_backbone.set_num_images_in_input(1)
            model.norm_stats = json.loads((folder / "dataset_statistics.json").read_text())
            more = {"proprio": io["state"]}
            for part, module in parts().items():
                (file,) = folder.glob(f"{part}--*_checkpoint.pt")
                stored = torch.load(file, weights_only=True)
                module.load_state_dict({k.removeprefix("module."): v for k, v in stored.items()})
                state |= {f"{part}/{k}": v for k, v in stored.items()}
                more[part] = module.eval()
        else:
            more = {"do_sample": False}
        with torch.no_grad():
            actions = model.eval().predict_action(ids, unnorm_key=SUITE, **recorded, **more)
        collected[name] = np.asarray(actions[0] if kind == "oft" else actions)
        states[name] = state
        loading[name] = {k: sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys")}
    ours, reference = states["ours"], states["theirs"]
    both = ours.keys() | reference.keys()
    differing = [k for k in both if k not in ours or not torch.equal(ours[k], reference[k])]
    report = {"differing": differing, "loading": loading["ours"], "tensors": len(ours)}
    report |= {"transformers": transformers.__version__, "timm": timm.__version__}
    np.savez(out, report=json.dumps(report), **collected)


if __name__ == "__main__":
    timm.create_model = tower
    {"make": make, "load": load}[sys.argv[1]](*sys.argv[2:])
