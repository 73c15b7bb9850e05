"""The model card beside every export: what the model is, what it takes and gives, how to use it.

Its head is what model hubs read: library, task and tags.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_jax.config import Config, resolve
from vla_jax.convert.store import Stored
from vla_jax.convert.tensors import parameters
from vla_jax.models import vla

FILE = "README.md"


@dataclass(frozen=True)
class Layout:
    """What one kind of export consists of, in the card's words.

    Attributes:
        files: name, as Markdown -> what it holds.
        commands: what makes a policy of it and serves that; THIS stands for the export.
        python: code for the users of the layout's own library; "" = none.
    """

    files: Mapping[str, str]
    commands: str
    python: str = ""


_SETTINGS = {
    "`vla_config.json`": "the whole configuration and the action units",
    "`dataset_statistics.json`": "statistics of the training data's actions, openvla's schema",
}
_NORM_STATS = {
    "`assets/*/norm_stats.json`": "statistics of states and chunks of actions, in openpi's form"
}
HUGGING_FACE = Layout(
    {
        "`config.json`, `model*.safetensors`, tokenizer and processor files": (
            "the VLM, for `transformers`"
        ),
        "`policy_head.safetensors`": "all else the policy has, under RoboVLMs' names",
        **_SETTINGS,
    },
    "vla convert import-hf THIS RUN",
    """from transformers import AutoModelForImageTextToText

vlm = AutoModelForImageTextToText.from_pretrained("THIS")""",
)
CHECKPOINT = Layout(
    {
        "`checkpoints/`": "weights, configuration, statistics, action units and tokenizer",
        **_SETTINGS,
    },
    "cp -r THIS RUN",
)
OPENPI = Layout(
    {"`params/`": "the parameters, as openpi's trainer writes them", **_NORM_STATS},
    "vla convert import-openpi THIS RUN --config=CONFIG",
)
OPENPI_TORCH = Layout(
    {"`model.safetensors`": "the parameters, as openpi's torch port writes them", **_NORM_STATS},
    "vla convert import-openpi THIS RUN --config=CONFIG",
)
_LEROBOT = {
    "`config.json`, `model.safetensors`": "the policy, for LeRobot's `from_pretrained`",
    "`policy_*processor*`": "its processors, with the statistics, where it has such units",
}
LEROBOT = Layout(_LEROBOT, "vla convert import-lerobot THIS RUN --config=smolvla")
LEROBOT_PI = Layout(_LEROBOT, "vla convert import-openpi THIS RUN --config=CONFIG")
OPENVLA = Layout(
    {
        "`config.json`, `model*.safetensors`, tokenizer and processor files": "the VLM",
        "`action_head--*.pt`, `proprio_projector--*.pt`, `vision_backbone--*.pt`": (
            "what OpenVLA-OFT has beside it, as far as the policy does"
        ),
        "`dataset_statistics.json`": "statistics by which actions and states are scaled",
    },
    "vla convert import-openvla THIS RUN --config=openvla_oft_libero",
)
ROBOVLMS = Layout(
    {"`THIS`": "the parameters, under RoboVLMs' names"},
    "vla convert import-robovlms THIS CONFIG.json RUN",
)


def write(path: Path, stored: Stored, layout: Layout, name: str = "THIS_FOLDER") -> None:
    """Write the card of a checkpoint that was exported in a layout.

    Args:
        path: the file.
        stored: the checkpoint.
        layout: of the export.
        name: of the export, in the commands.
    """
    config = resolve(stored.meta["config"])
    # Counted over what is stored, so that factors of LoRA are counted too.
    count = parameters({path: leaf.shape for path, leaf in stored.leaves.items()})
    text = render(config, stored.meta, stored.step, count, vla.build(config.model), layout)
    # A plain word stands for the name: braces would have to be doubled in the samples of code.
    path.write_text(text.replace("THIS", name), encoding="utf-8")


def render(
    config: Config,
    meta: Mapping[str, Any],
    step: int,
    parameters: int,
    model: vla.VLA,
    layout: Layout,
) -> str:
    """The card, with THIS for the name of the export."""
    m, s = config.model, config.model.structure
    title = f"{m.backbone.name} / {s.kind} / {m.head.kind}"
    tags = ("robotics", "vla", "vision-language-action", m.backbone.name, s.kind)
    rows = {
        "backbone": m.backbone.name,
        "structure": s.kind,
        "head": m.head.kind,
        "parameters": f"{parameters:,}",
        # Step 0 is what an import writes.
        "trained for": f"{step} steps" if step else "no step here: imported weights",
        "cameras": ", ".join(s.cameras),
        "history": f"{s.window} steps",
        "actions": f"chunks of {s.chunk}, {m.action_dim} dimensions"
        + ", gripper last" * m.has_gripper,
        "image size": " x ".join(map(str, model.image.shape)),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    files = "\n".join(f"| {key} | {value} |" for key, value in layout.files.items())
    python = f"\nThe fine-tuned VLM alone:\n\n```python\n{layout.python}\n```\n"
    return f"""---
library_name: vla_jax
pipeline_tag: robotics
tags: [{", ".join(tags)}]
---

# {title}

A vision-language-action policy, written by vla_jax.

| | |
|---|---|
{table}

Action units:

| dataset | scaling | clip | Hz | gripper closed / open |
|---|---|---|---|---|
{_units(meta["action_specs"])}

| file | what |
|---|---|
{files}

As a policy:

```bash
{layout.commands}
vla serve --checkpoint=RUN
```
{python if layout.python else ""}"""


def _units(specs: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, spec in specs.items():
        gripper = spec["gripper_env"]
        ends = " / ".join(f"{x:g}" for x in gripper) if gripper else "none"
        lines.append(
            f"| {name} | {spec['normalization']} | {spec['clip']} | {spec['hz']} | {ends} |"
        )
    return "\n".join(lines) or "| none: the head is untrained | | | | |"
