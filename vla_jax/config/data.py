"""The options of the data: the mixture, its samples, and random changes of their images."""

from dataclasses import dataclass

from vla_jax.config.option import Options, group, option


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of the mixture."""

    spec: str = option("", "Its standardization: a name in vla_jax/data/oxe, or FILE.py of a spec.")
    dir: str = option("", "Its version folder: dataset_info.json, features.json, TFRecord shards.")
    weight: float = option(1.0, "Share of the samples, relative to the other datasets' weights.")


@dataclass(frozen=True)
class CotrainConfig:
    """Texts about images, predicted beside the actions so that the VLM keeps its language."""

    path: str = option("", "A .json or .jsonl file in LLaVA's form; '' = off.")
    images: str = option("", "Folder that its `image` is relative to; '' = beside the file.")
    rows: int = option(32, "Texts a step, beside train.batch_size windows: the ratio of the two.")
    text_len: int = option(128, "Text columns; longer conversations are cut.")
    prompt: str = option(
        "Question: {question} Answer: ",
        "Text before every answer; the image stands before the first.",
    )


@dataclass(frozen=True)
class FiltersConfig:
    """Which trajectories and windows are used; a regex counts where an instruction has it."""

    language: tuple[str, ...] = option((), "Regexes, one of which must be found; () = any text.")
    not_language: tuple[str, ...] = option((), "Regexes none of which may be found.")
    episodes: str = option(
        "",
        "JSON file {dataset: [...]} of the training episodes to keep: their numbers in the split, "
        "or [start, end] as in episode_metadata (CALVIN's lists); '' = all.",
    )
    few_shot: int = option(0, "Training trajectories kept of each instruction; 0 = all.")
    # Apart from the run's seed, so that several runs can train on the same few trajectories.
    few_shot_seed: int = option(0, "Seed that chooses which ones.")
    noop: float = option(
        0.0,
        "Leave out windows before which the robot idles for a whole chunk: no arm dimension of a "
        "relative action above this, in the dataset's units, and no change of the gripper "
        "(LIBERO: 1e-4). 0 = the dataset's own rule, which only DROID has (1e-5; a tiny value "
        "here leaves out what is exactly 0).",
    )


@dataclass(frozen=True)
class LanguageConfig:
    """Which instruction a training sample gets; by default one of its own, drawn evenly."""

    paraphrases: str = option("", "JSON file {instruction: [other words for it]}; '' = none.")
    paraphrase: float = option(0.5, "Share of the samples that get one of these.")
    dropout: float = option(0.0, "Share of the samples that get no instruction.")


@dataclass(frozen=True)
class DataParity:
    """What the data do only to repeat a reference implementation; vla_jax/data/oxe/quirks.py."""

    # Every episode that is served begins with a short history, which training has to show as well.
    left_pad: bool = option(
        True, "Windows may reach left of a trajectory's start, masked (RoboVLMs: False)."
    )
    windows: str = option(
        "sliding",
        "sliding: one window ends at every frame. segment: every window comes `window` times, of "
        "copy i the first i steps are hidden (RoboVLMs' organize_type = 'segment').",
        "sliding",
        "segment",
    )
    random_goal: bool = option(
        False,
        "Supervise actions up to a random later frame only, as RoboVLMs' OXE loader does through "
        "goals it does not use.",
    )
    padded_rows: bool = option(
        False, "Supervise steps that are themselves padding or hidden, as RoboVLMs does."
    )
    variant: str = option(
        "default",
        "Whose rules for Open X-Embodiment's datasets, where they differ. default: openvla's, "
        "which are RoboVLMs', but for bridge_dataset, which is octo's (openvla's rule for those "
        "data is called bridge_orig).",
        "default",
        "openvla",
        "octo",
    )
    gripper: str = option(
        "declared",
        "Numbers between open and closed. declared: cut at 0.5 where the dataset means only those "
        "two, else held within 0..1. recorded: as they are (octo, openvla). exact: all but 1 is "
        "closed (RoboVLMs).",
        "declared",
        "recorded",
        "exact",
    )
    stats_split: str = option(
        "train",
        "Split that statistics are computed from; the reference takes the validation split too.",
        "train",
        "all",
    )
    constant_to_zero: bool = option(
        False, "A gripper that never moves becomes 0, though it is not scaled (openvla)."
    )
    dct: str = option(
        "fast",
        "How JPEGs are decoded: fast, as TensorFlow does and the published weights were trained, "
        "or accurate, as PIL does: 1.2 grey levels apart on average.",
        "fast",
        "accurate",
    )


@dataclass(frozen=True)
class DataConfig(Options):
    """The mixture and how trajectories become samples."""

    datasets: tuple[DatasetConfig, ...] = option((), "The mixture: a tuple of dicts.")
    cotrain: CotrainConfig = group(CotrainConfig)
    filters: FiltersConfig = group(FiltersConfig)
    language: LanguageConfig = group(LanguageConfig)
    train_split: str = option("train", "TFDS split to train on.")
    val_split: str = option(
        "val", "TFDS split held out; when absent, the last val_fraction of the train trajectories."
    )
    # The references' own rule for datasets without a split.
    val_fraction: float = option(0.05, "Share of the train trajectories held out; see val_split.")
    # Quantiles, as a single outlier would stretch `bounds` until all other motion is tiny.
    normalization: str = option(
        "q99", "How the arm's actions are scaled.", "q99", "bounds", "normal", "none"
    )
    units: str = option(
        "",
        "Rule of vla_jax/data/units/scaling.py by which state and actions are scaled as another "
        "project does, the gripper like the rest, such as openpi_quantile; '' = by normalization.",
    )
    relative: tuple[int, ...] = option(
        (),
        "With units: which actions count from the state at the chunk's start, as openpi's delta "
        "masks have it: (6, -1) is six that do and one that does not.",
    )
    robot: str = option(
        "", "With units: whose joints are brought to pi0's space, '' = as they are.", "", "aloha"
    )
    # RoboVLMs' 0.65 cuts once more what the quantiles have cut already, so it is not the default.
    clip: float = option(
        1.0,
        "Scaled actions are clipped to +- this and stretched to +-1 (RoboVLMs: 0.65).",
        positive=True,
    )
    statistics: str = option(
        "",
        "File or folder of statistics to use instead of the data's own: octo's, openvla's, "
        "openpi's or RoboVLMs'; '' = computed.",
    )
    on_error: str = option(
        "error",
        "What to do about wrong data. error: stop and say where; skip: leave it out, count it and "
        "log it (episodes; windows with a corrupt image; views a dataset does not have).",
        "error",
        "skip",
    )
    max_skipped_share: float = option(
        0.5,
        "Of on_error = skip: share of a dataset's episodes, or of the windows lately drawn, that "
        "may be left out; beyond that the run stops, as what is wrong is not single parts.",
    )
    reader: str = option(
        "index",
        "index: random access and exact resume, of folders and URLs. stream: RLDS from front to "
        "back, through TensorFlow. The windows are the same.",
        "index",
        "stream",
    )
    index: str = option(
        "auto",
        "auto: reuse a valid index; rebuild: make it anew; verify: and check all records' CRCs.",
        "auto",
        "rebuild",
        "verify",
    )
    cache_dir: str = option(
        "", "Folder of the indices; '' = beside the data, else ~/.cache/vla_jax."
    )
    pool: int = option(
        256, "Episodes the stream holds, encoded, whose windows are shuffled.", positive=True
    )
    threads: int = option(2, "Decoding threads of a process.")
    prefetch: int = option(4, "Batches kept ready.")
    # A dataset needs one sample a block at least, so a share may be as small as 1 in 16384.
    block: int = option(16384, "Samples of a mixture block; proportions are exact over one block.")
    parity: DataParity = group(DataParity)


@dataclass(frozen=True)
class AugmentParity:
    """What augmentation does only to repeat a reference implementation."""

    draws: str = option(
        "independent",
        "shared: one number for the crop's place and all colors, as by dlimp's shared seed.",
        "independent",
        "shared",
    )
    resize: str = option(
        "backbone",
        "How training images get the model's size. backbone: as its processor does, which serving "
        "always does. lanczos3: TensorFlow's, as octo, openvla and RoboVLMs' OXE training do.",
        "backbone",
        "lanczos3",
    )
    jitter_per_frame: bool = option(
        False, "Crop and colors: a new draw for every frame instead of one for a window."
    )
    share_cameras: bool = option(False, "Crop, colors and shift: one draw for all cameras.")


@dataclass(frozen=True)
class AugmentConfig(Options):
    """Random changes of the images, drawn on the device from the sample number."""

    shift: dict[str, int] = option({}, "Camera -> pixels of random shift (CALVIN: 10, wrist 4).")
    crop_scale: float = option(1.0, "Area of the random resized crop; 1 = off (OXE: 0.9).")
    brightness: float = option(0.0, "Added to the pixels, +- this (OXE: 0.2).")
    contrast: float = option(0.0, "Factor 1 +- this (OXE: 0.2).")
    saturation: float = option(0.0, "Factor 1 +- this (OXE: 0.2).")
    hue: float = option(0.0, "Turn of the hue, +- this (OXE: 0.05).")
    dropout: float = option(0.0, "Share of the views that are blacked out; one stays (octo).")
    per_frame: bool = option(
        False, "Shift: a new draw for every frame (RoboVLMs) instead of one for a window."
    )
    parity: AugmentParity = group(AugmentParity)
