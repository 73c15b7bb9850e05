"""The options of training: what is trained, how, on which devices and for how long."""

from dataclasses import dataclass

from vla_jax.config.option import option


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates beside frozen kernels."""

    rank: int = option(0, "Rank of the low-rank updates; 0 = none.")
    alpha: float = option(16.0, "The update counts alpha / rank.")
    dropout: float = option(
        0.0, "Rate on the input of the updates, as in peft; needs model.dropout."
    )
    targets: tuple[str, ...] = option(
        (r"^backbone/text/(.*/)?layers/.*kernel$",),
        "Path regexes of the kernels that get one; these kernels are frozen.",
    )
    freeze: bool = option(
        True,
        "With a rank, freeze all else of the VLM too, but for what optim.trained names; what was "
        "added to it (head, action token) trains. False: as optim.frozen says. A resumed run keeps "
        "what it began with.",
        older=False,
    )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    # That of RoboVLMs' shipped configs, but for Flamingo's, which has 1e-4.
    learning_rate: float = option(2e-5, "Peak of the learning rate.", positive=True)
    schedule: str = option(
        "constant",
        "After the warm-up. constant, cosine (to 0), half_cosine (to min_scale) or drop (at once, "
        "to min_scale).",
        "constant",
        "cosine",
        "half_cosine",
        "drop",
    )
    # RoboVLMs' min_lr_scale.
    min_scale: float = option(0.01, "Floor of half_cosine and drop, as a share of the peak.")
    drop_at: int = option(0, "Step with which drop falls.")
    # A quarter of the 10000 steps that RoboVLMs counts as an epoch.
    warmup_steps: int = option(2500, "Steps in which the rate rises linearly from 0.")
    warmup_from: str = option(
        "zero", "Rates of the warm-up: t / w, or (t + 1) / (w + 1) as openpi's.", "zero", "one"
    )
    warmup_epochs: float = option(0.0, "And this many passes over the training windows.")
    weight_decay: float = option(0.0, "Decay of every parameter, as in RoboVLMs.")
    b1: float = option(0.9, "AdamW's decay of the mean.")
    b2: float = option(0.999, "AdamW's decay of the variance.")
    eps: float = option(1e-8, "AdamW's term in the denominator.")
    mean_dtype: str = option(
        "float32",
        "Type of AdamW's mean, which and the variance take 4 bytes a trained parameter each; "
        "bfloat16 takes 2.",
        "float32",
        "bfloat16",
    )
    # RoboVLMs' shipped configs set one that never reaches its trainer.
    clip_norm: float = option(1.0, "Global norm that gradients are clipped to; 0 = off.")
    # RoboVLMs' arm_gripper_loss_ratio, the same in all of its shipped configs.
    gripper_weight: float = option(0.01, "The loss is the arm's Huber + this * gripper's BCE.")
    caption_weight: float = option(0.05, "+ this * the cross-entropy of data.cotrain's answers.")
    ema_decay: float = option(
        0.0,
        "Average of the weights over the steps, which evaluation and serving then use; 0 = off. "
        "Costs 4 bytes a trained parameter. Common: 0.99 to 0.9999.",
    )
    ema_warmup: bool = option(
        True, "Whether the average follows more quickly at first; openpi's does not."
    )
    frozen: tuple[str, ...] = option(
        (),
        "Path regexes of parameters that do not train; kept in bfloat16, without moments.",
    )
    trained: tuple[tuple[str, int], ...] = option(
        (),
        "Exceptions to `frozen`: pairs of a path regex and how many of the last layers train, -1 = "
        "all. (('^backbone/text/layers/', 4),) trains the last four of the stack.",
    )
    rates: tuple[tuple[str, float], ...] = option(
        (), "Pairs of a path regex and a factor on the learning rate; the first match counts."
    )
    decays: tuple[tuple[str, float], ...] = option(
        (), "Pairs of a path regex and the weight decay there instead of `weight_decay`."
    )
    muon: tuple[str, ...] = option(
        (),
        "Path regexes of kernels whose step is orthogonalized (Muon) in place of Adam's: learns "
        "from fewer samples, mostly from scratch. Costs five small matrix products a step.",
    )


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 means all that are left."""

    data: int = option(1, "Replicas of the parameters.")
    fsdp: int = option(-1, "Parameters and optimizer are split over these.")
    tensor: int = option(1, "Heads and hidden units are split over these.")


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what it writes."""

    # RoboVLMs' runs on Open X-Embodiment have this length.
    steps: int = option(50000, "Optimizer steps.", positive=True)
    epochs: float = option(0.0, "Passes over the training windows instead of `steps`; 0 = off.")
    # As in RoboVLMs' paper; its shipped configs have 4 a GPU.
    batch_size: int = option(128, "Windows a step, over all devices.", positive=True)
    accumulate: int = option(
        1,
        "Parts the batch goes through in, one after the other: a step's memory for activations "
        "divided by this, the same gradient.",
        positive=True,
    )
    log_every: int = option(10, "Steps between lines of the log.")
    # RoboVLMs' val_check_interval.
    eval_every: int = option(10000, "Steps between evaluations; 0 = only at the end.")
    eval_batches: int = option(100, "Validation batches at most.")
    check_epochs: float = option(0.0, "Evaluate and save every this many passes instead; 0 = off.")
    save_every: int = option(5000, "Steps between checkpoints; the last step is always saved.")
    keep: int = option(3, "Newest checkpoints kept.")
    tensorboard: bool = option(False, "Also write event files to WORKDIR/tensorboard.")
    wandb: str = option("", "Project of wandb; '' = off.")
    max_skipped: int = option(
        10,
        "A step whose loss or gradients are not finite is skipped; so many in a row end the run.",
        positive=True,
    )
    profile: str = option(
        "", "START:STEPS, as '20:3': write a trace of these steps for XProf to WORKDIR/profile."
    )
    compilation_cache: str = option(
        "auto",
        "Where compiled programs are kept for the next start: auto (JAX_COMPILATION_CACHE_DIR, "
        "else ~/.cache/vla_jax/xla), a folder, or off.",
    )
    keep_heap: bool = option(
        True,
        "On CPUs under glibc: memory that a step frees stays with the process for the next step, "
        "instead of going back to the kernel, which would zero it again. False, or with a MALLOC_ "
        "variable of glibc's in the environment: as glibc does.",
    )
