"""The eleven configs RoboVLMs ships, rebuilt from what distinguishes them."""

import copy
from typing import Any

# name, class, tag, window, image size, hand camera, batch a GPU, accumulation, precision, rate
_ROWS: tuple[tuple[str, str, str, int, int, bool, int, int, str, float], ...] = (
    ("flamingo_calvin", "RoboFlamingo", "flamingo", 8, 224, False, 4, 0, "16-mixed", 1e-4),
    ("kosmos_hand_calvin", "RoboKosMos", "kosmos", 16, 224, True, 4, 1, "16", 2e-5),
    ("kosmos_calvin", "RoboKosMos", "kosmos", 8, 224, False, 41, 1, "16", 2e-5),
    ("llava_calvin", "RoboLLaVA", "llava", 8, 224, False, 1, 4, "bf16", 2e-5),
    ("moondream_calvin", "RoboMoonDream", "moondream", 8, 224, False, 4, 1, "bf16", 2e-5),
    ("paligemma_calvin", "RoboPaligemma", "paligemma", 8, 224, False, 4, 1, "16", 2e-5),
    ("qwen_calvin", "RoboQwen", "qwen", 8, 448, False, 1, 4, "bf16", 2e-5),
    ("uform_calvin", "RoboUform", "uform", 8, 224, False, 4, 1, "bf16", 2e-5),
    ("kosmos_bridge", "RoboKosMos", "kosmos", 16, 224, True, 4, 1, "16", 2e-5),
    ("kosmos_oxe", "RoboKosMos", "kosmos", 16, 224, True, 4, 1, "16", 2e-5),
    ("kosmos_rt", "RoboKosMos", "kosmos", 16, 224, True, 4, 1, "16", 2e-5),
)
NAMES = tuple(row[0] for row in _ROWS)
_MIXES = {
    "kosmos_bridge": ("bridge", "bridge"),
    "kosmos_oxe": ("oxe_magic_soup", "rt_1"),
    "kosmos_rt": ("rt_1", "rt_1"),
}
# What a file has that the others do not.
_CHANGES: dict[str, dict[str, Any]] = {
    "flamingo_calvin": {
        "weight_decay": 0.1, "warmup_epochs": 0, "gradient_clip_val": 1.0,
        "train_setup": {
            "predict_action": True, "predict_forward": False, "predict_forward_hand": False,
            "predict_caption": False, "train_vision": False, "train_decoder_layers": -1,
            "train_full_decoder": False, "train_resampler": True, "train_text_embedding": True,
            "load_vl_param": False,
        },
        "act_head": {"action_space": "down_sample", "down_sample": "pooling"},
        "tokenizer": {"additional_special_tokens": ["<|endofchunk|>", "<image>"]},
        "vlm": {"name": "mpt_1b_ift", "residual": False},
        "vision_encoder": {
            "clip_vision_encoder_path": "ViT-L-14", "clip_vision_encoder_pretrained": "openai"
        },
        "trainer": {"limit_val_batches": 100, "log_every_n_steps": 100},
    },
    "llava_calvin": {
        "cap_loss_ratio": 1, "vl_cotrain_ratio": 1, "model_load_source": "deepspeed",
        "llava": "llava-mpt-7b", "llava_config": ".vlms/llava/config.json",
        "train_setup": {"train_text_embedding": False, "tune_mm_mlp_adapter": True},
        "tokenizer": {"max_text_len": 64, "additional_special_tokens": []},
        "trainer": {"limit_val_batches": 100, "log_every_n_steps": 100},
    },
    "moondream_calvin": {
        "use_vision_resampler": True, "trainer": {"strategy": "deepspeed_stage_3"}
    },
    "qwen_calvin": {
        "qwen": ".vlms/Qwen-VL", "train_setup": {"train_vision": False},
        "tokenizer": {
            "max_text_len": 64, "use_img_start_end": False, "image_start_token": "<im_start>"
        },
        "trainer": {"log_every_n_steps": 100},
    },
    "uform_calvin": {
        "act_head": {"action_space": "down_sample", "down_sample": "pooling",
                     "token_source": "all"},
        "trainer": {"check_val_every_n_epoch": None, "val_check_interval": 10000},
    },
    "kosmos_rt": {"warmup_epochs": 0, "warmup_steps": 5000},
}  # fmt: skip


