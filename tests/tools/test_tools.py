"""Every tool prints help, refuses bad input in one line, and does its smallest real piece of work.

A tool runs inside the test's process where that is possible, because importing JAX takes longer than the work. Tools
that start servers, or that change the state of their process, run in a process of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from jaxtml import config as configs
from jaxtml.checkpoint.files import SHIPPED
from jaxtml.checkpoint.opening import read_checkpoint
from jaxtml.checkpoint.orbax.saving import save_checkpoint
from jaxtml.checkpoint.tokenizer import load_tokenizer
from jaxtml.data.bank import Bank
from jaxtml.data.talks import recorded_prompts
from jaxtml.model.duplex.grammar import max_generated
from jaxtml.model.interaction import InteractionModel
from jaxtml.model.spec import init_params
from jaxtml.plan.mix import parse_mix
from jaxtml.stream.timebase import SAMPLE_RATE
from tests.data.tones import write_data_folder
from tests.oracle import TORCHVISION, oracle_environment
from tests.plan import compilers

ROOT = Path(__file__).parents[2]
TOOLS = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "tools").rglob("*.py"))}
FORBIDDEN_FOLDERS = {".git", ".venv", "build", "dist", "out"}
INSTALL_COMMANDS = ("pip install", "apt-get install", "tools/install_voices")
MISSING = "/no/such/folder"

BAD_INPUT = {
    "tools/benchmarks/convert.py": ("--folder", MISSING),
    "tools/benchmarks/cpu_speed.py": ("--config", "no_such_config"),
    "tools/benchmarks/int8_error.py": ("--checkpoint", MISSING),
    "tools/benchmarks/load.py": ("--wav", MISSING),
    "tools/benchmarks/micro_turn_parts.py": ("--checkpoint", MISSING),
    "tools/benchmarks/long_session.py": ("--checkpoint", MISSING),
    "tools/benchmarks/plan_table.py": ("no-such-row",),
    "tools/benchmarks/session_mix.py": ("tiny", "--data", MISSING),
    "tools/benchmarks/session_latency.py": ("--checkpoint", MISSING),
    "tools/benchmarks/soak.py": ("--recording", MISSING),
    "tools/benchmarks/talk_memory.py": ("no_such_config", "--data", MISSING),
    "tools/benchmarks/vocoder.py": ("--checkpoint", MISSING),
    "tools/build_voice_bank.py": ("--out", "/dev/null/bank"),
    "tools/evaluate.py": ("--checkpoint", MISSING, "--out", MISSING),
    "tools/goldens/make_backbone_golden.py": ("--out", f"{MISSING}/backbone.npz"),
    "tools/goldens/make_frontend_golden.py": ("--out", f"{MISSING}/frontend.npz"),
    "tools/make_checkpoint.py": ("--workdir", MISSING, "--vocoder", MISSING, "--out", MISSING),
    "tools/make_demo_recording.py": ("--out", f"{MISSING}/human.flac"),
}


def run_here(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: str) -> int:
    """Runs a tool in this process and returns its exit status."""
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS[tool]), run_name="__main__")
    return end.value.code if isinstance(end.value.code, int) else int(end.value.code is not None)


def run(tool: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Runs a tool in a process of its own and returns its stdout. Skips the test if something is not installed."""
    command = [sys.executable, str(TOOLS[tool]), *arguments]
    environment = environment or {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last_line = (process.stderr.strip().splitlines() or [""])[-1]
    if process.returncode == 2 and any(command in last_line for command in INSTALL_COMMANDS):
        pytest.skip(last_line.partition(": ")[2])
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> str:
    """Six micro-turns of the demo's recording."""
    wave, _ = soundfile.read(SHIPPED.parent / "demo" / "human.flac", dtype="float32")
    path = tmp_path_factory.mktemp("recording") / "short.wav"
    soundfile.write(path, wave[: 6 * SAMPLE_RATE // 5], SAMPLE_RATE)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained `tiny` of two layers, which compiles faster than the shipped one. It never speaks."""
    layers = ("backbone.n_layers=2", "backbone.n_dense=1", "backbone.global_layers=[1]", "flow.depth=1")
    config = configs.load("tiny", [*layers, "vocoder.depth=1", "duplex.gate_threshold=1.0"])
    folder = tmp_path_factory.mktemp("checkpoint") / "two_layers"
    params = init_params(InteractionModel(config).specs(), 0)
    save_checkpoint(folder, config, params, "float32", SHIPPED / "tokenizer.json")
    return folder


# --- all tools


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_can_be_started_and_its_help_has_an_example(tool, monkeypatch, capsys):
    assert TOOLS[tool].read_text().startswith("#!/usr/bin/env python3\n") and os.access(TOOLS[tool], os.X_OK)
    assert run_here(monkeypatch, tool, "--help") == 0
    assert f"example: {tool} " in capsys.readouterr().out


@pytest.mark.parametrize("tool", TOOLS)
def test_bad_input_is_one_line_and_exit_status_2(tool, monkeypatch, capsys):
    assert run_here(monkeypatch, tool, *BAD_INPUT[tool]) == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith(f"{Path(tool).name}: ") and len(last_line) > len(tool) + 2


def test_every_tool_has_a_test_that_runs_it():
    assert BAD_INPUT.keys() == TOOLS.keys()
    lacking = [tool for tool, path in TOOLS.items() if f"test_{path.stem}_runs" not in globals()]
    assert not lacking


def test_every_python_file_ends_in_py_and_no_tool_exists_twice():
    unnamed = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in FORBIDDEN_FOLDERS and not name.endswith(".egg-info")]
        for name in files:
            path = Path(folder) / name
            if path.suffix == "" and path.is_file():
                with path.open("rb") as file:
                    first_line = file.readline(200)
                if first_line.startswith(b"#!") and b"python" in first_line:
                    unnamed.append(str(path.relative_to(ROOT)))
    assert not unnamed, "Python files without .py are neither linted nor type-checked"
    stems = [path.stem for path in (ROOT / "tools").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sorted(stems) == sorted(set(stems))


# --- one by one


def test_convert_runs(monkeypatch, capsys, tmp_path):
    arguments = ("--pairs", "1", "--gigabytes", "0.1", "--folder", str(tmp_path), "--json")
    assert run_here(monkeypatch, "tools/benchmarks/convert.py", *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] > 1e8 and result["orbax_s"] > 0 and result["hf_bytes"] >= 0


@pytest.mark.oracle
def test_cpu_speed_runs(releasable, tmp_path):
    b = releasable.backbone
    everything = dataclasses.replace(b.global_, window=512, pinned=0, retained=0)  # all tokens of a row are visible
    backbone = dataclasses.replace(b, n_layers=2, global_layers=(1,), global_=everything, mtp_heads=0, mtp_global=())
    (tmp_path / "config.json").write_text(configs.to_json(dataclasses.replace(releasable, backbone=backbone)))
    arguments = ("--config", str(tmp_path / "config.json"), "--rounds", "1", "--json")
    result = json.loads(run("tools/benchmarks/cpu_speed.py", *arguments, environment=oracle_environment()))
    assert result["logits_relative_error"] < 1e-5
    assert result["training_tokens_per_s"]["ratio"] > 0 and result["micro_turns_per_s"]["ratio"] > 0


def test_int8_error_runs(monkeypatch, capsys):
    assert run_here(monkeypatch, "tools/benchmarks/int8_error.py") == 0
    assert "the likeliest token is the same at 100.0%" in capsys.readouterr().out


def test_load_runs(tmp_path, checkpoint):
    arguments = ("--sessions", "2", "--seconds", "2", "--ramp", "0.5", "--out", str(tmp_path))
    run("tools/benchmarks/load.py", *arguments, "--", "--checkpoint", str(checkpoint))
    result = json.loads((tmp_path / "loadtest.json").read_text())
    assert result["ticks"] > 0 and result["gap_s"] and not result["failures"]
    assert (tmp_path / "loadtest.png").is_file()


def test_micro_turn_parts_runs(monkeypatch, capsys, recording, checkpoint):
    arguments = ("--rounds", "2", "--recording", recording, "--checkpoint", str(checkpoint), "--json")
    assert run_here(monkeypatch, "tools/benchmarks/micro_turn_parts.py", *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["micro_turns"]["listens"]["passes"] == 1 and all(ms > 0 for ms in result["parts_ms"].values())


def test_long_session_runs(monkeypatch, capsys, recording, checkpoint):
    """Eighteen seconds: the request leaves the window, and is attended to beyond it."""
    arguments = ("--hours", "0.005", "--talk", "0.1", "--window", "256", "--retained", "4096", "--json")
    arguments += ("--recording", recording, "--checkpoint", str(checkpoint))
    assert run_here(monkeypatch, "tools/benchmarks/long_session.py", *arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["parts"]) == 10 and result["micro_turns"] == 90
    assert result["request_tokens_back"] > 256 and all(0 < share < 1 for share in result["attention_to_request"])


@pytest.mark.skipif(not compilers.LIBTPU, reason="needs libtpu: pip install -e '.[plan]'")
def test_plan_table_runs(small, tmp_path):
    b = small.backbone  # the row splits heads over four devices
    kinds = {name: dataclasses.replace(getattr(b, name), n_heads=4, n_kv_heads=4) for name in ("sliding", "global_")}
    backbone = dataclasses.replace(b, n_layers=2, global_layers=(1,), **kinds)
    config = dataclasses.replace(small, backbone=backbone, vocoder=dataclasses.replace(small.vocoder, depth=1))
    (tmp_path / "config.json").write_text(configs.to_json(config))
    arguments = ("--config", str(tmp_path / "config.json"), "serve-tpu7x-16")
    row = run("tools/benchmarks/plan_table.py", *arguments, environment=compilers.environment())
    assert row.startswith("| serve-tpu7x-16 | tpu7x:2x2x2 | ") and "listening, speaking, longest" in row


def test_session_latency_runs(recording, checkpoint):
    arguments = ("--warm-runs", "1", "--recording", recording, "--checkpoint", str(checkpoint), "--json")
    result = json.loads(run("tools/benchmarks/session_latency.py", *arguments))
    assert result["first_turn_warm_s"] > 0 and 0 < result["step_ms_median"] <= result["step_ms_worst"]


def test_session_mix_runs(monkeypatch, capsys, small, codec, tmp_path):
    write_data_folder(tmp_path, codec)
    (tmp_path / "config.json").write_text(configs.to_json(small))
    arguments = (str(tmp_path / "config.json"), "--data", str(tmp_path), "--rows", "3", "--confirmed", "1.5")
    arguments += ("--set", "data.longest_silence=1")  # rows of training may leave out silence, a session does not
    capsys.readouterr()  # the progress of the data folder
    assert run_here(monkeypatch, "tools/benchmarks/session_mix.py", *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < sum(turn["count"] for turn in found["turns"]) <= 3 * small.data.turns  # rows may cut a talk off
    assert any(turn["speaks"] for turn in found["turns"])
    assert max(turn["written"] for turn in found["turns"]) <= max_generated(small.duplex) - 1
    assert parse_mix("", found).confirmed == 1.5


def test_soak_runs(recording, checkpoint):
    arguments = ("--minutes", "0.01", "--cycles", "2", "--recording", recording, "--checkpoint", str(checkpoint))
    session, cycles = _json_values(run("tools/benchmarks/soak.py", *arguments))
    assert session["end_over_new"] > 0 and len(session["memory_mb_by_tenths"]) == 10
    assert cycles["cycles"] == 2 and cycles["sessions_left"] == 0


def test_talk_memory_runs(monkeypatch, capsys, tmp_path):
    write_data_folder(tmp_path, load_tokenizer(SHIPPED))
    arguments = ("tiny", "--data", str(tmp_path), "--conversations", "3", "--window", "256", "--json")
    arguments += ("--set", "backbone.global_.window=512", "--set", "backbone.global_.retained=0")
    assert run_here(monkeypatch, "tools/benchmarks/talk_memory.py", *arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])  # building the bank prints lines too
    assert 0 < result["rates"]["retained"] < result["rates"]["tokens"] / 2
    today, other = result["memories"]
    assert other["retained"] == 256 and other["talk_min"] > today["talk_min"] and other["window_s"] < today["window_s"]
    # The retained tokens' positions are all that the same number of tokens takes besides.
    assert 0 < other["state_bytes"] - today["state_bytes"] < 2000
    assert run_here(monkeypatch, "tools/benchmarks/talk_memory.py", *arguments, "--set", "data.tokens=7") == 2
    assert "3 conversations have no text: measure more" in capsys.readouterr().err


def test_vocoder_runs(tmp_path):
    result = json.loads(run("tools/benchmarks/vocoder.py", "--sentences", "1", "--json", "--out", str(tmp_path)))
    for name in ("own voice", "human"):
        assert result[name]["original"]["stoi"] > 0.99 > result[name]["vocoder, disturbed"]["stoi"] > 0.5
    assert len(list(tmp_path.rglob("*.wav"))) == 8


def test_build_voice_bank_runs(tmp_path):
    run("tools/build_voice_bank.py", "--out", str(tmp_path), "--sentences", "2", "--workers", "1")
    bank = Bank.open(tmp_path)
    assert bank.complete and [entry.planned.voice for entry in bank.entries] == 2 * ["kokoro:af_heart"]


@pytest.mark.skipif(not recorded_prompts.FOLDER.is_dir(), reason=recorded_prompts.INSTALL)
def test_evaluate_runs(checkpoint, tmp_path):
    arguments = ("--synthetic", "0", "--human", "1", "--listened", "1", "--out", str(tmp_path))
    run("tools/evaluate.py", "--checkpoint", str(checkpoint), *arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["material"]["human"] == 1 and results["rows"] and (tmp_path / "summary.png").is_file()


@pytest.mark.oracle
def test_make_backbone_golden_runs(tmp_path):
    made = tmp_path / "backbone.npz"
    run("tools/goldens/make_backbone_golden.py", "--out", str(made), environment=oracle_environment())
    with np.load(made) as ours, np.load(ROOT / "tests" / "golden" / "backbone.npz") as golden:
        assert ours.files == golden.files
        for name in set(golden.files) - {"made_by"}:
            np.testing.assert_allclose(ours[name], golden[name], atol=1e-5)


@pytest.mark.oracle
def test_make_frontend_golden_runs(tmp_path):
    made = tmp_path / "frontend.npz"
    run("tools/goldens/make_frontend_golden.py", "--out", str(made), environment=oracle_environment(TORCHVISION))
    with np.load(made) as ours, np.load(ROOT / "tests" / "golden" / "frontend.npz") as golden:
        assert sorted(ours.files) == sorted(golden.files)
        for name in set(golden.files) - {"versions", "log_mel_every_tenth"}:
            np.testing.assert_array_equal(ours[name], golden[name])


def test_make_checkpoint_runs(monkeypatch, tmp_path):
    workdir = shutil.copytree(SHIPPED, tmp_path / "run")
    shutil.copy(workdir / "training.jsonl", workdir / "log.jsonl")
    arguments = ("--workdir", str(workdir), "--vocoder", str(SHIPPED), "--out", str(tmp_path / "made"))
    assert run_here(monkeypatch, "tools/make_checkpoint.py", *arguments) == 0
    config, params = read_checkpoint(tmp_path / "made")
    assert config.name == "tiny" and "vocoder" in params
    for name in ("training.jsonl", "vocoder_training.jsonl", "tokenizer.json"):
        assert (tmp_path / "made" / name).read_bytes() == (SHIPPED / name).read_bytes()


@pytest.mark.skipif(not (recorded_prompts.FOLDER / "digits" / "3.g722").is_file(), reason=recorded_prompts.INSTALL)
def test_make_demo_recording_runs(monkeypatch, tmp_path):
    made = tmp_path / "human.flac"
    assert run_here(monkeypatch, "tools/make_demo_recording.py", "--out", str(made)) == 0
    ours, rate = soundfile.read(made)
    shipped, _ = soundfile.read(SHIPPED.parent / "demo" / "human.flac")
    assert rate == SAMPLE_RATE
    np.testing.assert_array_equal(ours, shipped)


def _json_values(text: str) -> list[dict[str, Any]]:
    """Returns the JSON objects that stand one after the other in `text`."""
    decoder, values, text = json.JSONDecoder(), [], text.strip()
    while text:
        value, end = decoder.raw_decode(text)
        values.append(value)
        text = text[end:].strip()
    return values
