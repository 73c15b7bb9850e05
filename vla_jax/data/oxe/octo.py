"""Where octo's rules for a dataset are others than openvla's.

Octo fills no state up to a fixed width, and hides the instructions of datasets whose instructions
say nothing, so that it can leave those trajectories out. Where its own rule fails (robo_net's
state) or zeros stand for a state that was not recorded, here is what was meant: the state, none.
"""

from collections.abc import Mapping
from dataclasses import replace

from vla_jax.data.oxe import others
from vla_jax.data.oxe.franka import EXTERNAL
from vla_jax.data.oxe.recipe import STEP, Recipe, take
from vla_jax.data.spec import DatasetSpec

# Their instructions are the same in all episodes, or do not say what is done.
UNINFORMATIVE = frozenset(
    {
        "kuka",
        "berkeley_cable_routing",
        "roboturk",
        "nyu_door_opening_surprising_effectiveness",
        "viola",
        "toto",
        f"stanford_hydra_dataset{EXTERNAL}",
        f"austin_buds_dataset{EXTERNAL}",
        f"nyu_franka_play_dataset{EXTERNAL}",
        f"austin_sailor_dataset{EXTERNAL}",
        f"austin_sirius_dataset{EXTERNAL}",
        "utaustin_mutex",
    }
)
# What octo's registry does not have, or has under the same rule.
SAME = frozenset(
    {
        "calvin",
        "bridge_oxe",
        "bridge_orig",
        "droid",
        "droid_wipe",
        *(f"berkeley_gnm_{name}" for name in ("recon", "cory_hall", "sac_son")),
        *(f"libero_{name}_no_noops" for name in ("spatial", "object", "goal", "10")),
        "tdroid_carrot_in_bowl",
        "tdroid_pour_corn_in_pot",
        "tdroid_flip_pot_upright",
        "tdroid_move_object_onto_plate",
        "tdroid_knock_object_over",
        "tdroid_cover_object_with_towel",
    }
)


def specs(openvla: Mapping[str, DatasetSpec]) -> dict[str, DatasetSpec]:
    """Octo's specs of the datasets that both know by the same name."""
    derived = {name: _octo(name, spec) for name, spec in openvla.items() if name not in SAME}
    pick, both = f"utokyo_xarm_pick_and_place{EXTERNAL}", f"utokyo_xarm_bimanual{EXTERNAL}"
    mvp, rpt = f"berkeley_mvp{EXTERNAL}", f"berkeley_rpt{EXTERNAL}"
    # The only camera of dobbe is on the gripper, and octo files it there.
    wrist = derived["dobbe"].images["primary"]
    return derived | {
        "bridge_dataset": others.BRIDGE_DATASET,
        "dobbe": replace(derived["dobbe"], images={"wrist": wrist}),
        "imperialcollege_sawyer_wrist_cam": _changed(
            derived["imperialcollege_sawyer_wrist_cam"], state=()
        ),
        pick: replace(_changed(derived[pick], state=()), state="none"),
        both: _changed(derived[both], state=(take("observation/end_effector_pose"),)),
        # Octo takes 1 for closed here, so the robot's command turns around with it.
        mvp: replace(_changed(derived[mvp], gripper="closed"), gripper_env=(1.0, 0.0)),
        # Octo predicts the motion over three recorded steps, hence 10 of the 30 Hz.
        rpt: replace(
            derived[rpt],
            standardize=others.berkeley_rpt,
            features={
                "joints": "observation/joint_pos",
                "gripper": "observation/gripper",
                "action": "action",
                "language": STEP,
            },
            gripper_env=(1.0, 0.0),
            hz=10.0,
        ),
    }


def _octo(name: str, spec: DatasetSpec) -> DatasetSpec:
    # Functions have no parts that could be changed.
    if not isinstance(spec.standardize, Recipe):
        return spec
    # Octo fills no state up to 8 numbers, so the padding goes.
    bare = _changed(spec, state=spec.standardize.without_padding().state)
    return _changed(bare, language="") if name in UNINFORMATIVE else bare


def _changed(spec: DatasetSpec, **changes) -> DatasetSpec:
    assert isinstance(spec.standardize, Recipe)
    changed_recipe = replace(spec.standardize, **changes)
    features = {
        k: v
        for k, v in spec.features.items()
        # A function for the instruction may read features that no recipe lists.
        if k in changed_recipe.features or callable(changed_recipe.language)
    }
    return replace(
        spec, standardize=changed_recipe, features={**features, **changed_recipe.features}
    )
