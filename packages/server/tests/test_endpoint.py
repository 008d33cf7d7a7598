"""Where a server listens: TLS and Unix sockets."""

import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager, nullcontext

import httpx2
import pytest

from octavo_engine.errors import InvalidConfig
from octavo_server import create_app
from octavo_server.endpoint import Endpoint, Tls, tls_of
from octavo_server.serving import listen_at, listen_on, make_server


@contextmanager
def running(engine, endpoint):
    with listen_on(endpoint) as listening:
        server = make_server(create_app(engine), tls=endpoint.tls)
        server.capture_signals = nullcontext
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    """A folder with certificates that their own keys signed: `server.pem`, `client.pem`, each with `.key` beside."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    for name in ("server", "client"):
        key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        command = f"req -x509 {key} -days 2 -subj /CN={name} -addext subjectAltName=IP:127.0.0.1"
        files = ["-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"]
        subprocess.run([openssl, *command.split(), *files], check=True, capture_output=True)
    return folder


def context_of(pem, *, own=None):
    context = ssl.create_default_context(cafile=pem / "server.pem")
    if own:
        context.load_cert_chain(pem / f"{own}.pem", pem / f"{own}.key")
    return context


def test_https_is_served(engine, pem):
    tls = Tls(certfile=pem / "server.pem", keyfile=pem / "server.key")
    endpoint = Endpoint(host="127.0.0.1", port=0, tls=tls)
    with running(engine, endpoint) as listening:
        port = listening.getsockname()[1]
        assert endpoint.url(port) == f"https://127.0.0.1:{port}/v1"
        with httpx2.Client(base_url=f"https://127.0.0.1:{port}", verify=context_of(pem)) as client:
            assert client.post("/v1/completions", json={"prompt": "a"}).json()["choices"][0]["text"] == " Paris."
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"https://127.0.0.1:{port}/health")  # signed by nobody it knows


def test_clients_without_a_certificate_are_turned_away_where_one_is_asked_for(engine, pem):
    tls = Tls(certfile=pem / "server.pem", keyfile=pem / "server.key", ca_certs=pem / "client.pem")
    with running(engine, Endpoint(host="127.0.0.1", port=0, tls=tls)) as listening:
        url = f"https://127.0.0.1:{listening.getsockname()[1]}/health"
        assert httpx2.get(url, verify=context_of(pem, own="client")).status_code == 200
        for own in (None, "server"):
            with pytest.raises(httpx2.TransportError):
                httpx2.get(url, verify=context_of(pem, own=own))


def test_files_that_are_no_certificates_are_a_clear_error(pem, tmp_path):
    (tmp_path / "text").write_text("no pem")
    for options, message in (
        ({"certfile": tmp_path / "none"}, "cannot use .*none for TLS"),
        ({"certfile": tmp_path / "text"}, "expected PEM files"),
        ({"certfile": pem / "server.pem", "keyfile": pem / "client.key"}, "cannot use"),
        ({"certfile": pem / "server.pem", "keyfile": pem / "server.key", "ca_certs": tmp_path / "text"}, "cannot use"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            Tls(**options)


def test_an_encrypted_key_is_refused_and_not_asked_about(pem, tmp_path):
    command = ["openssl", "pkey", "-in", pem / "server.key", "-aes128", "-passout", "pass:secret"]
    subprocess.run([*command, "-out", tmp_path / "locked.key"], check=True, capture_output=True)
    with pytest.raises(InvalidConfig, match="is encrypted; give one without a passphrase"):
        Tls(certfile=pem / "server.pem", keyfile=tmp_path / "locked.key")


def test_a_key_without_a_certificate_is_refused(tmp_path):
    assert tls_of(None, None, None) is None
    with pytest.raises(InvalidConfig, match="go with --ssl-certfile"):
        tls_of(None, tmp_path, None)


def test_a_unix_socket_is_served_and_removed(engine, tmp_path):
    path = tmp_path / "s"
    endpoint = Endpoint(host="ignored", port=0, uds=path)
    assert endpoint.is_local
    assert endpoint.url(None) == f"unix:{path}"
    with running(engine, endpoint):
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://x") as client:
            assert client.get("/health").json() == {"status": "ok"}
        with pytest.raises(InvalidConfig, match="choose another --uds"), listen_at(path):
            pass  # somebody serves there
    assert not path.exists()


def test_a_unix_socket_that_nobody_serves_is_replaced(tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listen_at(path):
        assert path.is_socket()
    assert not path.exists()


def test_a_file_in_the_sockets_place_is_left_alone(tmp_path):
    (tmp_path / "s").write_text("mine")
    with pytest.raises(InvalidConfig, match="cannot listen on the Unix socket"), listen_at(tmp_path / "s"):
        pass
    assert (tmp_path / "s").read_text() == "mine"
