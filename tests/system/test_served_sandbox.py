"""Data and training over a served sandbox: the recipe key, real processes, the same result as embedded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from retool.config import SandboxConfig
from retool.errors import UserError
from retool.recipe import RecipeError, load_recipe
from retool.workshop import make_sandbox
from tests.sandbox.serving import TOKEN, Served, served
from tests.system.runs import REPO, ledger, retool

VARIABLE = "MY_SANDBOX_TOKEN"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with served(env={"RETOOL_SANDBOX_TOKEN": TOKEN}) as it:
        monkeypatch.setenv(VARIABLE, TOKEN)
        yield it


def remote(server: Served) -> list[str]:
    return ["sandbox.kind=remote", f"sandbox.urls=[{server.url}]", f"sandbox.token_env={VARIABLE}"]


def executions(server: Served) -> int:
    with server.client(TOKEN) as http:
        return int(http.get("/v1/stats").json()["executions"])


def test_training_runs_its_code_on_the_server(server: Served, tmp_path: Path) -> None:
    common = ["train", "recipes/tiny.yaml", "steps=3", "rollout.max_tokens=96", "sandbox.profile=py-bare"]
    there = retool(*common, f"out={tmp_path / 'remote'}", *remote(server))
    assert there.returncode == 0, there.stderr
    ran = executions(server)
    assert ran > 0, "the policy's code ran on the server"
    here = retool(*common, f"out={tmp_path / 'local'}")
    assert here.returncode == 0, here.stderr
    assert executions(server) == ran
    key = "grad_norm/policy"
    gradients = [
        [row["metrics"][key] for row in ledger(tmp_path / name) if "metrics" in row] for name in ("remote", "local")
    ]
    assert len(gradients[0]) == 3 and gradients[0] == gradients[1], "where the code runs changes nothing"
    assert TOKEN not in (tmp_path / "remote" / "recipe.yaml").read_text()


def test_a_server_that_is_not_there_is_an_error_of_one_line(tmp_path: Path) -> None:
    overrides = ["sandbox.kind=remote", "sandbox.urls=[http://127.0.0.1:1]", f"out={tmp_path / 'run'}"]
    done = retool("train", "recipes/tiny.yaml", *overrides)
    assert done.returncode == 1 and "127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sandbox.kind=remote"], "needs sandbox.urls"),
        (["sandbox.urls=[http://x:1]"], "need sandbox.kind remote"),
        (["sandbox.kind=remote", "sandbox.urls=[x:1]"], "http://HOST:PORT"),
        (["sandbox.kind=remote", "sandbox.urls=[http://x:1]", "sandbox.workers=2"], "belong to the server"),
        (["sandbox.kind=far"], "sandbox.kind"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(REPO / "recipes" / "tiny.yaml", overrides)


def test_a_missing_token_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UserError, match=VARIABLE):
        make_sandbox(SandboxConfig(kind="remote", urls=("http://127.0.0.1:1",), token_env=VARIABLE))


def test_the_keys_explain_themselves() -> None:
    done = retool("explain", "sandbox.urls")
    assert done.returncode == 0 and "retool" not in done.stderr and "least loaded" in done.stdout
