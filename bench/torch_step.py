"""PyTorch's side of the benches of a step; runs where torch and transformers are.

    python bench/torch_step.py --model=JSON [--compile] [--checkpoint] [--device=cuda]
    python bench/torch_step.py --model=JSON --control

The same model from Hugging Face's modules: Kosmos-2's towers, an LSTM over the window, heads as
RoboVLMs has them, Huber + 0.01 cross-entropy, AdamW. In bfloat16 the products are under autocast
and the parameters in float32, which is ours as well. With --control it answers one robot's
observations instead, and keeps the window's features from step to step, as ours does. JSON is
`bench.fixed_step.for_torch`'s.
"""

import argparse
import itertools
import json
from collections import deque
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from torch import nn  # type: ignore[import-not-found]
from transformers import (  # type: ignore[import-not-found]
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
)
from turns import Step, serve

# Image mean and deviation of CLIP, of channels.
MEAN, DEVIATION = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)


def main() -> None:
    """Serves steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=json.loads, required=True, metavar="JSON")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="on CPUs; 0: torch's default")
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--compile", action="store_true", help="torch.compile the loss")
    parser.add_argument("--checkpoint", action="store_true", help="recompute layers' activations")
    parser.add_argument("--control", action="store_true", help="control steps, no training")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    # As PyTorch recommends for what autocast leaves in float32.
    torch.set_float32_matmul_precision("high" if args.device == "cuda" else "highest")
    with torch.device(args.device):
        serve(_control(args) if args.control else _step(args), args.steps)


class Policy(nn.Module):
    """Kosmos-2 and an LSTM of the window's action tokens.

    Args:
        m: see `bench.fixed_step.for_torch`.
        checkpoint: whether layers' activations are recomputed in the backward pass.
    """

    def __init__(self, m: dict[str, Any], checkpoint: bool):
        super().__init__()
        self.m, head, width = m, m["head"], m["arch"]["text_config"]["embed_dim"]
        without_dropout = {} if m["dropout"] else {"dropout": 0.0, "attention_dropout": 0.0}
        config = Kosmos2Config(
            latent_query_num=m["arch"]["latent_query_num"],
            vision_config=m["arch"]["vision_config"],
            text_config={**m["arch"]["text_config"], **without_dropout},
        )
        make: Any = Kosmos2ForConditionalGeneration._from_config
        whole = make(config, attn_implementation="sdpa")
        if checkpoint:
            whole.gradient_checkpointing_enable({"use_reentrant": False})
        self.vlm: Any = getattr(whole, "model", whole).train()
        self.token = nn.Parameter(torch.zeros(width))
        self.rnn = nn.LSTM(width, head["hidden"], head["layers"], batch_first=True)
        self.arm = _perceptron(head["hidden"], 6 * m["chunk"])
        self.gripper = _perceptron(head["hidden"], m["chunk"])
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(3, 1, 1), persistent=False)

    def features(self, images: Any, ids: Any) -> Any:
        """Of the action token [frames, d]; images [frames, cameras, 3, h, w], ids [frames, n]."""
        frames, cameras = images.shape[:2]
        pixels = (images.flatten(0, 1).float() / 255 - self.mean) / self.deviation
        tokens = self.vlm.vision_model(pixel_values=pixels).last_hidden_state
        tokens = nn.functional.normalize(self.vlm.vision_model.model.post_layernorm(tokens), dim=-1)
        latents = self.vlm.image_to_text_projection(tokens)[0]
        latents = latents.reshape(frames, cameras * latents.shape[-2], -1)
        words = self.vlm.text_model.model.embed_tokens(ids)
        act = self.token.expand(frames, 1, -1)
        sequence = torch.cat([words[:, :1], latents, words[:, 1:-1], act, words[:, -1:]], 1)
        mask = torch.ones(sequence.shape[:2], dtype=torch.long, device=sequence.device)
        out = self.vlm.text_model.model(
            inputs_embeds=sequence, attention_mask=mask, use_cache=False
        )
        return out.last_hidden_state[:, -2]

    def actions(self, features: Any) -> tuple[Any, Any]:
        """Arm and gripper [b, w, ...] of features [b, w, d]."""
        hidden, _ = self.rnn(features)
        return torch.tanh(self.arm(hidden)).float(), self.gripper(hidden).float()

    def forward(self, images: Any, ids: Any, target: Any, closed: Any) -> Any:
        """Loss of images, ids (see `features`) and actions [b, w, ...]."""
        arm, gripper = self.actions(self.features(images, ids).view(*target.shape[:2], -1))
        loss = nn.functional.smooth_l1_loss(arm, target)
        return loss + 0.01 * nn.functional.binary_cross_entropy_with_logits(gripper, closed)


def _perceptron(width: int, out: int) -> nn.Sequential:
    sizes, layers = (width, 1024, 512, 256), []
    for i in range(3):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, out))


def _step(args: argparse.Namespace) -> Step:
    m, device = args.model, args.device
    model = Policy(m, args.checkpoint).to(device).train()
    # What does not lead to the loss (the image tower's last norm by another name) has no gradient.
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=2e-5, weight_decay=0.0, fused=device == "cuda")
    rng, frames = np.random.default_rng(0), m["windows"] * m["window"]
    size = m["arch"]["vision_config"]["image_size"]
    shape = (frames, m["cameras"], 3, size, size)
    images = torch.from_numpy(rng.integers(0, 255, shape, dtype=np.uint8)).to(device)
    ids = torch.full((frames, m["text_len"]), 5)
    actions = (m["windows"], m["window"], 6 * m["chunk"])
    target = torch.from_numpy(rng.uniform(-1, 1, actions).astype(np.float32)).to(device)
    closed = (torch.rand(m["windows"], m["window"], m["chunk"]) > 0.5).float()
    loss_of = torch.compile(model) if args.compile else model
    half = m["dtype"] == "bfloat16"

    def run() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = loss_of(images, ids, target, closed)
        loss.backward()
        if m["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(params, m["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def device_gb() -> float | None:
        return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None

    return Step(run, float, {"params": sum(p.numel() for p in params)}, device_gb)


def _control(args: argparse.Namespace) -> Step:
    m = args.model
    model = Policy(m, checkpoint=False).eval()
    rng, size = np.random.default_rng(0), m["arch"]["vision_config"]["image_size"]
    shape, ids = (8, 1, m["cameras"], 3, size, size), torch.full((1, m["text_len"]), 5)
    images = itertools.cycle(torch.from_numpy(rng.integers(0, 255, shape, dtype=np.uint8)))
    window: deque[Any] = deque(maxlen=m["window"])

    @torch.inference_mode()
    def run() -> Any:
        window.append(model.features(next(images), ids))
        arm, gripper = model.actions(torch.stack(list(window), 1))
        return torch.cat([arm[:, -1], gripper[:, -1]], -1)

    return Step(run, lambda actions: float(actions.sum()), {}, lambda: None)


if __name__ == "__main__":
    main()
