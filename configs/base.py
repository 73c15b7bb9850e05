"""Every knob once, with its default: the original's published setting where it has one.

Other config files start from `get_config()` here and state only what differs.
"""

from typing import Any

from ml_collections import ConfigDict

# One entry of `data.datasets`. `spec` names a standardisation in vla_jax/data/oxe; `dir` is the
# version folder that holds dataset_info.json, features.json and the TFRecord shards.
DATASET = {"spec": "", "dir": "", "weight": 1.0}


def get_config() -> Any:
    """The defaults: Kosmos-2, policy head, LSTM (RoboVLMs' released setting)."""
    c: Any = ConfigDict()
    c.seed = 123  # initial weights, order of the samples, dropout, augmentation

    m: Any = ConfigDict()
    c.model = m
    m.backbone = ConfigDict(
        {
            "name": "kosmos2",  # which VLM: a file in vla_jax/models/backbones
            # Hugging Face folder (config.json, *.safetensors, tokenizer.json); "" = random weights.
            "hf_dir": "",
            "arch": ConfigDict({}),  # overrides of the VLM's config.json, same nesting
        }
    )
    arch: Any = m.backbone.arch
    arch.unlock()
    m.structure = ConfigDict(
        {
            # one_step: no history. discrete: the VLM writes actions as tokens. interleaved: the VLM
            # sees the window, image by image. policy_head: the VLM sees one step, the head the
            # window. video: the VLM sees the window's images at once and acts at its last step.
            "kind": "policy_head",
            "window": 16,  # W, steps of history
            "chunk": 10,  # F, actions predicted at every step
            "latent": 1,  # action tokens a step
            "cameras": ("primary", "wrist"),  # views the model takes; a missing one is an error
            "text_len": 32,  # text columns, prompt included; longer prompts are an error
            # per_row: the action token stands before each row's </s>, whatever the padding, so a
            # batch of one equals any other. padded_column: the original's training layout.
            "act_insert": "per_row",
            # What the head reads of a step: action = the hidden states at its action tokens; text,
            # vision, all = those of the step's own tokens (RoboVLMs' down_sample), no action token.
            "readout": "action",
            # Numbers of the robot's state, one token before the instruction; 0 = none. (In RoboVLMs
            # `use_state` never reaches the model.)
            "proprio": 0,
            # Steps that leave a full interleaved window at once. 1: the oldest, so every later step
            # reads the window anew; more: the VLM goes on with its cache that many steps between.
            "slide": 1,
            "resampler": 0,  # tokens a camera after a Perceiver resampler (RoboVLMs: 64); 0 = none
        }
    )
    m.head = ConfigDict(
        {
            # mlp | lstm | gpt2 | detokenizer | diffusion | flow: files in vla_jax/models/heads
            "kind": "lstm",
            "hidden": 1024,  # width of the recurrent state or of the transformer
            "layers": 4,  # recurrent or transformer layers (gpt2: RoboVLMs has 8)
            "heads": 8,  # attention heads of gpt2, diffusion, flow
            # A step's tokens to `latent` vectors: none: there are that many; pooling: max over as
            # many spans; resampler: a Perceiver.
            "down_sample": "none",
            "sampling_steps": 10,  # of diffusion (DDIM) and flow (Euler)
            "noise_levels": 100,  # of diffusion's training
            "bins": 256,  # detokenizer: ids an action dimension
            "token_end": 0,  # detokenizer: first id above the actions'; 0 = the backbone's own
            "low": -1.0,  # detokenizer: value of the first bin
            "high": 1.0,  # detokenizer: value of the last bin
            "vocabulary": "actions",  # detokenizer: ids it may choose: actions | all (the original)
        }
    )
    m.sentence = ConfigDict(
        {
            # Size of CLIP's vector of the instruction, which the features must then predict beside
            # the actions (RoboVLMs' use_clip_norm, with ViT-L/14: 768); 0 = off.
            "dim": 0,
            "dir": "",  # Hugging Face folder of that CLIP
            "weight": 0.05,  # of this part in the loss
        }
    )
    m.action_dim = 7  # arm dimensions + 1 gripper
    m.dropout = True  # the backbone's own dropout rates, in training
    m.dtype = "bfloat16"  # activations; parameters and the loss stay float32
    m.remat = "full"  # what the backward pass recomputes: full | dots | none

    c.data = ConfigDict(
        {
            "datasets": (),  # tuple of dicts like DATASET above
            # Texts about images, predicted beside the actions so that the VLM keeps its language.
            "cotrain": ConfigDict(
                {
                    "path": "",  # .json or .jsonl in LLaVA's form; "" = off
                    "images": "",  # folder their `image` is relative to; "" = beside the file
                    "rows": 32,  # texts a step, beside train.batch_size windows: the ratio
                    "text_len": 128,  # text columns; longer conversations are cut
                    # Before every answer; the image stands before the first.
                    "prompt": "Question: {question} Answer: ",
                }
            ),
            # Which trajectories are used. A regex counts where it is found in an instruction.
            "filters": ConfigDict(
                {
                    "language": (),  # regexes, one of which must be found; () = any text
                    "not_language": (),  # regexes none of which may be found
                    # JSON file {dataset: [...]} of the training episodes to keep: their numbers in
                    # the split, or [start, end] as in episode_metadata (CALVIN's lists); "" = all.
                    "episodes": "",
                    "few_shot": 0,  # training trajectories kept of each instruction; 0 = all
                    "few_shot_seed": 0,  # which ones
                    # Windows are left out before which the robot idles for a whole chunk: no arm
                    # dimension of a relative action above this, in the dataset's units, and no
                    # change of the gripper (LIBERO: 1e-4); 0 = the dataset's own rule, which
                    # only DROID has (1e-5; a tiny value here leaves out what is exactly 0).
                    "noop": 0.0,
                }
            ),
            # What a training sample is told: one of its instructions, drawn evenly, unless:
            "language": ConfigDict(
                {
                    "paraphrases": "",  # JSON file {instruction: [other words for it]}; "" = none
                    "paraphrase": 0.5,  # share of the samples that get one of these
                    "dropout": 0.0,  # share of the samples that are told nothing
                }
            ),
            "left_pad": True,  # windows may reach left of the start, masked (RoboVLMs: False)
            # sliding: one window ends at every frame. segment: every window comes `window` times,
            # of copy i the first i steps are hidden (RoboVLMs' organize_type = "segment").
            "windows": "sliding",
            # Parity: supervise actions up to a random later frame only, as RoboVLMs' OXE loader
            # does through goals it does not use.
            "random_goal": False,
            # Parity: supervise steps that are themselves padding or hidden, as RoboVLMs does.
            "padded_rows": False,
            # What is wrong with the data: error: stop and say where; skip: leave it out, count it
            # and log it (episodes; windows with a corrupt image; views a dataset does not have).
            "on_error": "error",
            "train_split": "train",  # TFDS split
            "val_split": "val",  # when absent, the last val_fraction of the train trajectories
            "val_fraction": 0.05,  # see above
            # Whose rules for Open X-Embodiment's datasets, where they differ: openvla | octo.
            # default: openvla's, which are RoboVLMs', but for bridge_dataset, which is octo's
            # (openvla's rule for those data is called bridge_orig).
            "variant": "default",
            # Numbers between open and closed. declared: cut at 0.5 where the dataset means only
            # those two, else held within 0..1. recorded: as they are (octo, openvla). exact: all
            # but 1 is closed (RoboVLMs).
            "gripper": "declared",
            # File or folder of statistics to use instead of the data's own: octo's, openvla's,
            # openpi's or RoboVLMs'; "" = computed.
            "statistics": "",
            "stats_split": "train",  # computed from: train | all (the reference: validation too)
            # Parity: a gripper that never moves becomes 0, though it is not scaled (openvla).
            "constant_to_zero": False,
            "normalization": "q99",  # arm scaling: q99 | bounds | normal | none
            "clip": 1.0,  # then clip to +-clip and stretch to +-1 (RoboVLMs: 0.65)
            "cache_dir": "",  # where indices live; "" = beside the data, else ~/.cache/vla_jax
            # auto: reuse a valid index; rebuild: make it anew; verify: and check all records' CRCs.
            "index": "auto",
            # Of JPEGs: fast, as TensorFlow decodes and the published weights were trained, or
            # accurate, as PIL decodes: 1.2 grey levels apart on average.
            "dct": "fast",
            # index: random access, on disks. stream: RLDS from front to back, through TensorFlow,
            # for object stores (gs://...). The windows are the same; index resumes exactly.
            "reader": "index",
            "pool": 256,  # stream: episodes held, encoded, whose windows are shuffled
            "threads": 2,  # decoding threads a process
            "prefetch": 4,  # batches kept ready
            "block": 16384,  # samples per mixture block; proportions are exact over one block
        }
    )
    c.augment = ConfigDict(
        {
            "shift": ConfigDict({}),  # camera -> pixels of random shift (CALVIN: 10, wrist 4)
            "crop_scale": 1.0,  # area of the random resized crop; 1 = off (OXE: 0.9)
            "brightness": 0.0,  # additive, +- this (OXE: 0.2)
            "contrast": 0.0,  # factor 1 +- this (OXE: 0.2)
            "saturation": 0.0,  # factor 1 +- this (OXE: 0.2)
            "hue": 0.0,  # +- this turn (OXE: 0.05)
            "dropout": 0.0,  # share of the views that are blacked out; one always stays (octo)
            # Parity: one number for the crop's place and all colours, as by dlimp's shared seed.
            "draws": "independent",  # independent | shared
            # To the model's size. backbone: as its processor does, which serving always does.
            # lanczos3: TensorFlow's, the parity of octo's, openvla's and RoboVLMs' OXE training.
            "resize": "backbone",
            "per_frame": False,  # shift: a new draw for every frame (the original) or one a window
            "jitter_per_frame": False,  # the others: a new draw for every frame or one a window
            "share_cameras": False,  # crop, colours and shift: one draw for all cameras
        }
    )
    shift: Any = c.augment.shift
    shift.unlock()
    c.lora = ConfigDict(
        {
            "rank": 0,  # r of the low-rank updates; 0 = none
            "alpha": 16.0,  # the update counts alpha / rank
            "dropout": 0.0,  # rate on the input of the updates, as in peft; needs model.dropout
            # Path regexes of the kernels that get one; these kernels are frozen. The other
            # parameters train or not as `optim` says: freeze them with optim.frozen.
            "targets": (r"^backbone/text/(.*/)?layers/.*kernel$",),
        }
    )
    c.optim = ConfigDict(
        {
            "learning_rate": 2e-5,  # peak
            "schedule": "constant",  # constant | cosine (to 0) | half_cosine (to min_scale)
            "min_scale": 0.01,  # floor of half_cosine, as a share of the peak
            "warmup_steps": 2500,  # linear from 0
            "warmup_epochs": 0.0,  # and this many passes over the training windows
            "weight_decay": 0.0,  # on every parameter, as in the original
            "b1": 0.9,  # AdamW
            "b2": 0.999,  # AdamW
            "eps": 1e-8,  # AdamW
            "clip_norm": 1.0,  # global gradient norm; 0 = off (the original's shipped configs)
            "gripper_weight": 0.01,  # loss = arm Huber + this * gripper BCE
            "caption_weight": 0.05,  # + this * cross-entropy of data.cotrain's answers
            # Average of the weights over the steps, which evaluation and serving then use; 0 = off.
            # Costs 4 bytes a trained parameter. Common: 0.99 to 0.9999.
            "ema_decay": 0.0,
            # Path regexes of parameters that do not train; kept in bfloat16, without moments.
            "frozen": (),
            # Exceptions to `frozen`: pairs of a path regex and how many of the last layers train,
            # -1 = all. (("^backbone/text/layers/", 4),) trains the last four of the stack.
            "trained": (),
            # Pairs of a path regex and a factor on the learning rate; the first match counts.
            "rates": (),
            # Pairs of a path regex and the weight decay there instead of `weight_decay`.
            "decays": (),
            # Path regexes of kernels whose step is orthogonalised (Muon) in place of Adam's: learns
            # from fewer samples, mostly from scratch. Costs five small matrix products a step.
            "muon": (),
        }
    )
    c.mesh = ConfigDict(
        {
            "data": 1,  # replicas of the parameters
            "fsdp": -1,  # parameters and optimizer split over these
            "tensor": 1,  # heads and hidden units split over these
        }
    )
    c.train = ConfigDict(
        {
            "steps": 50000,  # optimizer steps
            "epochs": 0.0,  # passes over the training windows instead of `steps`; 0 = off
            "batch_size": 128,  # windows a step, over all devices
            # Parts the batch goes through in, one after the other: a step's memory for activations
            # divided by this, the same gradient.
            "accumulate": 1,
            "log_every": 10,  # steps
            "eval_every": 10000,  # steps; 0 = only at the end
            "eval_batches": 100,  # validation batches at most
            "check_epochs": 0.0,  # evaluate and save every this many passes instead; 0 = off
            "save_every": 5000,  # steps; the last step is always saved
            "keep": 3,  # newest checkpoints kept
            "tensorboard": False,  # also write event files to WORKDIR/tensorboard
            "wandb": "",  # wandb project; "" = off
        }
    )
    return c
