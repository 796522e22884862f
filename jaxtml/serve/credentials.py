"""The files that say who may use a server and who it is: the API keys, the TLS certificate and its private key.

Called by `serve.serving`, which reads the files at the start and again after SIGHUP. Everything in the files is checked
before anything is replaced, so a wrong file changes nothing.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from jaxtml.errors import InputError
from jaxtml.serve.protocols.registry import PROTOCOLS
from jaxtml.serve.sessions.access import Access


class Credentials:
    """The credentials of one server.

    Args:
      keys: file of API keys, see `serve.sessions.access`; None: no keys.
      certificate: TLS certificate chain, PEM; None: plain HTTP.
      private_key: private key of the certificate, PEM; None: it is in the certificate's file.

    Attributes:
      access: the keys and what they have used.
      tls: context for the server's listener; None: plain HTTP.

    Raises:
      InputError: a file cannot be used.
    """

    def __init__(self, keys: Path | None, certificate: Path | None, private_key: Path | None):
        self.keys, self.certificate, self.private_key = keys, certificate, private_key
        self.access, self.tls = self._read()

    @property
    def has_files(self) -> bool:
        """Whether there is a file to read again."""
        return self.keys is not None or self.certificate is not None

    def reload(self) -> None:
        """Reads all files again.

        From then on the new keys decide which requests are allowed, and new connections get the new certificate.

        Sessions go on, also those of keys that are no longer in the file, and what a key has used stays counted.

        Raises:
          InputError: a file cannot be used. All old credentials then stay in force.
        """
        access, _ = self._read()
        if self.keys is not None:
            self.access.replace_keys(access)
        if self.tls is not None and self.certificate is not None:
            _load_chain(self.tls, self.certificate, self.private_key)

    def _read(self) -> tuple[Access, ssl.SSLContext | None]:
        access = Access() if self.keys is None else Access.load(self.keys, PROTOCOLS)
        if self.certificate is None:
            if self.private_key is not None:
                raise InputError("--tls-key needs --tls-cert too")
            return access, None
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        _load_chain(tls, self.certificate, self.private_key)
        return access, tls


def _load_chain(tls: ssl.SSLContext, certificate: Path, private_key: Path | None) -> None:
    """Loads a certificate chain and its key. Raises `InputError`, which names the option, if a file cannot be used."""
    for option, path in (("--tls-cert", certificate), ("--tls-key", private_key)):
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            raise InputError(
                f"{option} {path}: {error.strerror}; give a file in PEM that this user may read"
            ) from error
    option, path = ("--tls-cert", certificate) if private_key is None else ("--tls-key", private_key)

    def refuse_password() -> str:
        # Without this function OpenSSL would wait for a password at the terminal.
        raise InputError(f"{option} {path}: the private key is encrypted: decrypt it, for example with openssl pkey")

    try:
        tls.load_cert_chain(certificate, private_key, refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InputError(f"{option} {path}: the private key is that of another certificate") from error
        where = f"{certificate} and {private_key}" if private_key else str(certificate)
        text = f"no certificate with its private key in PEM can be read from {where} ({error.reason or error})"
        raise InputError(f"--tls-cert {certificate}: {text}") from error
