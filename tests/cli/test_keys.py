"""The commands for API keys and backups."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from manyicl.cli.main import app
from manyicl.errors import UserError
from manyicl.server.database import HMAC_FILE_NAME, Database
from manyicl.server.keys import KeyStore


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_key_that_was_made_is_valid_and_is_the_only_output(tmp_path: Path) -> None:
    limits = ["--requests-per-minute", "60"]
    output = run("keys", "create", "--data", tmp_path, "--owner", "support", "--scope", "predict", *limits)
    database = Database.open(tmp_path)
    caller = KeyStore(database, tmp_path).caller_of(output.removesuffix("\n"))
    database.close()
    assert caller is not None
    assert (caller.owner, sorted(caller.scopes), caller.requests_per_minute) == ("support", ["predict"], 60)


def test_a_list_of_keys_says_what_each_is_but_not_the_key(tmp_path: Path) -> None:
    keys = [run("keys", "create", "--data", tmp_path, "--owner", owner, "--name", "a [b] c") for owner in "xy"]
    run("keys", "revoke", keys[0].split("_")[1], "--data", tmp_path)
    lines = run("keys", "list", "--data", tmp_path).splitlines()
    fields = [line.split("\t") for line in lines]
    assert [(one[0], one[1], one[2], one[4].split()[0], one[6]) for one in fields] == [
        (keys[0].split("_")[1], "x", "manage,predict", "revoked", "a [b] c"),
        (keys[1].split("_")[1], "y", "manage,predict", "valid", "a [b] c"),
    ]
    for key in keys:
        assert key.split("_", 2)[2].strip() not in "".join(lines)


def test_a_name_can_neither_end_a_line_of_the_list_nor_steer_the_terminal(tmp_path: Path) -> None:
    run("keys", "create", "--data", tmp_path, "--owner", "a\tb\nc", "--name", "\x1b[31mred \u202e")
    (line,) = run("keys", "list", "--data", tmp_path).splitlines()
    fields = line.split("\t")
    assert (fields[1], fields[6]) == (r"a\tb\nc", r"\x1b[31mred \u202e")


def test_a_backup_without_the_secret_of_its_keys_is_restored_with_a_warning(tmp_path: Path) -> None:
    run("keys", "create", "--data", tmp_path / "data", "--owner", "x")
    (tmp_path / "data" / HMAC_FILE_NAME).unlink()
    run("backup", "--data", tmp_path / "data", "-o", tmp_path / "b.tar.gz")
    restored = CliRunner().invoke(app, ["restore", str(tmp_path / "b.tar.gz"), "--data", str(tmp_path / "restored")])
    assert restored.exit_code == 0
    assert "API keys without the secret that checks them: none is valid." in restored.stderr


def test_a_wrong_folder_or_id_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    wrong: tuple[tuple[list[str | Path], str], ...] = (
        (["list", "--data", tmp_path / "none"], "database_missing"),
        (["revoke", "none", "--data", tmp_path / "none"], "database_missing"),
        (["list", "--data", tmp_path, "--database", "mysql://host/name"], "wrong_database_url"),
    )
    for arguments, code in wrong:
        with pytest.raises(UserError) as error:
            run("keys", *arguments)
        assert error.value.code == code
    assert not (tmp_path / "none").exists()


def test_a_backup_is_written_and_restored(tmp_path: Path) -> None:
    key = run("keys", "create", "--data", tmp_path / "data", "--owner", "x").strip()
    assert run("backup", "--data", tmp_path / "data", "-o", tmp_path / "b.tar.gz").endswith("b.tar.gz: 0 tasks\n")
    run("restore", tmp_path / "b.tar.gz", "--data", tmp_path / "restored")
    assert key.split("_")[1] in run("keys", "list", "--data", tmp_path / "restored")


def test_without_the_libraries_of_the_server_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyicl.cli.options.find_spec", lambda name: None if name == "alembic" else name)
    with pytest.raises(UserError) as error:
        run("keys", "list", "--data", tmp_path)
    assert (error.value.code, "manyicl[server]" in str(error.value)) == ("missing_library", True)
