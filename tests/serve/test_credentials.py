"""Keys and certificate: read at the start, read again, and refused in one line that names the option and the remedy."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from jaxtml.errors import InputError
from jaxtml.serve.credentials import Credentials
from jaxtml.serve.sessions.errors import Refused

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Makes a self-signed certificate for `name`, and returns its file and that of its private key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}"]
    command = ["openssl", *made, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


def served_certificate(tls: ssl.SSLContext) -> bytes:
    """Returns the certificate that a client of a new connection gets, in DER."""
    near, far = socket.socketpair()
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE

    def answer() -> None:
        with tls.wrap_socket(far, server_side=True) as server:
            server.read(1)

    thread = threading.Thread(target=answer)
    thread.start()
    with trusting.wrap_socket(near) as client:
        certificate = client.getpeercert(binary_form=True)
        client.write(b"x")
        thread.join()
    assert certificate is not None
    return certificate


def der(certificate: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(certificate.read_text())


def test_files_are_read_again_and_a_wrong_file_changes_nothing(tmp_path):
    (old, old_key), (new, new_key) = (make_certificate(tmp_path, name) for name in ("old", "new"))
    keys, certificate, key = (tmp_path / name for name in ("keys.json", "cert.pem", "key.pem"))
    keys.write_text(json.dumps({"keys": [{"name": "a", "key": "sk-first-key"}]}))
    shutil.copy(old, certificate)
    shutil.copy(old_key, key)
    credentials = Credentials(keys, certificate, key)
    access, tls = credentials.access, credentials.tls
    assert tls is not None and served_certificate(tls) == der(old)
    keys.write_text(json.dumps({"keys": [{"name": "a", "key": "sk-second-key"}]}))
    shutil.copy(new, certificate)  # half a renewal: the key is still the old one
    with pytest.raises(InputError, match="the private key is that of another certificate"):
        credentials.reload()
    assert served_certificate(tls) == der(old) and access.authenticate("sk-first-key").key.name == "a"
    shutil.copy(new_key, key)
    credentials.reload()
    assert served_certificate(tls) == der(new) and access.authenticate("sk-second-key").key.name == "a"
    with pytest.raises(Refused):
        access.authenticate("sk-first-key")


def test_files_that_cannot_be_used_are_one_line_that_names_the_option(tmp_path):
    certificate, key = make_certificate(tmp_path, "good")
    locked, text, missing = tmp_path / "locked.key", tmp_path / "text.pem", tmp_path / "missing.pem"
    command = ["openssl", "pkey", "-in", str(key), "-aes128", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    text.write_text("no certificate")
    for options, says in (
        ((None, missing, None), f"--tls-cert {missing}: No such file"),
        ((None, certificate, missing), f"--tls-key {missing}: No such file"),
        ((None, tmp_path, None), f"--tls-cert {tmp_path}: Is a directory"),
        ((None, text, None), f"--tls-cert {text}: no certificate with its private key"),
        ((None, certificate, None), "no certificate with its private key"),
        ((None, certificate, locked), f"--tls-key {locked}: the private key is encrypted: decrypt it"),
        ((None, None, key), "--tls-key needs --tls-cert too"),
        ((tmp_path, None, None), f"no keys in {tmp_path}"),
    ):
        with pytest.raises(InputError) as error:
            Credentials(*options)
        assert says in str(error.value) and "\n" not in str(error.value)
