"""Run by a Python that has LeRobot: a small pi0 or pi0.5 of its own class, and our export of it.

    python lerobot_pi_side.py make KIND FOLDER                  writes FOLDER/words, /policy, io.npz
    python lerobot_pi_side.py load KIND FOLDER EXPORTED OUT     reads both policies, writes OUT

KIND is pi0 or pi05. LeRobot has the sizes of both Gemmas, of the tower and of the vocabulary in its
code, so that smaller ones take their place there; the words are of a folder, and nothing is
downloaded.
"""

import importlib
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
    make_policy_config,
    make_pre_post_processors,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # type: ignore[import-not-found]

# Width, depth, MLP, heads, key heads, numbers a head.
GEMMAS = {"gemma_2b": (64, 2, 96, 4, 1, 16), "gemma_300m": (32, 2, 48, 4, 1, 16)}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"intermediate_size": 48, "projection_dim": 64}
VOCAB, SIDE, DIM, CHUNK, WIDTH = 264, 56, 7, 6, 8
CAMERAS = ("observation.images.top", "observation.images.wrist")
TASKS = ["put the red_block into the drawer", "close it"]
TEXT = {"pi0": 48, "pi05": 120}


def words() -> PreTrainedTokenizerFast:
    """One token a byte; every text begins with <bos>, as PaliGemma's do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", *letters])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def shrink(kind: str, folder: Path) -> None:
    """Small sizes where LeRobot's code names large ones, and the folder's words for PaliGemma's."""
    code: Any = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    code.get_gemma_config = lambda variant: code.GemmaConfig(*GEMMAS[variant])
    vlm, expert = code.PaliGemmaForConditionalGenerationWithPiGemma, code.PiGemmaForCausalLM

    def small_vlm(config: Any) -> Any:
        config.text_config.vocab_size = config.image_token_index = VOCAB
        for name, value in VISION.items():
            setattr(config.vision_config, name, value)
        return vlm(config=config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = VOCAB
        return expert(config=config)

    code.PaliGemmaForConditionalGenerationWithPiGemma = small_vlm
    code.PiGemmaForCausalLM = small_expert
    tokenizers: Any = AutoTokenizer
    original = tokenizers.from_pretrained
    tokenizers.from_pretrained = lambda name, **rest: original(str(folder / "words"), **rest)


def config(kind: str) -> Any:
    seen = {c: PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for c in CAMERAS}
    seen["observation.state"] = PolicyFeature(FeatureType.STATE, (DIM,))
    return make_policy_config(
        kind,
        input_features=seen,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (DIM,))},
        chunk_size=CHUNK,
        n_action_steps=CHUNK,
        max_state_dim=WIDTH,
        max_action_dim=WIDTH,
        image_resolution=(SIDE, SIDE),
        tokenizer_max_length=TEXT[kind],
        # Arms' joints from where they are, the gripper as it is commanded.
        use_relative_actions=True,
        action_feature_names=[*(f"joint_{i}" for i in range(DIM - 1)), "gripper"],
        device="cpu",
        push_to_hub=False,
    )


def make(kind: str, where: str) -> None:
    """Random parameters, none of them zero, statistics of a dataset, and two observations."""
    folder = Path(where)
    words().save_pretrained(folder / "words")
    shrink(kind, folder)
    torch.manual_seed(0)
    policy = get_policy_class(kind)(config(kind)).float()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rng = np.random.default_rng(0)
    low = {key: rng.normal(size=DIM) for key in ("observation.state", "action")}
    stats = {
        key: {
            "mean": start, "std": rng.uniform(0.5, 2, DIM),
            "q01": start - 2, "q99": start + rng.uniform(1, 3, DIM),
        }
        for key, start in low.items()
    }  # fmt: skip
    policy.save_pretrained(folder / "policy")
    for half in make_pre_post_processors(policy.config, dataset_stats=stats):
        half.save_pretrained(folder / "policy")
    io: dict[str, Any] = {
        c: rng.integers(0, 256, (2, 3, SIDE, SIDE)).astype(np.uint8) for c in CAMERAS
    }
    io["observation.state"] = rng.normal(size=(2, DIM)).astype(np.float32)
    io["noise"] = rng.normal(size=(2, CHUNK, WIDTH)).astype(np.float32)
    np.savez(folder / "io.npz", tasks=TASKS, **io)


def load(kind: str, where: str, exported: str, out: str) -> None:
    """Both folders as LeRobot's own commands read them."""
    shrink(kind, Path(where))
    io = dict(np.load(Path(where, "io.npz")))
    outputs, tensors = {}, {}
    for name, folder in (("theirs", Path(where, "policy")), ("ours", Path(exported))):
        policy = get_policy_class(kind).from_pretrained(folder, strict=True).eval()
        before, behind = make_pre_post_processors(policy.config, pretrained_path=str(folder))
        batch: Any = {k: torch.from_numpy(io[k]) for k in io if k.startswith("observation")}
        batch = {k: v.float() / 255 if v.dtype == torch.uint8 else v for k, v in batch.items()}
        batch = before({**batch, "task": io["tasks"].tolist()})
        chunk = policy.predict_action_chunk(batch, noise=torch.from_numpy(io["noise"]))
        outputs[f"{name}/ids"] = batch["observation.language.tokens"].numpy()
        outputs[f"{name}/actions"] = behind(chunk).numpy()
        tensors[name] = policy.state_dict()
        tensors[name + "/config"] = {k: str(v) for k, v in vars(policy.config).items()}
    # No head is used; both are in the files.
    used = {k: v for k, v in tensors["theirs"].items() if "lm_head" not in k}
    differing = [k for k, v in used.items() if not torch.equal(v, tensors["ours"][k])]
    pairs = tensors["theirs/config"], tensors["ours/config"]
    settings = {k: [c.get(k) for c in pairs] for k in pairs[0] if pairs[0][k] != pairs[1].get(k)}
    report = {"differing": differing, "settings": settings, "lerobot": lerobot.__version__}
    np.savez(out, report=json.dumps({**report, "tensors": len(used)}), **outputs)


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](*sys.argv[2:])
