"""`jaxtml logits` writes the logits of the model, and refuses tokens outside its vocabulary."""

from __future__ import annotations

import numpy as np


def test_logits_depend_on_earlier_tokens_alone_and_bad_tokens_are_refused(jaxtml, refusal, checkpoint, small, tmp_path):
    ids = np.random.default_rng(0).integers(0, small.backbone.vocab_size, (2, 30))
    np.save(tmp_path / "ids.npy", ids)
    argv = ("logits", "--checkpoint", checkpoint, "--out", tmp_path / "logits.npy", "--tokens")
    status, _, _ = jaxtml(*argv, tmp_path / "ids.npy")
    logits = np.load(tmp_path / "logits.npy")
    assert status == 0
    assert logits.shape == (2, 30, small.backbone.vocab_size)
    assert logits.dtype == np.float32
    np.save(tmp_path / "one.npy", ids[0, :10])
    jaxtml(*argv, tmp_path / "one.npy")
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy")[0], logits[0, :10], atol=1e-4)
    np.save(tmp_path / "big.npy", ids + 1000)
    assert "must lie in 0..299" in refusal(*argv, tmp_path / "big.npy")
    np.save(tmp_path / "float.npy", ids * 1.0)
    assert "integer array" in refusal(*argv, tmp_path / "float.npy")
    assert "cannot write /dev/full: No space left on device; name another" in refusal(
        *argv[:4], "/dev/full", "--tokens", tmp_path / "one.npy"
    )
    assert "absent.npy: write the token ids with numpy.save, and" in refusal(*argv, tmp_path / "absent.npy")
    assert "argument --tokens: https://a/b.npy is an address" in refusal(*argv, "https://a/b.npy")


def test_logits_on_a_mesh_are_those_of_one_device(jaxtml, refusal, checkpoint, small, tmp_path):
    ids = np.random.default_rng(0).integers(0, small.backbone.vocab_size, (3, 30))
    np.save(tmp_path / "ids.npy", ids)
    argv = ("logits", "--checkpoint", checkpoint, "--tokens", tmp_path / "ids.npy", "--out")
    assert jaxtml(*argv, tmp_path / "one.npy")[0] == 0
    assert jaxtml(*argv, tmp_path / "mesh.npy", "--mesh", "data=2,expert=4")[0] == 0
    one, mesh_logits = np.load(tmp_path / "one.npy"), np.load(tmp_path / "mesh.npy")
    np.testing.assert_allclose(mesh_logits, one, atol=1e-3)
    assert "needs 2 devices, there are 8" in refusal(*argv, tmp_path / "mesh.npy", "--mesh", "tensor=2")
    assert "there is no axis 'experts'" in refusal(*argv, tmp_path / "mesh.npy", "--mesh", "experts=2")
    assert "let the name end in .npy" in refusal(*argv, tmp_path / "mesh.csv")


def test_logits_that_are_not_finite_are_reported(jaxtml, checkpoint, tmp_path, monkeypatch, caplog):
    np.save(tmp_path / "ids.npy", np.arange(3))
    monkeypatch.setattr("jaxtml.convert.logits.text_logits", lambda *_: np.full((1, 3, 5), np.nan, np.float32))
    status, _, _ = jaxtml(
        "logits", "--checkpoint", checkpoint, "--tokens", tmp_path / "ids.npy", "--out", tmp_path / "l.npy"
    )
    assert status == 0 and "the logits have NaN or infinite values; `jaxtml convert" in caplog.text
