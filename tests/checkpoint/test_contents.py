"""A directory that holds no checkpoint is refused with what it holds, what is missing, and what to do."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxtml.checkpoint.inkling.source import ReleasedCheckpoint
from jaxtml.checkpoint.opening import open_checkpoint
from jaxtml.convert.conversion import convert
from jaxtml.errors import InputError

WEIGHTS = "model.safetensors"
ADAPTER = {"base_model.model.x.lora_A.weight": np.zeros((2, 2), np.float32)}


@pytest.fixture
def folder(release, tmp_path) -> Callable[..., Path]:
    """`folder(*names, config=...)` makes a directory with these empty files and a release's `config.json`.

    The config may be changed by `config`, a dictionary. None as a value removes a field. Without `config`, the
    directory has no `config.json`.
    """

    def make(*names: str, config: dict[str, Any] | None = None) -> Path:
        made = tmp_path / "given"
        made.mkdir()
        for name in names:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).touch()
        if config is not None:
            fields = json.loads((release / "config.json").read_text()) | config
            text = json.dumps({name: value for name, value in fields.items() if value is not None})
            (made / "config.json").write_text(text)
        return made

    return make


def refusal(directory: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pytorch_model.bin"], "has its weights as pytorch_model.bin, .* with model.save_pretrained"),
        (["a.pt", "optimizer.pt"], "has its weights as a.pt, and jaxtml reads safetensors alone"),
        (["q4.gguf"], "has its weights as q4.gguf, .* download the safetensors"),
        ([], "has a config.json and no weights: download model.safetensors, or all shards and model.safetensors.index"),
        ([f"{WEIGHTS}.part"], f"no weights yet: its download has not ended .{WEIGHTS}.part.; run the download again"),
        ([".cache/huggingface/download/x.incomplete"], "has not ended .*x.incomplete"),
        (["adapter_config.json"], "holds an adapter .adapter_config.json. and no model"),
        (["model-00002-of-00003.safetensors"], "no model.safetensors.index.json|nor model.safetensors.index.json.*"
         "the shards that are missing .model-00001-of-00003.safetensors, model-00003"),
        (["x.safetensors"], "has x.safetensors, and neither .* if this file has the whole model, rename it to"),
        ([WEIGHTS, "y.safetensors"], f"has y.safetensors beside {WEIGHTS}, and no .*index.json: move such files away"),
    ],
)  # fmt: skip
def test_a_release_without_its_weights_is_refused_with_what_is_there_and_what_is_missing(names, message, folder):
    made = folder(*names, config={})
    if "adapter_config.json" in names:
        (made / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        open_checkpoint(made)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no config.json, so it is no checkpoint: it is empty; name the directory of"),
        (["notes.txt"], "it holds notes.txt; name the directory"),
        ([WEIGHTS], f"has no config.json, only weights .{WEIGHTS}.: download the config.json"),
        (["config.json.crdownload"], "its download has not ended"),
        (["snapshots/0ab/config.json"], "name the checkpoint in it: .*snapshots/0ab"),
        (["small/config.json"], "name the checkpoint in it: .*small"),
        (["state/_METADATA"], "only the arrays of a jaxtml checkpoint .state.: copy its config.json"),
    ],
)
def test_a_directory_without_a_config_is_refused_with_what_is_there(names, message, folder):
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder(*names))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "inkling2", "architectures": ["Inkling2ForConditionalGeneration"]}, "a later family"),
        ({"model_type": "inkling2_loop"}, "holds inkling2_loop, .* a later family than Inkling"),
        ({"text_config": {"model_type": "inkling2_text"}}, "a later family"),
        ({"architectures": ["InklingForCausalLM"]}, "the text model alone: jaxtml needs the towers"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "holds llama, .* which is no Inkling model"),
        ({"model_type": None, "architectures": "Qwen3MoeForCausalLM"}, "holds Qwen3MoeForCausalLM .* no Inkling model"),
    ],
)
def test_another_model_is_refused_by_its_name_whatever_weights_it_has(config, message, folder):
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder("pytorch_model.bin", config=config))


def test_a_release_that_names_no_architecture_is_read(release, folder):
    made = folder(config={"model_type": None, "architectures": None})
    shutil.copyfile(release / WEIGHTS, made / WEIGHTS)
    assert isinstance(open_checkpoint(made), ReleasedCheckpoint)


def test_an_adapter_alone_is_refused_and_beside_its_base_it_is_left_out_with_a_warning(release, tmp_path, caplog):
    for name in ("alone", "base"):
        if name == "base":
            shutil.copytree(release, tmp_path / name)
        (tmp_path / name).mkdir(exist_ok=True)
        save_file(ADAPTER, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text('{"base_model_name_or_path": "lab/Inkling-Small"}')
    assert "holds an adapter of lab/Inkling-Small (adapter_config.json, adapter_model.safetensors) and no model" in (
        message := refusal(tmp_path / "alone")
    )
    assert "does not read adapters: merge it into its base first" in message
    with caplog.at_level(logging.WARNING, "absl"):
        convert(tmp_path / "base", tmp_path / "out")
    assert (
        "does not read adapters, so the model is the base alone, without adapter_config.json, adapter_m" in caplog.text
    )
    assert not list((tmp_path / "out" / "released").glob("adapter*"))


def test_an_adapter_of_any_name_is_known_by_its_tensors(folder):
    made = folder(config={})
    save_file(ADAPTER, made / "mine.safetensors")
    assert "holds an adapter (mine.safetensors) and no model" in refusal(made)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_pointer_of_git_lfs_is_no_file_of_a_checkpoint(name, release, tmp_path):
    shutil.copytree(release, tmp_path / "clone")
    (tmp_path / "clone" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` in" in refusal(tmp_path / "clone")


def test_a_link_to_a_missing_file_is_named(folder):
    made = folder(config={})
    (made / WEIGHTS).symlink_to("../blobs/0ab")
    assert f"{WEIGHTS} is a link to a file that is missing, ../blobs/0ab: download it again" in refusal(made)


def test_a_run_of_the_vocoder_is_refused_with_what_it_is_good_for(folder):
    made = folder("training.json", "config.json", "checkpoints/100/state/_METADATA")
    assert "is a run of the vocoder alone: give it to a model with `jaxtml train CONFIG --vocoder`" in refusal(made)


@pytest.mark.parametrize("name", ["config.json", "state/_METADATA"])
def test_a_jaxtml_checkpoint_of_pointers_is_named_as_such(name, release, tmp_path):
    convert(release, tmp_path / "ours")
    (tmp_path / "ours" / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert f"{name} is a Git LFS pointer" in refusal(tmp_path / "ours")


def test_a_file_or_a_step_of_a_run_is_refused_with_the_directory_to_name(release, tmp_path):
    assert "is a file: name the directory" in refusal(release / WEIGHTS)
    step = tmp_path / "run" / "checkpoints" / "300"
    (step / "state").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for inside in (step, step.parent):
        assert f"the training run {tmp_path / 'run'}" in refusal(inside)
