"""Folders for a model hub, and model cards beside all exports."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from launch import convert
from tests.convert.test_convert import imported, vlm  # noqa: F401  (fixtures)
from vla_jax.convert import card, push, store
from vla_jax.inference.policy import Policy


def run(*arguments):
    return convert.main([str(a) for a in arguments])


def front_matter(text):
    """{key: value} between the first two lines of dashes, as hubs read it."""
    lines = text.split("\n")
    assert lines[0] == "---"
    return dict(line.split(": ", 1) for line in lines[1 : lines.index("---", 1)])


class Hub(types.ModuleType):
    """A stand-in for huggingface_hub."""

    def __init__(self, token: str | None = "secret", fault: Exception | None = None):
        super().__init__("huggingface_hub")
        self.token, self.fault, self.calls = token, fault, []

    def get_token(self):
        return self.token

    def create_repo(self, repo, private, exist_ok):
        if self.fault:
            raise self.fault
        self.calls.append((repo, private, exist_ok))
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id, folder_path):
        self.calls.append((repo_id, folder_path))


@pytest.fixture
def hub(monkeypatch):
    stand_in = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return stand_in


@pytest.fixture
def trained(imported, tmp_path):  # noqa: F811
    """The imported model with the units of a dataset, as after training."""
    meta = {k: v for k, v in store.Stored(imported).meta.items() if k != "format"}
    spec = {"dim": 7, "normalization": "none", "clip": 0.65, "low": [-1.0] * 6, "high": [1.0] * 6,
            "gripper_env": [-1.0, 1.0], "hz": 30.0}  # fmt: skip
    meta |= {"action_specs": {"calvin": spec}, "statistics": {"calvin": {"action": {}}}}
    folder = tmp_path / "trained"
    folder.mkdir()
    store.write(folder, store.Stored(imported).leaves, meta)
    return folder


def test_a_checkpoint_for_the_hub_serves_as_it_is(trained, tmp_path, capsys):
    out = tmp_path / "ready"
    assert run("push", trained, out, "--layout=checkpoint", "--dtype=bfloat16") == 0
    assert f"hf upload USER/NAME {out} ." in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "README.md", "checkpoints", "vla_config.json", "dataset_statistics.json"
    }  # fmt: skip
    before, after = store.Stored(trained), store.Stored(out)
    for path, leaf in before.leaves.items():
        assert after.leaves[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            after.leaves[path].read(), leaf.read().astype(jnp.bfloat16), err_msg=path
        )
    assert {**after.meta, "format": 0} == {**before.meta, "format": 0}
    settings = json.loads((out / "vla_config.json").read_text())
    assert settings["config"]["model"]["backbone"]["name"] == "kosmos2"
    text = (out / "README.md").read_text()
    tags = "[robotics, vla, vision-language-action, kosmos2, policy_head]"
    expected = {"library_name": "vla_jax", "pipeline_tag": "robotics", "tags": tags}
    assert front_matter(text) == expected
    assert "vla serve --checkpoint=RUN" in text
    assert "| calvin | none | 0.65 | 30.0 | -1 / 1 |" in text
    assert Policy.from_checkpoint(out).metadata["dataset"] == "calvin"


def test_the_usual_layout_is_hugging_faces(imported, tmp_path, hub, capsys):  # noqa: F811
    out = tmp_path / "ready"
    assert run("push", imported, out, "--repo=me/kosmos") == 0
    assert hub.calls == [("me/kosmos", True, True), ("me/kosmos", str(out))]
    assert "sent to https://hub/me/kosmos" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "policy_head.safetensors", "README.md"} <= names
    text = (out / "README.md").read_text()
    assert "vla convert import-hf THIS_FOLDER RUN" in text
    assert "AutoModelForImageTextToText" in text


@pytest.mark.parametrize(
    ("stand_in", "reason"),
    [
        (None, "huggingface_hub is not installed; pip install huggingface_hub && hf auth login"),
        (Hub(token=None), "no token of the hub (HF_TOKEN, or hf auth login); hf auth login"),
        (Hub(fault=OSError("403 Forbidden")), "because of the hub: 403 Forbidden"),
    ],
    ids=["no library", "no token", "refused"],
)
def test_what_keeps_a_folder_here_is_one_sentence(monkeypatch, tmp_path, stand_in, reason):
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    with pytest.raises(push.PushError) as caught:
        push.upload(tmp_path, "me/kosmos")
    text = str(caught.value)
    assert text.startswith("not sent, ")
    assert reason in text
    assert text.endswith(f"hf upload me/kosmos {tmp_path} .")
    assert "\n" not in text


def test_without_a_token_the_folder_is_there_and_the_status_is_1(
    imported, tmp_path, hub, capsys  # noqa: F811
):  # fmt: skip
    hub.token = None
    out = tmp_path / "ready"
    assert run("push", imported, out, "--layout=checkpoint", "--repo=me/kosmos", "--public") == 1
    assert ": not sent, because this machine has no" in capsys.readouterr().err
    assert (out / "README.md").is_file()
    assert hub.calls == []


@pytest.mark.parametrize("name", [n for n, v in vars(card).items() if isinstance(v, card.Layout)])
def test_every_layouts_card_reads_well(imported, tmp_path, name):  # noqa: F811
    layout = getattr(card, name)
    card.write(tmp_path / "card.md", store.Stored(imported), layout, "exported")
    text = (tmp_path / "card.md").read_text()
    assert "THIS" not in text
    assert layout.commands.replace("THIS", "exported") in text
    assert "vision-language-action" in front_matter(text)["tags"]
