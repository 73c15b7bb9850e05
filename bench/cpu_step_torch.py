"""PyTorch's side of `bench/cpu_step.py`; runs in an environment with torch and transformers.

The same model from Hugging Face's modules: Kosmos-2's towers, an LSTM over the window, heads as
RoboVLMs has them, Huber + 0.01 cross-entropy, clipped gradients, AdamW.
"""

import argparse
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
from cpu_step import VISION, serve
from torch import nn  # type: ignore[import-not-found]
from transformers import (  # type: ignore[import-not-found]
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
)

LATENTS, HIDDEN, CHUNK = 64, 1024, 10


def main() -> None:
    """Serves train steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--window", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    serve(_step(args.batch, args.window))


class Head(nn.Module):
    """LSTM of four layers and two perceptrons."""

    def __init__(self, width: int):
        """Takes features of `width`."""
        super().__init__()
        self.rnn = nn.LSTM(width, HIDDEN, 4, batch_first=True)
        self.arm, self.gripper = _perceptron(6 * CHUNK), _perceptron(CHUNK)

    def forward(self, features: Any) -> tuple[Any, Any]:
        """Of features [b, w, d]: arm [b, w, 60], logits of the gripper [b, w, 10]."""
        hidden, _ = self.rnn(features)
        return torch.tanh(self.arm(hidden)), self.gripper(hidden)


def _perceptron(width: int) -> nn.Sequential:
    sizes, layers = (HIDDEN, 1024, 512, 256), []
    for i in range(3):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, width))


def _step(b: int, w: int) -> Any:
    v = VISION
    vision = {"hidden_size": v["width"], "num_hidden_layers": v["layers"], "patch_size": 14}
    vision |= {"num_attention_heads": v["heads"], "intermediate_size": v["mlp"], "image_size": 224}
    text = {"vocab_size": 65037, "embed_dim": v["width"], "layers": v["layers"], "dropout": 0.0}
    text |= {"attention_heads": v["heads"], "ffn_dim": v["mlp"], "attention_dropout": 0.0}
    config = Kosmos2Config(
        latent_query_num=LATENTS,
        vision_config={**vision, "hidden_act": "quick_gelu"},
        text_config=text,
    )
    model = Kosmos2ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    vlm: Any = getattr(model, "model", model)
    head, token = Head(v["width"]), nn.Parameter(torch.zeros(v["width"]))
    params = [*model.parameters(), *head.parameters(), token]
    optimizer = torch.optim.AdamW(params, lr=2e-5, weight_decay=0.0)
    mean = torch.tensor([0.481, 0.458, 0.408]).view(3, 1, 1)
    deviation = torch.tensor([0.269, 0.261, 0.276]).view(3, 1, 1)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 255, (b * w, 2, 3, 224, 224), dtype=np.uint8))
    ids = torch.full((b * w, 32), 5)
    target = torch.from_numpy(rng.uniform(-1, 1, (b, w, 6 * CHUNK)).astype(np.float32))
    closed = (torch.rand(b, w, CHUNK) > 0.5).float()

    def features() -> Any:
        pixels = (images.flatten(0, 1).float() / 255 - mean) / deviation
        tokens = vlm.vision_model(pixel_values=pixels).last_hidden_state
        tokens = nn.functional.normalize(vlm.vision_model.model.post_layernorm(tokens), dim=-1)
        latents = vlm.image_to_text_projection(tokens)[0].view(b * w, 2 * LATENTS, -1)
        words = vlm.text_model.model.embed_tokens(ids)
        act = token.expand(b * w, 1, -1)
        sequence = torch.cat([words[:, :1], latents, words[:, 1:-1], act, words[:, -1:]], 1)
        mask = torch.ones(sequence.shape[:2], dtype=torch.long)
        out = vlm.text_model.model(inputs_embeds=sequence, attention_mask=mask, use_cache=False)
        return out.last_hidden_state[:, -2].view(b, w, -1)

    def step() -> float:
        arm, gripper = head(features())
        loss = nn.functional.smooth_l1_loss(arm, target)
        loss = loss + 0.01 * nn.functional.binary_cross_entropy_with_logits(gripper, closed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


if __name__ == "__main__":
    main()
