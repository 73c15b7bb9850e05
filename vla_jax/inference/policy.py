"""Checkpoint -> observation -> actions. Owns history and units; knows no sockets."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vla_jax import config as configuration
from vla_jax.config import Config
from vla_jax.config.observation import ObservationConfig
from vla_jax.data.errors import TextLengthError
from vla_jax.data.language.prompts import Writer
from vla_jax.data.language.tokenizer import Tokenizer
from vla_jax.data.units.gripper import GripperState
from vla_jax.data.units.normalize import ActionSpec, StateSpec
from vla_jax.data.units.policy_units import PolicyUnits
from vla_jax.inference import limits, provenance, realtime
from vla_jax.inference import weights as stored_weights
from vla_jax.inference.batched_step import BatchedStep, StepInput
from vla_jax.inference.execution import Execution, Plan
from vla_jax.inference.protocol import (
    ACTIONS_KEY,
    IMAGE_KEYS,
    PROMPT_KEY,
    STATE_KEY,
    ObservationError,
)
from vla_jax.inference.robot_keys import RobotKeys
from vla_jax.models import vla
from vla_jax.models.heads import HEADS
from vla_jax.models.structures.history import History
from vla_jax.train import checkpoint, lora


@dataclass(frozen=True)
class Session:
    """What one robot's episode has been so far.

    Attributes:
        history: what the model keeps of the last steps, on the device.
        steps: how many there have been; seeds the noise of heads that draw samples.
        plan: what is left of earlier chunks.
        gripper: what the gripper has been told.
        last: action that was sent, in the robot's units; None before the first.
    """

    history: History
    steps: int = 0
    plan: Plan = field(default_factory=Plan)
    gripper: GripperState = field(default_factory=GripperState)
    last: np.ndarray | None = None


class Policy:
    """A trained VLA that answers observations, one at a time or those of several robots at once.

    Attributes:
        metadata: what a client needs to know: cameras and their observation keys, chunk length,
            action dimension, control rate, gripper commands (None without a gripper).
        max_batch: how many sessions one pass of the model takes.
        keys: under which the robot sends its observations.
    """

    def __init__(
        self,
        config: Config,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        spec: ActionSpec,
        dataset: str,
        step: int | None = None,
        execution: Execution | None = None,
        states: StateSpec | None = None,
        max_batch: int = 1,
        units: PolicyUnits | None = None,
        observation: ObservationConfig | None = None,
        weights: str = "",
    ):
        """Wraps parameters.

        Args:
            config: of the run that trained them; `model.backbone.arch` is complete.
            params: nested dict.
            tokenizer: of the run.
            spec: units of the robot's actions.
            dataset: whose actions these are, for the metadata.
            step: of the checkpoint, for the metadata.
            execution: what of the predicted chunks is executed; by default whole chunks.
            states: units of the robot's state, of models that take it.
            max_batch: sessions that `infer_many` takes in one pass; a program is compiled for it
                and for each power of two below.
            units: of state and actions, in place of `spec` and `states`, where the model was
                trained in another project's (`data.units`).
            observation: the keys under which the robot sends its observations, in place of the
                config's.
            weights: form in which they are kept, see `inference.weights`; "" is the type that the
                model computes in.

        Raises:
            ValueError: the keys are no keys, the form is none, the execution does not fit the
                chunk or the gripper, or `max_batch` is not positive.
        """
        self.keys = RobotKeys(observation or config.observation)
        model = vla.build(config.model)
        self._structure = config.model.structure
        self._spec, self._states, self._units = spec, states, units
        self._state_dim = self._structure.proprio
        # Relative actions count from the state, even where the model takes none.
        if units is not None and (self._state_dim or units.relative):
            self._state_dim = len(units.state.first)
        self._execution = execution or Execution()
        self._has_gripper = config.model.has_gripper
        chunk = self._execution.reply_length(self._structure.chunk)
        if chunk > 1 and spec.gripper and spec.gripper.has_memory:
            raise ValueError(
                "execution: a gripper with a memory must see every step that is executed, and the "
                "client of a whole chunk may ask again earlier: use 'first', 'ensemble' or "
                "'receding'"
            )
        self._image = model.image
        form = vla.prompt_form(config.model)
        self._write = Writer(tokenizer, self._structure.text_len, vla.prompt(config.model), form)
        # By default in the compute type: the cast would otherwise be paid at every step.
        maps = vla.linear_maps(model) if weights == "int8" else {}
        params = stored_weights.store(params, weights, jnp.dtype(config.model.dtype), maps)
        guidable = HEADS[config.model.head.kind].guidable
        # Heads that draw no samples cannot be guided: their chunks are blended by the client.
        guided = self._execution.mode == "rtc" and guidable
        self._realtime = realtime.FORMS[self._execution.guidance] if guided else None
        self._steps = BatchedStep(
            model, params, self._image, config.seed, max_batch, self._realtime
        )
        self.max_batch = max_batch
        self._texts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        choices = (config.model.backbone.name, self._structure.kind, config.model.head.kind)
        self.metadata: dict[str, Any] = {
            "model": "/".join(choices),
            "step": step,
            "dataset": dataset,
            "cameras": {camera: IMAGE_KEYS[camera] for camera in self._structure.cameras},
            "observation": self.keys.to_json(),
            "image_size": self._image.size,
            "window": self._structure.window,
            "chunk": chunk,
            "execution": self._execution.mode,
            "action_dim": spec.dim,
            "hz": spec.hz,
            "gripper": spec.gripper
            and {"closed": spec.gripper.closed, "open": spec.gripper.opened},
            "needs_proprio": self._state_dim > 0,
            "proprio_dim": self._state_dim,
            "max_batch": max_batch,
            "device": jax.local_devices()[0].platform,
            "weights": weights or config.model.dtype,
        }
        if self._execution.mode == "rtc":
            guidance = self._execution.guidance if self._realtime else None
            self.metadata["rtc"] = realtime.describe(guidance, spec, units)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path,
        step: int | None = None,
        dataset: str | None = None,
        untrained: bool = False,
        execution: Execution | None = None,
        gripper: Mapping[str, int] | None = None,
        max_batch: int = 1,
        observation: ObservationConfig | None = None,
        weights: str = "",
    ) -> "Policy":
        """Loads what `launch/train.py` wrote.

        Args:
            directory: the run's workdir, or its folder of checkpoints.
            step: the checkpoint's step; None is the newest that is not damaged.
            dataset: whose statistics to use; may be left out when there is only one.
            untrained: fresh random weights, as a baseline.
            execution: see `Policy`.
            gripper: fields of the dataset's `ActionSpec` that this environment wants otherwise:
                gripper_repeat, gripper_patience.
            max_batch: see `Policy`.
            observation: see `Policy`.
            weights: see `Policy`.

        Raises:
            CheckpointError: nothing usable there.
            ValueError: the dataset is not one of the checkpoint's, or must be chosen.
        """
        with checkpoint.Checkpoints(directory, read_only=True) as saved:
            step = saved.intact(checkpoint.POLICY_ITEMS) if step is None else step
            meta = saved.meta(step)
            config = configuration.resolve(meta["config"])
            specs = meta["action_specs"]
            if dataset is None and len(specs) == 1:
                dataset = next(iter(specs))
            if dataset is None or dataset not in specs:
                chosen = "choose a dataset" if dataset is None else f"no dataset {dataset!r}"
                raise ValueError(f"{chosen}; the checkpoint has statistics of {sorted(specs)}")
            params = (
                _untrained(config) if untrained else lora.merge(saved.params(step), config.lora)
            )
            files = saved.directory / str(step)
            # Of the files, so that a score file names exactly what lies on the disk.
            stored = provenance.hash_folders(*(files / item for item in checkpoint.POLICY_ITEMS))
        spec = ActionSpec.from_json(specs[dataset])
        if gripper and spec.gripper is None:
            raise ValueError(f"{sorted(gripper)}: the actions of {dataset!r} have no gripper")
        changes: dict[str, Any] = dict(gripper or {})
        spec = dataclasses.replace(spec, **changes)
        statistics = meta["statistics"].get(dataset, {})
        units = meta.get("units", {}).get(dataset)
        policy = cls(
            config=config,
            params=params,
            tokenizer=Tokenizer.from_json(meta["tokenizer"]),
            spec=spec,
            dataset=dataset,
            step=0 if untrained else step,
            execution=execution,
            # Such units cover the state as well.
            states=None if units else _states(config, statistics),
            max_batch=max_batch,
            units=PolicyUnits.from_json(units) if units else None,
            observation=observation,
            weights=weights,
        )
        policy.metadata |= provenance.describe(
            stored, spec, statistics, untrained, execution or Execution()
        )
        return policy

    def new_session(self) -> Session:
        """The state before the first step of an episode."""
        return Session(self._steps.empty)

    def check(self, obs: Mapping[str, Any]) -> None:
        """Refuse an observation the model cannot use.

        Raises:
            ObservationError: listing every problem.
        """
        problems, sent = [], sorted(obs)
        obs = self.keys.standardize(obs, self._state_dim)
        for camera in self._structure.cameras:
            image = obs.get(IMAGE_KEYS[camera])
            problems += limits.image_problems(image, self.keys.image_names(camera), camera)
        if self._state_dim:
            state, names = obs.get(STATE_KEY, ()), self.keys.state_names()
            problems += limits.state_problems(state, names, self._state_dim)
        if self._execution.mode == "rtc":
            problems += realtime.timing_problems(obs)
        if reason := self.check_instruction(obs.get(PROMPT_KEY)):
            problems.append(f"{PROMPT_KEY}: {reason}")
        if problems:
            keys = [self.keys.image_names(camera) for camera in self._structure.cameras]
            keys += [PROMPT_KEY, *([self.keys.state_names()] if self._state_dim else [])]
            listing = "; ".join(problems)
            # Where all keys are there it is a value that is wrong, and the listing says which.
            hint = "" if sorted(keys) == sent else f". This policy takes {keys}, got {sent}"
            raise ObservationError(listing + hint)

    def check_instruction(self, instruction: Any) -> str:
        """Why the model cannot be told this, "" where it can: an evaluation asks before it runs."""
        if not isinstance(instruction, str) or not instruction.strip():
            return "expected the instruction as a non-empty string"
        if len(instruction) > limits.MAX_PROMPT:
            return f"{len(instruction)} characters, at most {limits.MAX_PROMPT}"
        try:
            # Encoding tells whether the text fits; zeros stand in for the state.
            self._encode(instruction, np.zeros(self._state_dim))
        except TextLengthError as error:
            return str(error)
        return ""

    def infer(self, session: Session, obs: Mapping[str, Any]) -> tuple[dict[str, Any], Session]:
        """One control step.

        Args:
            session: of this episode.
            obs: a checked observation.

        Returns:
            {"actions": float32 [n, a] in robot units}, n as the metadata's "chunk"; the next
            session.
        """
        return self.infer_many([session], [obs])[0]

    def infer_many(
        self, sessions: Sequence[Session], observations: Sequence[Mapping[str, Any]]
    ) -> list[tuple[dict[str, Any], Session]]:
        """`infer` for several robots in one pass of the model, `max_batch` of them at a time.

        Who shares a pass changes an action by rounding alone: each row has its own history and
        its own noise.
        """
        observations = [self.keys.standardize(obs, self._state_dim) for obs in observations]
        # While a chunk is being executed the model runs for its history's sake alone.
        looking = [
            i
            for i, session in enumerate(sessions)
            if self._execution.needs_chunk(session.plan) or self._structure.window > 1
        ]
        inputs = [self._input(sessions[i], observations[i]) for i in looking]
        predicted = dict(zip(looking, self._steps.run(inputs), strict=True))
        results = []
        for i, session in enumerate(sessions):
            chunk, history = predicted.get(i, (None, session.history))
            values = chunk
            # A model that writes may have written no chunk; an error is the server's affair.
            length = self.metadata["chunk"]
            held = self._execution.hold(chunk, session.last, length, self._has_gripper)
            if held is not None:
                after = replace(session, history=history, steps=session.steps + 1, plan=Plan())
                results.append(({ACTIONS_KEY: held}, after))
                continue
            if chunk is not None and self._units is not None:
                # Now, as relative actions count from the state that the chunk was asked for at.
                chunk = self._units.restore(chunk, _state(observations[i])).astype(np.float32)
            actions, plan = self._execution.select(chunk, session.plan)
            if self._execution.mode == "rtc" and values is not None:
                plan = replace(plan, last=realtime.Last(values, _state(observations[i])))
            gripper = session.gripper
            # Else `restore` has already brought the gripper into the robot's units.
            if self._units is None:
                actions, gripper = self._spec.to_env(actions, gripper)
            following = Session(history, session.steps + 1, plan, gripper, actions[-1])
            results.append(({ACTIONS_KEY: actions}, following))
        return results

    def _input(self, session: Session, obs: Mapping[str, Any]) -> StepInput:
        state = None
        if self._units is not None and self._state_dim:
            state = self._units.prepare_state(_state(obs))
        elif self._states is not None:
            state = self._states.normalize(np.asarray(obs[STATE_KEY]))
        images = {camera: obs[IMAGE_KEYS[camera]] for camera in self._structure.cameras}
        text, mask = self._encode(obs[PROMPT_KEY], state)
        # The state may be a part of the prompt alone; the model then takes none beside it.
        if not self._structure.proprio:
            state = None
        elif state is not None:
            state = state.astype(np.float32)
        held = (None, None)
        if self._realtime:
            free = np.zeros((self._structure.chunk, self._steps.action_dim), np.float32)
            held = self._realtime.held(session.plan.last, obs, free, self._units)
        return StepInput(images, text, mask, state, session.history, session.steps, *held)

    def warmup(self) -> None:
        """Compile for 1 to `max_batch` sessions; images of another size add one small resize."""
        black = np.zeros((*self._image.shape, 3), np.uint8)
        obs: dict[str, Any] = {IMAGE_KEYS[camera]: black for camera in self._structure.cameras}
        obs |= {STATE_KEY: np.zeros(self._state_dim, np.float32), PROMPT_KEY: "warm up"}
        self._steps.warmup(self._input(self.new_session(), obs))

    def _encode(
        self, instruction: str, state: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        # A text with the state in it is another one at every step: not worth keeping.
        if self._write.needs_state:
            return self._write(instruction, state)
        if instruction not in self._texts:
            if len(self._texts) >= 1024:  # bounded: clients choose the texts
                self._texts.clear()
            self._texts[instruction] = self._write(instruction)
        return self._texts[instruction]


def _state(obs: Mapping[str, Any]) -> np.ndarray:
    """The robot's state as it sends it; empty of one that sends none."""
    return np.asarray(obs.get(STATE_KEY, ()), np.float64)


def _states(config: Config, statistics: Mapping[str, Any]) -> StateSpec | None:
    dim = config.model.structure.proprio
    return StateSpec.from_statistics(statistics, dim) if dim else None


def _untrained(config: Config) -> dict[str, Any]:
    model = vla.build(config.model)
    return jax.jit(lambda key: vla.initial_params(model, key))(jax.random.key(config.seed))


def with_complete_arch(config: Config, arch: Mapping[str, Any]) -> Config:
    """The config as checkpoints carry it: self-contained, without the Hugging Face folder."""
    backbone = dataclasses.replace(config.model.backbone, arch=dict(arch))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))
