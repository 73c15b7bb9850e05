"""A tiny Kosmos-2 with the LSTM head on demonstrations of libero_object, from scratch.

python launch/train.py --config=configs/libero_smoke.py:DATA --workdir=runs/libero_smoke

DATA, such as data/libero_object_no_noops/1.0.0: RLDS of what a script recorded, which picks
groceries up and puts them into the basket, in 42 demonstrations of three tasks. The hand of 12 is
pushed now and then. With VENV of eval_servers/libero/setup.sh:

VENV/bin/python eval_servers/libero/record.py --suite=object --tasks 0 6 8 --size=128 \
    --out=recorded --episodes=10
VENV/bin/python eval_servers/libero/record.py --suite=object --tasks 0 6 8 --size=128 \
    --out=pushed --episodes=4 --pushes=0.05 --seed=2000
cp pushed/*.npz recorded
python launch/convert_data.py libero recorded DATA
python launch/evaluate.py libero --checkpoint=runs/libero_smoke --out=OUT \
    --python=VENV/bin/python -- --suite=object --tasks 0 6 8 --episodes=20 --size=128 \
    --execute-steps=5

60 of 60 held-out initial states, 20 of each task (95 % interval 94 to 100 %). The baselines,
and what that means, are in docs/success_rates.md. On one CPU core 8 CPU-minutes of recording, 4 of
training and 4 of evaluation.

--config=configs/libero_smoke.py:expert:DATA trains an expert beside a tiny PaliGemma instead, whose
chunks of 16 are samples (flow matching). From 28 of the demonstrations, those of tasks 0 and 6, it
does 20 of 20 held-out initial states of these; 8 CPU-minutes of training.
"""

from typing import Any

from vla_jax.configs import quickstart, quickstart_expert
from vla_jax.data.oxe.recipe import recipe, take

# As the published data's spec, but of the state where the hand is and what its fingers do. The
# hand's orientation, which the script never changes, sways with the motion: it would tell the
# policy how the hand moves, rather than where it has to go.
libero_hand = recipe(
    {"primary": "image", "wrist": "wrist_image"},
    action=(take("action"),),
    gripper="closed_sign",
    state=(take("observation/state", 0, 3), take("observation/state", -2)),
    hz=20.0,
)


def get_config(argument: str = "runs/libero_smoke/data/libero_object_no_noops/1.0.0") -> Any:
    """DATA, the dataset's folder, or expert:DATA."""
    data = argument.removeprefix("expert:")
    expert = data != argument
    c = (quickstart_expert if expert else quickstart).get_config(data)
    c.data.datasets[0]["spec"] = f"{__file__}:libero_hand"
    # A carton is 6 pixels wide in the view of the table at this size, and 20 in the hand's.
    c.model.backbone.arch["vision_config"].update({"image_size": 64, "patch_size": 16})
    # One step of history, since the policy is asked at every fifth step only.
    c.model.structure.update({"text_len": 32, "window": 1, "chunk": 8, "proprio": 5})
    c.observation.update({"state": ("observation/state[:3]", "observation/state[6:]")})
    c.augment.shift = {"primary": 2, "wrist": 2}
    c.train.update({"steps": 1500, "batch_size": 32})
    if expert:
        # So long that chunks overlap where five actions are executed from request to request.
        c.model.structure.chunk = 16
        c.model.expert.padded = 7
        c.train.steps = 3000
    else:
        c.model.backbone.arch["latent_query_num"] = 4
    return c
