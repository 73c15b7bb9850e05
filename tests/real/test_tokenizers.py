"""A vocabulary that people use, against ids that tiktoken gave for the same texts.

Downloads a public package of 2.4 MB that carries Qwen-VL's vocabulary, so slow. The texts are
instructions of robot datasets and odd ones: white space, Unicode, spelled special tokens; their
ids were made with tiktoken 0.14.0 and Qwen's expression.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vla_jax.data.language.tokenizer import Tokenizer

PACKAGE, FILE = "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken"


@pytest.mark.slow
def test_qwen_vl(tmp_path):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    done = subprocess.run([*command, tmp_path, PACKAGE], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (tmp_path / "qwen.tiktoken").write_bytes(archive.read(FILE))
    tokenizer = Tokenizer.from_dir(tmp_path)
    cases = json.loads(Path(__file__).with_name("qwen_vl_ids.json").read_text())
    assert len(cases["texts"]) > 90
    for text, expected in zip(cases["texts"], cases["qwen_vl"], strict=True):
        ids, valid = tokenizer.encode(text, 9000)
        assert ids[valid].tolist() == expected, text
