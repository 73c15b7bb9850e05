"""Run by a Python that has LeRobot: a small SmolVLA of its own class, and what we export of it.

    python lerobot_side.py make FOLDER                  writes FOLDER/vlm, FOLDER/policy, io.npz
    python lerobot_side.py load FOLDER EXPORTED OUT     reads both policies, writes OUT

The VLM is named by a folder of sizes and words alone, so nothing is downloaded.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lerobot  # type: ignore[import-not-found]
import numpy as np
import torch  # type: ignore[import-not-found]
from lerobot.configs import FeatureType, PolicyFeature  # type: ignore[import-not-found]
from lerobot.policies.factory import (  # type: ignore[import-not-found]
    get_policy_class,
    make_pre_post_processors,
)
from lerobot.policies.smolvla.configuration_smolvla import (  # type: ignore[import-not-found]
    SmolVLAConfig,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (  # type: ignore[import-not-found]
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

MARKS = ["<|im_start|>", "<|im_end|>", "<pad>", "<image>", "<fake_token_around_image>"]
MARKS += ["<global-img>", "<end_of_utterance>"]
TEXT: dict[str, Any] = {"vocab_size": 280, "hidden_size": 48, "intermediate_size": 80}
TEXT |= {"num_hidden_layers": 6, "num_attention_heads": 3, "num_key_value_heads": 1}
TEXT |= {"head_dim": 16, "model_type": "llama"}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"intermediate_size": 64, "patch_size": 8, "image_size": 64}
CAMERAS = ("observation.images.top", "observation.images.wrist")
DIM, CHUNK = 6, 8
TASKS = ["put the red block into the drawer", "close it"]


def words() -> PreTrainedTokenizerFast:
    """One token a byte, and SmolVLM's marks."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=MARKS[0],
        eos_token=MARKS[1],
        pad_token=MARKS[2],
        extra_special_tokens=MARKS[6:],
        image_token=MARKS[3],
        fake_image_token=MARKS[4],
        global_image_token=MARKS[5],
    )


def vlm(folder: Path) -> None:
    """A folder that stands for the VLM on the hub."""
    tokenizer = words()
    image: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 64}}
    SmolVLMProcessor(
        SmolVLMImageProcessor(**image), tokenizer, SmolVLMVideoProcessor(), image_seq_len=16
    ).save_pretrained(folder)
    kind: Any = SmolVLMConfig
    kind(
        text_config=TEXT,
        vision_config=VISION,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)


def config(folder: Path) -> SmolVLAConfig:
    observed = {c: PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for c in CAMERAS}
    observed["observation.state"] = PolicyFeature(FeatureType.STATE, (DIM,))
    return SmolVLAConfig(
        input_features=observed,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (DIM,))},
        vlm_model_name=str(folder / "vlm"),
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        num_vlm_layers=4,
        resize_imgs_with_padding=(64, 64),
        device="cpu",
        push_to_hub=False,
    )


def make(where: str) -> None:
    """Random parameters, none of them zero, statistics of a dataset, and two observations."""
    folder = Path(where)
    vlm(folder / "vlm")
    torch.manual_seed(0)
    policy = get_policy_class("smolvla")(config(folder)).float()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    stats = {
        key: {"mean": rng.normal(size=DIM), "std": rng.uniform(0.5, 2, DIM)}
        for key in ("observation.state", "action")
    }
    policy.save_pretrained(folder / "policy")
    for half in make_pre_post_processors(policy.config, dataset_stats=stats):
        half.save_pretrained(folder / "policy")
    listed = {k: {n: x.tolist() for n, x in v.items()} for k, v in stats.items()}
    (folder / "stats.json").write_text(json.dumps(listed))
    io: dict[str, Any] = {c: rng.integers(0, 256, (2, 3, 48, 64)).astype(np.uint8) for c in CAMERAS}
    io["observation.state"] = rng.normal(size=(2, DIM)).astype(np.float32)
    io["noise"] = rng.normal(size=(2, CHUNK, 32)).astype(np.float32)
    np.savez(folder / "io.npz", tasks=TASKS, **io)


def load(where: str, exported: str, out: str) -> None:
    """Both folders as LeRobot's own commands read them."""
    io = dict(np.load(Path(where, "io.npz")))
    collected, tensors = {}, {}
    for name, folder in (("theirs", Path(where, "policy")), ("ours", Path(exported))):
        policy = get_policy_class("smolvla").from_pretrained(folder, strict=True)
        before, behind = make_pre_post_processors(policy.config, pretrained_path=str(folder))
        batch: Any = {k: torch.from_numpy(io[k]) for k in io if k.startswith("observation")}
        batch = {k: v.float() / 255 if v.dtype == torch.uint8 else v for k, v in batch.items()}
        batch = before({**batch, "task": io["tasks"].tolist()})
        chunk = policy.predict_action_chunk(batch, noise=torch.from_numpy(io["noise"]))
        collected[f"{name}/ids"] = batch["observation.language.tokens"].numpy()
        collected[f"{name}/actions"] = behind(chunk).numpy()
        tensors[name] = policy.state_dict()
        configs = {k: str(v) for k, v in vars(policy.config).items()}
        tensors[name + "/config"] = configs
    differing = [k for k, v in tensors["theirs"].items() if not torch.equal(v, tensors["ours"][k])]
    pairs = tensors["theirs/config"], tensors["ours/config"]
    settings = {k: [c.get(k) for c in pairs] for k in pairs[0] if pairs[0][k] != pairs[1].get(k)}
    report = {"differing": differing, "settings": settings, "lerobot": lerobot.__version__}
    report |= {"tensors": len(tensors["ours"]), "torch": torch.__version__}
    np.savez(out, report=json.dumps(report), **collected)


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](*sys.argv[2:])
