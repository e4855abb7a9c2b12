"""The command line: a user's error is one line and status 2; a whole launch with stand-ins for the roles."""

import json
import re
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest

from minpro_megatron import __version__
from minpro_megatron.__main__ import CHECKOUT
from minpro_megatron.launch.recipe import load_recipe
from tests.support.command_errors import errors_of
from tests.support.run_examples import example_config, write_example_files

RECIPES = """
from pathlib import Path
from tests.support.run_examples import example_config

def good():
    return example_config(Path(__file__).parent)

def wrong_value():
    return example_config(Path(__file__).parent, num_global_steps=0, seed=-1)

def raising():
    return 1 / 0

def not_a_config():
    return {}

number = 3
"""


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A module with recipes, importable by name."""
    (tmp_path / "my_recipes.py").write_text(RECIPES)
    (tmp_path / "broken_recipes.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "crashing_recipes.py").write_text("raise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("my_recipes", "broken_recipes", "crashing_recipes"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "a command is missing; see .*--help"),
        (["launch"], "required: RECIPE"),
        (["lunch"], r"no command 'lunch' \(did you mean launch\?\); see .*--help"),
        (["train"], "required: --config, --incarnation"),
        (["train", "--config", "run.json", "--incarnation", "x"], "--incarnation: invalid int value: 'x'"),
        (["launch", "my_recipes"], "recipe 'my_recipes': expected module:function, such as "),
        (["launch", "no_such:thing"], "recipe 'no_such:thing': there is no module 'no_such'"),
        (["launch", "broken_recipes:x"], "importing broken_recipes failed: .*'not_installed_anywhere'"),
        (["launch", "crashing_recipes:x"], r"failed: RuntimeError: two lines \(.*crashing_recipes.py:1\)"),
        (["launch", "my_recipes:god"], r"no function 'god' \(did you mean good\?\); it has: .*good"),
        (["launch", "my_recipes:number"], "no function 'number'"),
        (["launch", "my_recipes:raising"], r"ZeroDivisionError: division by zero \(.*my_recipes.py:12\)"),
        (["launch", "my_recipes:not_a_config"], "returned dict; it must return a RunConfig"),
        (["launch", "my_recipes:good", "seed"], "override 'seed': expected section.key=value"),
        (["launch", "my_recipes:good", "optimizer.lr=1"], "no setting 'lr'; known: learning_rate, "),
        (
            ["launch", "my_recipes:good", "learning_rate=1"],
            r"'learning_rate' \(did you mean optimizer.learning_rate\?\)",
        ),
        (["launch", "./no_such.py:mine"], "there is no file ./no_such.py"),
        (["launch", "recipes.demos:tiny_moe"], r"no module 'recipes.demos' \(did you mean recipes.demo"),
        (["settings", "optimiser"], r"no section or setting 'optimiser' \(did you mean optimizer\?\)"),
        (["settings", "learning_rte"], r"'learning_rte' \(did you mean optimizer.learning_rate\?\)"),
        (["settings", "learning_rate"], r"'learning_rate' \(did you mean optimizer.learning_rate\?\)"),
        (["check", "my_recipes:good"], "model.hf_path = .*/hf: no such folder"),
        (["launch", "my_recipes:good", "seed=x"], "seed: .*valid integer.* \\(got 'x'\\)"),
        (["launch", "my_recipes:good"], "model.hf_path = .*/hf: no such folder"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(recipes, capsys, arguments, pattern):
    line = errors_of(capsys, *arguments)[0]
    assert re.search(pattern, line), line


def test_the_command_in_another_checkout_runs_the_code_of_that_checkout(tmp_path):
    """Two checkouts may share one environment, whose command was made for one of them."""
    other = tmp_path / "minpro_megatron"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "__main__.py").write_text("import sys\nprint('other', *sys.argv[1:])\nsys.exit(3)\n")
    command = "import sys; sys.argv[0] = '/environment/bin/minpro'; from minpro_megatron.__main__ import main; main()"

    def minpro(folder):
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(CHECKOUT)}
        ended = subprocess.run(
            [sys.executable, "-P", "-c", command, "--version", "x"],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        return ended.returncode, ended.stdout, ended.stderr

    assert minpro(CHECKOUT) == (0, f"minpro-megatron {__version__}\n", "")
    note = f"note: running the code in {tmp_path}; this environment was made for {CHECKOUT}\n"
    assert minpro(tmp_path) == (3, "other --version x\n", note)


def test_every_wrong_setting_has_its_line(recipes, capsys):
    lines = errors_of(capsys, "launch", "my_recipes:wrong_value")
    assert [re.findall(r": (\w+): .*\(got (.+)\)", line)[0] for line in lines] == [
        ("seed", "-1"),
        ("num_global_steps", "0"),
    ]


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (None, "No such file or directory; give the run.json"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "valid dictionary"),
        (b'{"name": "x"}', "model: Field required"),
    ],
)
def test_a_role_refuses_a_bad_config_file(tmp_path, capsys, content, pattern):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    # Not `collect` itself: in this process it would ask the kernel to end the tests with their parent.
    from minpro_megatron.errors import UserError
    from minpro_megatron.launch.recipe import read_config

    with pytest.raises(UserError, match=pattern) as caught:
        read_config(path)
    assert all(problem.startswith(f"--config {path}: ") for problem in caught.value.problems)


def test_a_recipe_is_found_by_its_name_or_its_file(recipes):
    assert load_recipe("my_recipes:good") == example_config(recipes)
    assert load_recipe(f"{recipes}/my_recipes.py:good") == example_config(recipes)


def test_the_projects_recipes_are_found_from_every_folder(tmp_path, monkeypatch):
    """Also where a folder of the same name has recipes of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(CHECKOUT))])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").touch()
    (tmp_path / "recipes" / "mine.py").write_text("from minpro_megatron.recipes.demo import tiny_moe_smoke as mine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "recipes", raising=False)  # other tests may have looked for recipes here
    assert load_recipe("recipes.demo:tiny_moe").name == "demo"
    assert load_recipe("recipes.mine:mine").name == "demo-smoke"
    for name in ("recipes", "recipes.mine"):
        del sys.modules[name]


# The launcher as it is, with shell scripts as roles.
LAUNCH = """
import os, sys
from functools import partial
from minpro_megatron.launch import launcher
from minpro_megatron.launch.supervisor import RoleCommand
from minpro_megatron.__main__ import main

launcher.Supervisor = partial(launcher.Supervisor, poll_s=0.03, failures_together_s=0.03)
def stand_ins(config, config_file, incarnation, save_by):
    environment = {**os.environ, "RUN": str(config.run_dir), "SAVE_BY": str(save_by)}
    scripts = {"serve": "sleep 60", "collect": sys.argv[2], "train": sys.argv[1]}
    return [RoleCommand(role, ["sh", "-c", script], environment, role == "serve") for role, script in scripts.items()]

launcher.role_commands = stand_ins
sys.exit(main(["launch", "my_recipes:good", "name=other"]))
"""


def launch(folder, train: str, collect: str = "exit 0", **environment: str) -> subprocess.CompletedProcess[str]:
    write_example_files(folder)
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, train, collect],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{folder}:."} | environment,
    )


