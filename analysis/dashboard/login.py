"""Who may log in: MLflow's basic authentication, set up so that users see nothing that nobody has given them."""

from __future__ import annotations

import configparser
import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from experiments.errors import UserError

# MLflow hashes a password for a fifth of a second, several times a request: a password that was right is believed for
# this long. One that is changed through this server counts at once.
_PASSWORD_KEPT_S = 300


@dataclass(frozen=True)
class Login:
    """``users`` is the URL of the database of users and roles. A file of MLflow's own settings that
    MLFLOW_AUTH_CONFIG_PATH names takes the place of ours."""

    users: str

    def check(self) -> None:
        """Raise UserError where the server could not start."""
        if find_spec("flask_wtf") is None:
            raise UserError("--auth: needs Flask-WTF: pip install 'mixlab[auth]'")
        file = Path(self.users.removeprefix("sqlite:///")) if self.users.startswith("sqlite:///") else None
        is_new = file is not None and (not file.exists() or file.stat().st_size == 0)
        if is_new and not os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD") and "MLFLOW_AUTH_CONFIG_PATH" not in os.environ:
            raise UserError(
                "--auth: there are no users yet; set MLFLOW_AUTH_ADMIN_PASSWORD (12 characters or more) for the first "
                "start, which makes the user `admin`"
            )
        if is_new and file is not None:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)  # the folder of runs, before the first run
                os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))  # hashes of passwords: for the owner alone
            except OSError as error:
                raise UserError(f"--auth-store {file}: can't be written: {error.strerror}") from None

    @contextlib.contextmanager
    def environment(self) -> Iterator[dict[str, str]]:
        """What the server's process must find in its environment; the file in it lives as long as this."""
        found = {"MLFLOW_FLASK_SERVER_SECRET_KEY": os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY")}
        found = {name: value or secrets.token_hex(32) for name, value in found.items()}
        if "MLFLOW_AUTH_CONFIG_PATH" in os.environ:
            yield found
            return
        settings = configparser.ConfigParser(interpolation=None)
        settings["mlflow"] = {
            "default_permission": "NO_PERMISSIONS",
            "database_uri": self.users,
            "admin_username": "admin",
            "auth_cache_ttl_seconds": str(_PASSWORD_KEPT_S),
        }
        with tempfile.NamedTemporaryFile("w", prefix="mixlab-", suffix=".ini") as file:  # readable by its owner alone
            settings.write(file)
            file.flush()
            yield {**found, "MLFLOW_AUTH_CONFIG_PATH": file.name}
