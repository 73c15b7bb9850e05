"""Every key of RoboVLMs' JSON configs, and what becomes of it here.

Source: the released code's own reading of them (main.py, train/base_trainer.py,
model/backbone/base_backbone.py, data/) and the eleven shipped files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OURS, IGNORED, ELSEWHERE, REFUSED = "ours", "ignored by the original", "not needed", "refused"


@dataclass(frozen=True)
class Key:
    """One row.

    Attributes:
        path: dotted; datasets of a list count as one.
        fate: OURS: `note` names our key. IGNORED: the original never uses it, nor do we; said
            once. ELSEWHERE: `note` says what does its work here. REFUSED: values other than
            `fine` cannot be done, `note` says why.
        note: see `fate`.
        fine: values that ask for nothing.
    """

    path: str
    fate: str
    note: str
    fine: tuple[Any, ...] = (None, False)


def _ours(path: str, note: str) -> Key:
    return Key(path, OURS, note)


def _ignored(note: str, *paths: str) -> list[Key]:
    return [Key(path, IGNORED, note) for path in paths]


def _elsewhere(note: str, *paths: str) -> list[Key]:
    return [Key(path, ELSEWHERE, note) for path in paths]


def _refused(path: str, note: str, *fine: Any) -> Key:
    # None and False are how the originals leave a thing out.
    return Key(path, REFUSED, note, (None, False, *fine))


_TRAIN = ("train_dataset.", "val_dataset.")

KEYS: tuple[Key, ...] = (
    # Model.
    _ours("robovlm_name", "model.backbone.name"),
    _ours("vlm.pretrained_model_name_or_path", "model.backbone.hf_dir"),
    _ours("vlm.name", "model.backbone.arch (Flamingo's language model)"),
    _ours("image_size", "model.backbone.arch (the size of the backbone's own images)"),
    _ours("window_size", "model.structure.window"),
    _ours("fwd_pred_next_n", "model.structure.chunk"),
    _ours("use_hand_rgb", "model.structure.cameras"),
    _ours("use_vision_resampler", "model.structure.resampler"),
    _ours("act_head.type", "model.head.kind"),
    _ours("act_head.hidden_size", "model.head.hidden"),
    _ours("act_head.num_layers", "model.head.layers"),
    _ours("act_head.action_dim", "model.action_dim"),
    _ours("act_head.down_sample", "model.head.down_sample"),
    _ours("act_head.latent", "model.structure.latent"),
    _ours("act_head.action_space", "model.structure.kind, model.structure.readout"),
    _ours("act_head.token_source", "model.structure.readout"),
    _ours("act_head.history_type", "model.structure.kind"),
    _ours("act_head.n_bin", "model.head.bins"),
    _ours("act_head.min_action", "model.head.low"),
    _ours("act_head.max_action", "model.head.high"),
    _refused("act_head.fill_zero", "image tokens that nothing attends to"),
    _refused("act_head.policy_rnn_dropout_p", "the LSTM has no dropout here", 0, 0.0),
    *_ignored(
        "overwritten by the keys of the same name at the top",
        "act_head.window_size", "act_head.fwd_pred_next_n",
    ),
    *_ignored("stored, read by nothing", "act_head.with_history", "act_encoder"),
    _refused("fwd_head", "no code for predicting images was released"),
    _ours("use_clip_norm", "model.sentence (name its CLIP with model.sentence.dir)"),
    _ours("clip_norm_ratio", "model.sentence.weight"),
    # What trains.
    _ours("train_setup.freeze_backbone", "optim.frozen, optim.trained"),
    _ours("train_setup.train_vision", "optim.frozen, optim.trained"),
    _ours("train_setup.train_text_embedding", "optim.frozen, optim.trained"),
    _ours("train_setup.train_decoder_layers", "optim.frozen, optim.trained"),
    _ours("train_setup.train_full_decoder", "optim.trained (Flamingo)"),
    _ours("train_setup.train_resampler", "optim.trained (Flamingo)"),
    _ours("train_setup.freeze_resampler", "optim.frozen"),
    _ours("train_setup.lora_enable", "lora.rank, optim.frozen"),
    _ours("train_setup.lora_r", "lora.rank"),
    _ours("train_setup.lora_alpha", "lora.alpha"),
    _ours("train_setup.lora_dropout", "lora.dropout"),
    _refused("train_setup.lora_bias", "LoRA trains no biases here", "none"),
    _refused("train_setup.predict_action", "a run without the action loss", True),
    _refused("train_setup.reinit", "set model.backbone.hf_dir to '' for a random start"),
    *_ignored(
        "weights a loss that nothing computes",
        "train_setup.predict_forward", "train_setup.predict_forward_hand",
        "train_setup.predict_caption", "cap_loss_ratio", "fwd_loss_ratio", "kl_div_ratio",
    ),
    *_ignored(
        "read by nothing",
        "train_setup.bits", "train_setup.freeze_mm_mlp_adapter",
        "train_setup.tune_mm_mlp_adapter", "train_setup.mm_use_im_start_end",
        "train_setup.mm_use_im_patch_token", "train_setup.mm_projector_lr",
        "train_setup.gradient_checkpointing", "image_mean", "image_std", "data_scale", "optimizer",
        "warmup_ratio", "use_obs_queries", "use_act_queries", "use_pixel_loss", "use_mim_obs_loss",
        "use_time_causal_attn", "use_tube_mask", "vision_masked_ratio", "use_state", "finetune",
        "use_multi_modal_emb", "no_video_pretrained_model", "discrete_action_history",
        "model_config", "llava", "llava_config", "qwen", "qwen_config", "seq_len", "llm",
        "tokenizer.max_text_len", "tokenizer.image_start_token", "tokenizer.image_end_token",
        "tokenizer.action_start_token", "tokenizer.action_end_token",
        "tokenizer.bbox_start_token", "tokenizer.bbox_end_token", "tokenizer.use_img_start_end",
        "tokenizer.use_act_start_end", "tokenizer.use_bbox_start_end",
    ),
    *_ignored("overwritten by trainer.precision", "train_setup.precision"),
    *_ignored("the resampler is made with its defaults whatever this says", "vision_resampler"),
    *_ignored("overwritten by gradient_clip_val at the top, or 0", "trainer.gradient_clip_val"),
    # Optimisation.
    _ours("learning_rate", "optim.learning_rate"),
    _ours("min_lr_scale", "optim.min_scale"),
    _ours("weight_decay", "optim.weight_decay"),
    _ours("scheduler", "optim.schedule"),
    _ours("warmup_epochs", "optim.warmup_epochs or optim.warmup_steps"),
    _ours("warmup_steps", "optim.warmup_steps"),
    _ours("gradient_clip_val", "optim.clip_norm"),
    _ours("arm_gripper_loss_ratio", "optim.gripper_weight"),
    _ours("vl_cotrain_ratio", "optim.caption_weight"),
    _ours("seed", "seed"),
    _ours("batch_size", "train.batch_size (x gpus x num_nodes x accumulate_grad_batches)"),
    _ours("gpus", "train.batch_size"),
    _ours("num_nodes", "train.batch_size"),
    _ours("trainer.accumulate_grad_batches", "train.accumulate, train.batch_size"),
    _ours("trainer.max_epochs", "train.epochs"),
    _ours("trainer.max_steps", "train.steps"),
    _ours("trainer.val_check_interval", "train.eval_every, train.save_every"),
    _ours("trainer.check_val_every_n_epoch", "train.check_epochs"),
    _ours("trainer.limit_val_batches", "train.eval_batches"),
    _ours("trainer.log_every_n_steps", "train.log_every"),
    _ours("trainer.logger", "train.tensorboard"),
    _ours("trainer.precision", "model.dtype"),
    *_elsewhere("mesh", "trainer.strategy", "trainer.accelerator"),
    *_elsewhere("every process has its share of the rows", "trainer.use_distributed_sampler"),
    # Data.
    _ours("norm_action", "data.clip"),
    _ours("norm_min", "data.clip"),
    _ours("norm_max", "data.clip"),
    _ours("train_dataset.type", "data.datasets, data.normalization"),
    _ours("train_dataset.data_dir", "data.datasets"),
    _ours("train_dataset.data_root_dir", "data.datasets"),
    _ours("train_dataset.data_mix", "data.datasets"),
    _ours("train_dataset.data_paths", "data.cotrain.path"),
    _ours("train_dataset.image_folder", "data.cotrain.images"),
    _ours("train_dataset.rgb_pad", "augment.shift"),
    _ours("train_dataset.gripper_pad", "augment.shift"),
    _ours("train_dataset.image_aug", "augment"),
    _ours("train_weights", "data.cotrain.rows"),
    _refused("regular_action", "standardizing after normalization; data.normalization = 'normal'"),
    *_ignored("used with regular_action only", "x_mean", "x_std"),
    _refused("use_mu_law", "the mu-law of actions"),
    *_ignored("used with use_mu_law only", "mu_val"),
    _refused("tcp_rel", "the frame of the tool, which the original applies to normalized actions"),
    _ours("train_dataset.organize_type", "data.parity.windows, left_pad, padded_rows"),
    *(_refused(f"{p}discrete", "model.structure.kind decides", True) for p in _TRAIN),
    *_elsewhere(
        "held out: data.val_split, data.val_fraction of the training data",
        "val_dataset.type", "val_dataset.data_dir", "val_dataset.data_root_dir",
        "val_dataset.data_mix", "val_dataset.organize_type",
    ),
    *_elsewhere(
        "the order is a permutation of all windows, no buffer",
        *(f"{p}{k}" for p in _TRAIN for k in ("shuffle", "shuffle_buffer_size")),
    ),
    *_elsewhere("only training data is augmented", "val_dataset.image_aug"),
    *_ignored("offsets are drawn for every frame either way", *(f"{p}traj_cons" for p in _TRAIN)),
    *_ignored("forced by organize_type", *(f"{p}window_sample" for p in _TRAIN)),
    *_ignored("overwritten by `model`", *(f"{p}model_name" for p in _TRAIN)),
    *_ignored(
        "swallowed",
        *(f"{p}{k}" for p in _TRAIN for k in ("shift_first", "tokenizer_type", "train", "mode")),
    ),
    *_elsewhere("data.threads", "num_workers"),
    # The process.
    *_elsewhere("robovlm_name", "model", "vlm.type"),
    *_elsewhere("model.backbone.hf_dir", "model_url", "model_path"),
    *_elsewhere(
        "the tokenizer of model.backbone.hf_dir",
        "tokenizer.type", "tokenizer.pretrained_model_name_or_path", "tokenizer.tokenizer_type",
        "tokenizer.additional_special_tokens", "tokenizer.use_local_files",
    ),
    *_elsewhere(
        "the converted weights", "vision_encoder.clip_vision_encoder_path",
        "vision_encoder.clip_vision_encoder_pretrained", "train_setup.load_vl_param",
    ),
    _refused("vlm.residual", "Flamingo's residual variant"),
    *_elsewhere(
        "--workdir", "task_name", "output_root", "log_root", "cache_root", "output_dir", "log_dir",
        "exp_name", "raw_config_path", "config",
    ),
    *_elsewhere("a policy's action scale", "action_scale"),
    _refused("model_load_path", "import the checkpoint with launch/convert.py"),
    *_elsewhere("used with model_load_path only", "model_load_source"),
    _refused("resume", "the same --workdir goes on by itself"),
    *_elsewhere("merged before", "parent"),
)  # fmt: skip


def table() -> str:
    """All rows as a Markdown table."""
    lines = ["| key | here | |", "|---|---|---|"]
    for key in KEYS:
        fine = [repr(x) for x in key.fine if x not in (None, False)]
        but = f" (accepted: {', '.join(fine)})" if key.fate == REFUSED and fine else ""
        lines.append(f"| `{key.path}` | {key.fate} | {key.note}{but} |")
    return "\n".join(lines)


def notes(original: Mapping[str, Any]) -> list[str]:
    """The keys a config sets and the original never uses, each with the reason."""
    rows = {key.path: key for key in KEYS}
    remarks = []
    for path, value in _paths(original).items():
        row = rows.get(path)
        if row is None:
            remarks.append(f"{path}: read by nothing")
        # None is how their configs leave a key unset.
        elif row.fate == IGNORED and value is not None:
            remarks.append(f"{path}: {row.note}")
    return remarks


def refusals(original: Mapping[str, Any]) -> list[str]:
    """The keys that ask for what cannot be done, each with the reason."""
    rows = {key.path: key for key in KEYS if key.fate == REFUSED}
    problems = [
        f"{path}: {value!r} cannot be done: {rows[path].note}"
        for path, value in _paths(original).items()
        if path in rows and value not in rows[path].fine
    ]
    if original.get("train_setup", {}).get("predict_action") is False:
        problems.append("train_setup.predict_action: False cannot be done: nothing would be learnt")
    return problems


def _paths(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value; items of a list of groups share their list's path."""
    key_paths = {key.path for key in KEYS}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        path = prefix + key
        # `train_dataset` is one group or a list of them.
        groups = value if isinstance(value, list) else [value]
        # A key that has a row of its own counts as a whole, whatever stands in it.
        if path not in key_paths and groups and all(isinstance(x, Mapping) for x in groups):
            for group in groups:
                values |= _paths(group, path + ".")
        else:
            values[path] = value
    return values