def test_a_launch_that_finishes(recipes):
    summary = {
        "name": "other", "objective": "minpro", "seed": 0, "steps": 4, "updates": 8, "wall_time_s": 125.0,
        "wall_time_by_phase_s": {}, "pass_at_1_before": 0.125, "pass_at_1_after": 0.5,
        "mean_reward_before": -0.75, "mean_reward_after": 0.0,
        "standard_error_before": 0.01, "standard_error_after": 0.02, "num_evaluation_samples": 128,
        "smallest_staleness": 0, "largest_staleness": 2, "versions_published": 5, "groups_issued": 16,
        "groups_consumed": 16, "groups_dropped": 0, "hf_export": "somewhere/hf_export", "package_versions": {},
    }  # fmt: skip
    entry = {"step": 3, "time": 1.0, "metrics": {"reward/mean": -0.5, "reward/accuracy": 0.25, "time/step_s": 2.0}}
    (recipes / "summary.json").write_text(json.dumps(summary))
    (recipes / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    ended = launch(recipes, f'cp {recipes}/summary.json {recipes}/metrics.jsonl "$RUN"; touch "$RUN/report.html"')
    run_dir = recipes / "runs" / "other"
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (
        textwrap.dedent(f"""\
        finished 4 global steps (8 updates) in 2 min 05 s, staleness 0-2
        pass@1       12.5 % +- 1.0 before, 50.0 % +- 2.0 after (128 samples, standard errors)
        mean reward  -0.750 before, 0.000 after
        report       {run_dir}/report.html
        TensorBoard  tensorboard --logdir {run_dir}/tensorboard
        HF weights   {run_dir}/hf_export
        """)
        in ended.stdout
    )
    assert "step 4/4  reward -0.500  accuracy 25.0 %" in ended.stdout
    assert json.loads((run_dir / "run.json").read_text())["name"] == "other"


def test_a_launch_that_fails_says_which_role_and_why(recipes):
    run_dir = recipes / "runs" / "other"
    (run_dir / "endpoints").mkdir(parents=True)
    (run_dir / "endpoints" / "collector.json").write_text("left by a failed start")
    (run_dir / "run.json").write_text(example_config(recipes, name="other").to_json())
    ended = launch(recipes, 'ls "$RUN/endpoints"; echo "train: no batch came" >&2; exit 1')
    assert ended.returncode == 1
    # the start emptied the folder, and made the key of its servers
    assert (run_dir / "logs" / "train.log").read_text().splitlines() == ["server.key", "train: no batch came"]
    assert ended.stderr.splitlines() == [
        f"error: the role train failed with exit status 1; its log: {run_dir}/logs/train.log",
        "  | train: no batch came",
        "launch the same command again to resume",
    ]


def test_a_launch_that_ends_before_its_time_limit(recipes):
    """In a Slurm job, whose end is passed to the trainer."""
    end = {"policy_version": 3, "reason": "the time limit leaves 80 s", "saved": True}
    train = f"""echo '{json.dumps(end)}' > "$RUN/starts/0/early_end.json"; echo "by $SAVE_BY" """
    ended = launch(recipes, train, "sleep 60", SLURM_JOB_END_TIME="2000000000")
    assert (ended.returncode, ended.stderr) == (
        75,
        "ended after global step 3, with a checkpoint: the time limit leaves 80 s\n"
        "launch the same command again to resume\n",
    )
    assert (recipes / "runs" / "other" / "logs" / "train.log").read_text() == "by 1999999985.0\n"


@pytest.fixture
def interrupted(recipes):
    """The folder of a run that was begun by `my_recipes:good name=other` and has rollouts."""
    write_example_files(recipes)
    run_dir = recipes / "runs" / "other"
    (run_dir / "status").mkdir(parents=True)
    (run_dir / "run.json").write_text(example_config(recipes, name="other").to_json())
    (run_dir / "starts" / "0").mkdir(parents=True)
    (run_dir / "report.html").write_text("of the first start")
    with closing(sqlite3.connect(run_dir / "journal.sqlite")) as journal:
        journal.executescript("CREATE TABLE groups (group_id INTEGER); INSERT INTO groups VALUES (0)")
    return run_dir


def test_a_second_launch_goes_on(recipes, interrupted):
    """It keeps the rollouts, but not what the first one said of itself."""
    (interrupted / "endpoints").mkdir()
    (interrupted / "endpoints" / "collector.json").write_text("of the first start")
    ended = launch(recipes, 'ls "$RUN" "$RUN/endpoints"; exit 1')
    assert "it resumes from its beginning (start 2 of this run)" in ended.stdout
    left = (interrupted / "logs" / "train.log").read_text().split()
    assert "journal.sqlite" in left
    assert not {"status", "report.html", "collector.json"} & {*left}
    assert sorted(path.name for path in (interrupted / "starts").iterdir()) == ["0", "1"]


def test_another_experiment_does_not_go_on(recipes, interrupted, capsys):
    (line,) = errors_of(capsys, "launch", "my_recipes:good", "name=other", "seed=9")
    assert "holds a run with other settings (seed: 0 -> 9)" in line
    assert {"journal.sqlite", "report.html"} <= {path.name for path in interrupted.iterdir()}
