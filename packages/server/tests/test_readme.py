import re
from pathlib import Path

import typer

from octavo_server import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_every_option_of_serve_is_in_the_table_and_no_other():
    commands = typer.main.get_command(cli.app).commands
    given = [option for p in commands["serve"].params for option in (*p.opts, *p.secondary_opts)]
    known = {option for option in given if option.startswith("--")}
    listed = set(re.findall(r"--[a-z-]+", "\n".join(line for line in README.splitlines() if line.startswith("| `--"))))
    assert listed == known


def test_every_option_in_an_example_exists():
    commands = typer.main.get_command(cli.app).commands
    for name, arguments in re.findall(r"^    octavo (\w+)(.*)$", README, flags=re.MULTILINE):
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", arguments.partition("#")[0])) <= options


def test_every_route_answers(client):
    for method, path in re.findall(r"`(GET|POST) (/[^`]*)`", README):
        known = "org/fake-model" if "models" in path else "unknown"
        response = client.request(method, path.replace("{id}", known), json={} if method == "POST" else None)
        # An empty body lacks the input, some routes are for administrators, and some things are unknown.
        assert response.status_code in ((400, 403, 422) if method == "POST" else (200, 403, 404)), path
        assert response.json()["error"]["code"] != "not_found" if response.status_code == 404 else True, path


def test_every_metric_is_exposed(client):
    client.post("/v1/completions", json={"prompt": "a"})
    exposed = client.get("/metrics").text
    table = README.partition("## Metrics")[2].partition("Status 499")[0]
    names = [name for line in table.splitlines() if line.startswith("| ") for name in re.findall(r"`(\w+)[{`]", line)]
    assert len(names) > 30
    for name in names:
        if name != "_total":
            assert re.search(rf"^# TYPE octavo_{name}(_total)? (gauge|counter|histogram)$", exposed, re.MULTILINE), name


def test_the_python_example_compiles():
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    compile(example, "README.md", "exec")