def shipped(name: str) -> dict[str, Any]:
    """One of the eleven."""
    _, kind, tag, window, size, hand, batch, accumulate, precision, rate = next(
        row for row in _ROWS if row[0] == name
    )
    config: dict[str, Any] = {
        "robovlm_name": kind, "parent": None, "task_name": "calvin_finetune", "model": tag,
        "model_url": f"https://huggingface.co/{tag}", "image_size": size, "window_size": window,
        "fwd_pred_next_n": 10, "batch_size": batch, "optimizer": "adam", "learning_rate": rate,
        "weight_decay": 0, "min_lr_scale": 0.01, "warmup_epochs": 0.25, "warmup_steps": 0,
        "warmup_ratio": None, "use_hand_rgb": hand, "use_vision_resampler": False,
        "vision_resampler": {"vis_dim": 1024, "depth": 8, "dim_head": 64, "heads": 8,
                             "num_latents": 64},
        "use_time_causal_attn": False, "use_mim_obs_loss": False, "use_pixel_loss": True,
        "use_obs_queries": True, "vision_masked_ratio": 0.9, "use_tube_mask": False,
        "image_mean": [0.481, 0.458, 0.408], "image_std": [0.269, 0.261, 0.276], "seq_len": 1,
        "arm_gripper_loss_ratio": 0.01, "cap_loss_ratio": 0.05, "fwd_loss_ratio": 0, "seed": 123,
        "num_workers": 16, "data_scale": 1, "norm_action": True, "norm_min": -0.65,
        "norm_max": 0.65, "output_root": "runs/checkpoints", "log_root": "runs/logs",
        "cache_root": "runs/cache", "model_load_path": None, "model_load_source": "torch",
        "resume": None, "act_encoder": None, "fwd_head": None,
        "train_setup": {
            "precision": "bf16", "predict_action": True, "predict_forward": False,
            "predict_forward_hand": False, "predict_caption": False, "train_vision": True,
            "bits": -1, "freeze_mm_mlp_adapter": False, "freeze_backbone": False,
            "freeze_resampler": False, "tune_mm_mlp_adapter": False, "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False, "gradient_checkpointing": False, "lora_enable": False,
            "mm_projector_lr": 1e-4, "lora_r": 64, "lora_alpha": 16, "lora_dropout": 0.05,
            "lora_bias": "none", "train_text_embedding": True,
        },
        "act_head": {
            "type": "LSTMDecoder", "hidden_size": 1024, "action_dim": 7, "down_sample": "none",
            "latent": 1, "fwd_pred_next_n": 1, "window_size": 1, "action_space": "continuous",
            "with_history": True, "history_type": "post",
        },
        "tokenizer": {
            "type": "AutoProcessor", "pretrained_model_name_or_path": f".vlms/{tag}",
            "tokenizer_type": tag, "max_text_len": 256, "additional_special_tokens": None,
        },
        "vlm": {"type": "AutoModel", "name": tag, "pretrained_model_name_or_path": f".vlms/{tag}"},
        "trainer": {
            "accelerator": "gpu", "strategy": "deepspeed_stage_2", "precision": precision,
            "logger": ["tensorboard"], "gradient_clip_val": 1.0, "use_distributed_sampler": False,
            "log_every_n_steps": 10, "max_epochs": 5, "val_check_interval": None,
            "check_val_every_n_epoch": 1, "max_steps": -1,
        },
    }  # fmt: skip
    if accumulate:
        config["trainer"]["accumulate_grad_batches"] = accumulate
    if kind not in ("RoboLLaVA", "RoboQwen"):
        config |= {"model_path": f".vlms/{tag}", "model_config": f".vlms/{tag}/config.json"}
    if name in _MIXES:
        trained, tested = _MIXES[name]
        common = {"type": "OpenVLADataset", "data_root_dir": "datasets/openvla",
                  "model_name": tag, "window_sample": "sliding", "organize_type": "interleave",
                  "mode": "train"}  # fmt: skip
        config["train_dataset"] = {
            **common, "data_mix": trained, "image_aug": True, "shuffle_buffer_size": 51200,
            "train": True,
        }  # fmt: skip
        config["val_dataset"] = {
            **common, "data_mix": tested, "image_aug": True, "shuffle_buffer_size": 10000,
            "train": False,
        }  # fmt: skip
        config["trainer"] |= {"max_steps": 50000, "check_val_every_n_epoch": None}
        config["trainer"]["val_check_interval"] = 10000
    else:
        common = {"type": "DiskCalvinDataset", "model_name": tag}
        folder = "datasets/calvin_data/task_ABCD_D"
        config["train_dataset"] = {
            **common, "data_dir": f"{folder}/training", "shift_first": False, "rgb_pad": 10,
            "gripper_pad": 4,
        }  # fmt: skip
        config["val_dataset"] = {**common, "data_dir": f"{folder}/validation"}
    for key, value in copy.deepcopy(_CHANGES.get(name, {})).items():
        group = isinstance(value, dict) and key in config
        # Flamingo's train_setup is another list of keys altogether.
        full = key == "train_setup" and kind == "RoboFlamingo"
        config[key] = {**config[key], **value} if group and not full else value
    if kind == "RoboFlamingo":
        del config["use_vision_resampler"], config["vision_resampler"]
    return config
