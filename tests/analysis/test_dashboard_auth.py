"""A team server as it is documented: PostgreSQL, a login, an admin, readers and a writer, over real HTTP."""

from __future__ import annotations

import base64
import json
import os
import signal
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from analysis.dashboard.login import Login
from analysis.dashboard.server import serve
from experiments.errors import UserError
from tests.analysis import planted
from tests.analysis.conftest import free_port, gone_within, processes_with, start_dashboard
from tests.stores import postgres

# on import of MLflow's server, which its client for users needs
pytestmark = pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi is deprecated")
PASSWORDS = {"admin": "an admin's password", "reader": "a reader's password", "writer": "a writer's password"}


class Team(NamedTuple):
    address: str
    runs: Path
    ids: dict[str, str]
    process: subprocess.Popen[str]

    def get(self, path: str, user: str | None, **more: Any) -> tuple[int, str]:
        return self.call("GET", path, user, **more)

    def call(
        self, method: str, path: str, user: str | None, body: Any = None, password: str | None = None
    ) -> tuple[int, str]:
        request = urllib.request.Request(f"{self.address}/{path}", method=method)
        if user is not None:
            pair = f"{user}:{password or PASSWORDS[user]}".encode()
            request.add_header("Authorization", "Basic " + base64.b64encode(pair).decode())
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    from experiments.tracking import prepare_store

    runs = tmp_path_factory.mktemp("team")
    with postgres() as uri, pytest.MonkeyPatch.context() as patch:
        prepare_store(uri, (runs / "artifacts").as_uri())
        ids = {}
        for name, arms in (("open", {"seen": "softmax"}), ("secret", {"hidden_arm": "my_secret_mixer"})):
            saved = planted.plan(name, arms=arms, pairs=(8,))
            ids[name] = planted.write_mlflow(uri, saved, (runs / "artifacts" / name).as_uri())
            planted.write_records(runs, saved)
        for mixer in ("softmax", "my_secret_mixer"):
            (runs / "checks").mkdir(exist_ok=True)
            row = {"name": mixer, "ok": True, "checks": [{"name": "config", "status": "passed", "message": ""}]}
            (runs / "checks" / f"{mixer}.json").write_text(json.dumps([row]))
        patch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", PASSWORDS["admin"])
        port = free_port()
        process = start_dashboard(
            *("--runs", str(runs), "--store", uri, "--port", str(port), "--static-prefix", "/lab", "--auth"),
            *("--allowed-hosts", "lab.example,127.0.0.1:*"),
        )
        try:
            found = Team(f"http://127.0.0.1:{port}/lab", runs, ids, process)
            give_roles(found, patch)
            yield found
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), said  # the last test kills it


def give_roles(team: Team, patch: pytest.MonkeyPatch) -> None:
    """As docs/team-server.md says."""
    from mlflow.server import get_app_client

    patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["admin"])
    access = get_app_client("basic-auth", tracking_uri=team.address)
    for user, permission in (("reader", "READ"), ("writer", "EDIT")):
        access.create_user(user, PASSWORDS[user])
        role = access.create_role("default", user + "s")
        access.add_role_permission(role.id, "experiment", team.ids["open"], permission)
        access.assign_role(user, role.id)


PAGES = ("sweeps", "compare", "mixers", "compare/static/compare.js", "compare/static/compare.css")
DATA = ("sweeps/data", "compare/sweeps", "compare/data?experiment=open", "mixers/data", "mixers/data?name=softmax")


def test_nothing_is_answered_without_a_login(team: Team) -> None:
    for path in ("", *PAGES, *DATA):
        assert team.get(path, None)[0] == 401, path
        assert team.get(path, "reader", password="a wrong password")[0] == 401, path


def test_a_reader_sees_pages_and_permitted_sweeps_and_no_trace_of_the_others(team: Team) -> None:
    for path in ("", *PAGES, *DATA):
        status, body = team.get(path, "reader")
        assert status == 200, path
        for word in ("secret", "hidden_arm"):
            assert word not in body.replace("flask_server_secret", "") or path == "", path
    assert [sweep["name"] for sweep in json.loads(team.get("sweeps/data", "reader")[1])] == ["open"]
    assert {sweep["name"] for sweep in json.loads(team.get("sweeps/data", "admin")[1])} == {"open", "secret"}


