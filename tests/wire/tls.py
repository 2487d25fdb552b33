"""A throw-away CA and a leaf for localhost and 127.0.0.1, and the TLS context made of them.

Both are valid from 2020 to 2120, made once with the openssl command line. Both pass VERIFY_X509_STRICT, the
default since Python 3.13. The key guards nothing.
"""

from __future__ import annotations

import atexit
import functools
import pathlib
import ssl
import tempfile
from typing import Any

CA_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBkTCCATegAwIBAgIBATAKBggqhkjOPQQDAjAdMRswGQYDVQQDDBJxb28tYnJp
ZGdlIHRlc3QgQ0EwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMB0x
GzAZBgNVBAMMEnFvby1icmlkZ2UgdGVzdCBDQTBZMBMGByqGSM49AgEGCCqGSM49
AwEHA0IABCpIKlsnjC3px5g9BEQOsr4/t02U6ovp9mhjgOwtGGNkTpf4bR4Ubj6G
4BF66kFL57V5UfR8RqmjMqXmGDN3G8+jZjBkMBIGA1UdEwEB/wQIMAYBAf8CAQAw
DgYDVR0PAQH/BAQDAgEGMB0GA1UdDgQWBBSj4qf8TGFhckrhcghY8laJHW/bpjAf
BgNVHSMEGDAWgBSj4qf8TGFhckrhcghY8laJHW/bpjAKBggqhkjOPQQDAgNIADBF
AiEA6GXToy1cBzygFWbT47YcooGjaLENDhYNa/EVfN63uXUCIEO9hVyziMcYuOdw
jni7O4QVwtCi2KaQAAHwkavtWWSb
-----END CERTIFICATE-----
"""

LEAF_PEM = """\
-----BEGIN CERTIFICATE-----
MIIBtTCCAVugAwIBAgIBAjAKBggqhkjOPQQDAjAdMRswGQYDVQQDDBJxb28tYnJp
ZGdlIHRlc3QgQ0EwIBcNMjAwMTAxMDAwMDAwWhgPMjEyMDAxMDEwMDAwMDBaMBQx
EjAQBgNVBAMMCWxvY2FsaG9zdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABIej
F8xsc+qW+jQrBgd75B/2XQtZgkc9fHdmykf1wEgXzAQSpeHjeTdzXBshlzqr5/is
L3KiUrQ8BF4lCwbLXUajgZIwgY8wDAYDVR0TAQH/BAIwADAOBgNVHQ8BAf8EBAMC
B4AwEwYDVR0lBAwwCgYIKwYBBQUHAwEwHQYDVR0OBBYEFBHNP5Iz74oBYCVAKS+N
/AHA93VpMB8GA1UdIwQYMBaAFKPip/xMYWFySuFyCFjyVokdb9umMBoGA1UdEQQT
MBGCCWxvY2FsaG9zdIcEfwAAATAKBggqhkjOPQQDAgNIADBFAiEAgSxcw1BTgBJn
9F523ygDlKxcZwwpNQVSbUqPRJ01JJMCIB6itoS2PCu3GENzkwQzXHXI2tTC8Rc5
EtDkDqYSVL7V
-----END CERTIFICATE-----
"""

LEAF_KEY_PEM = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgRfwcKVTGVxTZZUG4
9HRoSa0G3lAQ8zBj3xa4PC0aoHOhRANCAASHoxfMbHPqlvo0KwYHe+Qf9l0LWYJH
PXx3ZspH9cBIF8wEEqXh43k3c1wbIZc6q+f4rC9yolK0PAReJQsGy11G
-----END PRIVATE KEY-----
"""


@functools.cache
def certificates() -> pathlib.Path:
    """Return a folder with ca.pem, leaf.pem and leaf.key; it goes with the process."""
    held = tempfile.TemporaryDirectory(prefix="wire-")
    atexit.register(held.cleanup)
    folder = pathlib.Path(held.name)
    for name, pem in (("ca.pem", CA_PEM), ("leaf.pem", LEAF_PEM), ("leaf.key", LEAF_KEY_PEM)):
        folder.joinpath(name).write_text(pem, "ascii")
    return folder


class ServerSocket(ssl.SSLSocket):
    """A socket whose peer may be gone before the handshake: up to 3.12 wrap_socket() leaves one open then."""

    def getpeername(self) -> Any:
        """Return the peer's address, "" for one that is gone: the handshake finds that out, and closes."""
        try:
            return super().getpeername()
        except OSError:
            return ""


@functools.cache
def server_context() -> ssl.SSLContext:
    """Return the TLS context of every stand-in: to read a key costs more than to open a port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates() / "leaf.pem", certificates() / "leaf.key")
    context.set_alpn_protocols(["http/1.1"])
    context.sslsocket_class = ServerSocket
    return context
