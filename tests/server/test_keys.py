"""API keys."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from manyicl.errors import MachineError, UserError
from manyicl.server.database import FILE_NAME, HMAC_FILE_NAME, Database
from manyicl.server.keys import KeyStore
from manyicl.server.records import Caller


@pytest.fixture(name="data")
def _data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture(name="store")
def _store(database: Database, data: Path) -> KeyStore:
    return KeyStore(database, data)


def test_a_key_opens_what_it_was_made_for(store: KeyStore) -> None:
    assert not store.has_keys()
    key, record = store.create("ann", "laptop", ["predict"], requests_per_minute=60, rows_per_minute=1_000)
    assert store.caller_of(key) == Caller("ann", frozenset({"predict"}), record.id, 60, 1_000)
    assert key.startswith(f"mk_{record.id}_")
    assert list(store.list()) == [record]
    assert store.has_keys()


@pytest.mark.parametrize("owner", ["", " "])
def test_an_owner_has_a_name(store: KeyStore, owner: str) -> None:
    with pytest.raises(UserError) as error:
        store.create(owner, "laptop")
    assert (error.value.code, error.value.field) == ("wrong_value", "owner")
    assert not store.has_keys()


def test_a_changed_key_opens_nothing(store: KeyStore) -> None:
    key, record = store.create("ann", "laptop")
    other, _ = store.create("bob", "phone")
    secret, other_secret = key.split("_", 2)[2], other.split("_", 2)[2]
    wrong = [key[:-1], key + "x", key.upper(), f"mk_{record.id}_{other_secret}", f"mk_{record.id}_", f"mk_{secret}", ""]
    for attempt in (*wrong, "mk__", f"sk_{record.id}_{secret}", key + "\0", key + "é", "x" * 10_000, f" {key}"):
        assert store.caller_of(attempt) is None


def test_a_revoked_key_opens_nothing_from_then_on(store: KeyStore) -> None:
    key, record = store.create("ann", "laptop")
    other, _ = store.create("ann", "phone")
    assert store.caller_of(key) is not None
    revoked = store.revoke(record.id)
    assert revoked.revoked_at is not None
    assert store.caller_of(key) is None
    assert store.caller_of(other) is not None
    assert store.revoke(record.id) == revoked
    with pytest.raises(UserError) as error:
        store.revoke("none")
    assert error.value.code == "unknown_key_id"


def test_the_secret_of_a_key_is_in_no_file(store: KeyStore, data: Path, database: Database) -> None:
    key, _ = store.create("ann", "laptop")
    database.close()
    secret = key.split("_", 2)[2].encode()
    assert not [path for path in data.iterdir() if secret in path.read_bytes()]


def test_the_secret_of_the_hmacs_is_readable_by_its_user_alone_and_made_once(store: KeyStore, data: Path) -> None:
    store.create("ann", "laptop")
    file = data / HMAC_FILE_NAME
    secret = file.read_bytes()
    assert (len(secret), stat.S_IMODE(file.stat().st_mode)) == (32, 0o600)
    store.create("ann", "phone")
    assert file.read_bytes() == secret
    assert not list(data.glob(f"{HMAC_FILE_NAME}-*"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes files for others")
def test_what_root_makes_in_the_folder_of_a_server_belongs_to_its_user(data: Path) -> None:
    data.mkdir()
    os.chown(data, 12_345, 12_346)
    database = Database.open(data)
    KeyStore(database, data).create("ann", "laptop")
    owners = {path.name: (path.stat().st_uid, path.stat().st_gid) for path in data.iterdir()}
    assert set(owners) == {FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm", HMAC_FILE_NAME}
    assert set(owners.values()) == {(12_345, 12_346)}
    database.close()


def test_without_the_secret_no_key_is_made_or_checked(store: KeyStore, database: Database, data: Path) -> None:
    key, record = store.create("ann", "laptop")
    (data / HMAC_FILE_NAME).unlink()
    store = KeyStore(database, data)
    with pytest.raises(MachineError, match=HMAC_FILE_NAME):
        store.caller_of(key)
    with pytest.raises(UserError) as error:
        store.create("ann", "phone")
    assert error.value.code == "hmac_key_missing"
    store.revoke(record.id)
    assert store.caller_of(store.create("ann", "phone")[0]) is not None