@pytest.mark.parametrize("named", ["secret", "by its id", "secre"])
def test_what_a_reader_may_not_see_is_as_if_it_were_not_there(team: Team, named: str) -> None:
    name = team.ids["secret"] if named == "by its id" else named
    for path in (
        "data?experiment={}",
        "runs?experiment={}&arm=hidden_arm&cell=n_pairs%3D8",
        "seeds?experiment={}&x=a&y=b",
    ):
        status, body = team.get("compare/" + path.format(name), "reader")
        absent_status, absent_body = team.get("compare/" + path.format("absent"), "reader")
        assert status == absent_status == 404
        assert body == absent_body.replace("absent", name)
    status, body = team.get("mixers/data?name=my_secret_mixer", "reader")
    assert (status, body) == (
        404,
        team.get("mixers/data?name=absent", "reader")[1].replace("absent", "my_secret_mixer"),
    )
    assert json.loads(team.get("mixers/data?name=my_secret_mixer", "admin")[1])["contract"]["ok"] is True


def test_what_an_admin_was_shown_is_not_kept_for_a_reader(team: Team) -> None:
    for _ in range(2):
        assert team.get("compare/data?experiment=secret", "admin")[0] == 200
        assert team.get("compare/data?experiment=secret", "reader")[0] == 404
        assert "secret" in team.get("sweeps/data", "admin")[1]
        assert "secret" not in team.get("sweeps/data", "reader")[1]


def test_a_permission_taken_away_counts_at_once(team: Team) -> None:
    from mlflow.server import get_app_client

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORDS["admin"])
        access = get_app_client("basic-auth", tracking_uri=team.address)
        access.grant_user_permission("writer", "experiment", team.ids["secret"], "READ")
        assert team.get("compare/data?experiment=secret", "writer")[0] == 200
        access.revoke_user_permission("writer", "experiment", team.ids["secret"])
    assert team.get("compare/data?experiment=secret", "writer")[0] == 404


def test_a_reader_writes_nothing_and_a_writer_only_where_allowed(team: Team) -> None:
    api = "api/2.0/mlflow"
    for user, name, expected in (
        ("reader", "open", 403),
        ("reader", "secret", 403),
        ("writer", "secret", 403),
        ("writer", "open", 200),
    ):
        run = {"experiment_id": team.ids[name], "start_time": 1_800_000_000_000, "tags": []}
        assert team.call("POST", f"{api}/runs/create", user, run)[0] == expected, (user, name)
        tag = {"experiment_id": team.ids[name], "key": "note", "value": "x"}
        assert team.call("POST", f"{api}/experiments/set-experiment-tag", user, tag)[0] == expected, (user, name)
    for user in ("reader", "writer"):
        assert team.call("POST", f"{api}/experiments/delete", user, {"experiment_id": team.ids["open"]})[0] == 403
        assert team.call("POST", f"{api}/users/create", user, {"username": "x", "password": "x" * 12})[0] == 403
    assert team.call("POST", f"{api}/experiments/create", "reader", {"name": "mine"})[0] == 403
    for path in ("sweeps", "compare/data", "mixers"):
        assert team.call("POST", path, "admin")[0] == 405
        assert team.call("POST", path, "reader")[0] in (403, 405)


def test_another_name_for_the_server_is_refused(team: Team) -> None:
    request = urllib.request.Request(f"{team.address}/sweeps", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    with caught.value:
        assert caught.value.code == 403


def test_the_database_of_users_is_its_owners_alone(team: Team) -> None:
    assert stat.S_IMODE(os.stat(team.runs / "auth.db").st_mode) == 0o600


def test_the_database_of_users_can_come_before_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "twelve characters")
    users = tmp_path / "runs" / "auth.db"
    Login(f"sqlite:///{users}").check()
    assert stat.S_IMODE(users.stat().st_mode) == 0o600


def test_a_login_that_cannot_work_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD", raising=False)
    with pytest.raises(UserError, match=r"--auth: there are no users yet; set MLFLOW_AUTH_ADMIN_PASSWORD"):
        Login(f"sqlite:///{tmp_path / 'auth.db'}").check()
    assert not (tmp_path / "auth.db").exists()
    with pytest.raises(UserError, match=r"--host 0.0.0.0: .* --auth for a login, or say --allow-public"):
        serve(store="sqlite:///none.db", runs=tmp_path, host="0.0.0.0", port=free_port())


def test_the_server_goes_even_when_the_command_is_killed_outright(team: Team) -> None:
    """Last, since nothing answers after it."""
    mark = f"--port {team.address.split(':')[-1].removesuffix('/lab')}"
    assert len(processes_with(mark)) >= 2
    os.kill(team.process.pid, signal.SIGKILL)
    team.process.wait()
    assert gone_within(mark, 60.0), processes_with(mark)
