"""API keys: how they are read from a file, found, and what a wrong file is told."""

import hashlib

import pytest

from octavo_engine.errors import InvalidConfig
from octavo_server import ServerSettings
from octavo_server.keys import ApiKey, KeyRing, read_keys

DIGEST = hashlib.sha256(b"sk-bob").hexdigest()
FILE = f"""
[keys.alice]
key = "sk-alice"
requests_per_minute = 60
tokens_per_minute = 1000
max_concurrent_requests = 2
share = 2.5

[keys."bob smith"]
key_sha256 = "{DIGEST}"
"""


def test_a_file_of_keys_is_read(tmp_path):
    (tmp_path / "keys.toml").write_text(FILE)
    alice, bob = read_keys(tmp_path / "keys.toml")
    assert (alice.name, alice.requests_per_minute, alice.tokens_per_minute) == ("alice", 60, 1000)
    assert (alice.max_concurrent_requests, alice.share) == (2, 2.5)
    assert (bob.name, bob.requests_per_minute, bob.share) == ("bob smith", None, 1.0)
    ring = KeyRing([alice, bob], "sk-admin")
    assert ring.find("sk-alice") is alice
    assert ring.find("sk-bob") is bob
    assert ring.find("sk-admin") is ring.admin
    assert ring.find("sk-carol") is ring.find("") is None
    assert "sk-" not in repr(alice)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys = [", "cannot read API keys"),
        ("", "must hold a table"),
        ("[keys]", "must hold a table"),
        ("other = 1\n[keys.a]\nkey = 'x'", "must hold a table"),
        ("[keys]\na = 'sk'", "key 'a' must be a table"),
        ("[keys.a]\nkey = 'x'\nrpm = 5", "key 'a' must be a table of key, key_sha256, share, requests_per_minute"),
        ("[keys.a]\nshare = 1", "key 'a' needs either key or key_sha256"),
        ("[keys.a]\nkey = ''", "key 'a' needs either"),
        ("[keys.a]\nkey = 7", "key 'a' needs either"),
        ("[keys.a]\nkey = 'x'\nkey_sha256 = 'y'", "key 'a' needs either"),
        ("[keys.a]\nkey_sha256 = 'zz'", "64 hexadecimal digits"),
        ("[keys.a]\nkey_sha256 = 'abcd'", "64 hexadecimal digits"),
        ("[keys.a]\nkey = 'x'\nrequests_per_minute = 0", "requests_per_minute of key 'a' must be a whole number"),
        ("[keys.a]\nkey = 'x'\ntokens_per_minute = true", "tokens_per_minute of key 'a' must be a whole number"),
        ("[keys.a]\nkey = 'x'\nmax_concurrent_requests = 1.5", "must be a whole number above 0, got 1.5"),
        ("[keys.a]\nkey = 'x'\nshare = 0", "share of key 'a' must be a number above 0"),
        ("[keys.a]\nkey = 'x'\nshare = nan", "share of key 'a' must be a number above 0"),
    ],
    ids=lambda v: repr(v)[:40],
)
def test_a_wrong_file_is_refused_and_the_key_named(tmp_path, text, message):
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(InvalidConfig, match=message):
        read_keys(tmp_path / "keys.toml")


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(InvalidConfig, match=r"cannot read API keys from .*none.toml"):
        read_keys(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_keys": ("a",), "admin_api_key": "a"}, "'key-1' and 'admin' have the same digest"),
        ({"api_keys": ("a",), "named_keys": (ApiKey.of("bob", "a"),)}, "'key-1' and 'bob' have the same digest"),
        ({"named_keys": (ApiKey.of("bob", "a"), ApiKey.of("bob", "b"))}, "have the same name"),
        ({"named_keys": (ApiKey.of("admin", "a"),), "admin_api_key": "b"}, "have the same name"),
        ({"admin_api_key": ""}, "admin_api_key must not be empty"),
    ],
    ids=["admin's", "twice", "one name", "named admin", "empty"],
)
def test_keys_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InvalidConfig, match=message):
        ServerSettings(**settings)
