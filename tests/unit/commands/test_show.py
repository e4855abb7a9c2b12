"""The rollouts of a run as a table, token by token, as JSON, and as rows that the replay tool reads."""

import json
import sqlite3
from io import StringIO
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_checksums import seal_groups
from minpro_megatron.buffer.journal_pruning import Pruned
from minpro_megatron.commands.show import main
from minpro_megatron.records import CollectedGroup
from minpro_megatron.replay.rollouts import read_rollouts
from minpro_megatron.terminal_text import visible
from tests.support.rollout_fakes import NUM_PROMPTS, RESPONSES
from tests.support.stored_runs import StoredRun, behavior, with_kept_ids, with_versions, write_run

HOSTILE = "\x1b[2J[bold red]x[/] :smile: \u202e\x07\r\n\x85fake line"


def show(run_dir: Path, *options: str) -> tuple[int, str]:
    """The exit status, and what would be printed."""
    console = Console(width=200, record=True, file=StringIO())
    status = main([str(run_dir), *options], console=console)
    return status, console.export_text()


def listed(run_dir: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[int]:
    assert main([str(run_dir), "--json", *options]) == 0
    return [json.loads(line)["group_id"] for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> StoredRun:
    return write_run(tmp_path / "run")


def test_the_table_shows_every_group(run: StoredRun) -> None:
    status, text = show(run.run_dir)
    lines = {
        line.split()[0]: line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0].isdigit()
    }
    assert status == 0
    assert len(lines) == 10
    group = run.steps[1].groups[0]
    rewards = [response.reward for response in group.responses]
    lengths = [len(response.token_ids) for response in group.responses]
    assert lines["3"] == [
        "3", "consumed", "1", "1", group.issued.prompt.id, "0", "1", f"{np.mean(rewards):.3f}", str(sum(lengths)),
    ]  # fmt: skip
    assert lines["9"][:4] + lines["9"][5:] == ["9", "issued", "-", "-", "0", "-", "-", "-"]


def test_versions_of_a_group_that_several_have_sampled(tmp_path: Path) -> None:
    write_run(tmp_path, change=lambda group: with_versions(group, [0, 0, 3]))
    assert " 0-3 " in show(tmp_path)[1]
    assert "3 tokens, ended by length" in show(tmp_path, "--group", "0")[1]
    assert "2 of version 0 then 1 of version 3" in show(tmp_path, "--group", "0")[1]


def test_filters_choose_what_fulfils_all_of_them(run: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = {
        group.issued.group_id: np.mean([response.reward for response in group.responses]) for group in run.groups
    }
    assert listed(run.run_dir, capsys) == list(range(10))
    assert listed(run.run_dir, capsys, "--step", "1") == [3, 4, 5]
    assert listed(run.run_dir, capsys, "--step", "0:1", "--limit", "4") == [0, 1, 2, 3]
    assert listed(run.run_dir, capsys, "--step", "1:") == [3, 4, 5]
    assert listed(run.run_dir, capsys, "--state", "collected", "--state", "issued") == [6, 7, 8, 9]
    assert listed(run.run_dir, capsys, "--staleness", ":0") == [0, 1, 2]
    for low, high in ((0, 0), (0.5, 1), (1, 1)):
        expected = [group for group, reward in rewards.items() if low <= reward <= high]
        assert listed(run.run_dir, capsys, "--reward", f"{low}:{high}") == expected
    prompt = run.groups[4].issued.prompt.id
    found = listed(run.run_dir, capsys, "--prompt-id", prompt)
    assert 4 in found
    assert len(found) < 10
    assert listed(run.run_dir, capsys, "--prompt-id", "' OR 1 --") == []


def test_a_long_list_says_how_many_there_are(run: StoredRun) -> None:
    assert "2 of 10 groups; --limit 0 shows all" in show(run.run_dir, "--limit", "2")[1]
    assert "--limit" not in show(run.run_dir, "--limit", "0")[1]
    assert "no group fulfils all conditions" in show(run.run_dir, "--step", "77")[1]


def test_a_group_shows_every_token(run: StoredRun) -> None:
    _, text = show(run.run_dir, "--group", "3")
    group = run.steps[1].groups[0]
    assert "group 3, consumed, prompt " in text
    assert "consumed at step 1, 1 steps stale" in text
    assert "the tokenizer of the run's model is not available: token ids" in text
    for response, scores in zip(group.responses, behavior(group), strict=True):
        assert f"│ {' '.join(map(str, response.token_ids.tolist()))}\n" in text
        for place, token in enumerate(response.token_ids.tolist()):
            ratio = f"{np.e:.5f}" if place else "-"  # the first token was not trained on
            cells = [place, token, 0, f"{response.rollout_log_probs[place]:.5f}", f"{scores[place]:.5f}", ratio]
            assert [str(cell) for cell in cells] in [line.split() for line in text.splitlines()]
    _, one = show(run.run_dir, "--group", "3", "--response", "1")
    assert "response 1" in one
    assert "response 0" not in one
    assert f"mean reward {np.mean([response.reward for response in group.responses]):g}" in one
    assert "issued with version 0" in show(run.run_dir, "--group", "9")[1]


def test_a_pruned_group_says_so(tmp_path: Path) -> None:
    async def prune(journal: Journal, run: StoredRun) -> None:
        await journal.prune(before_step=2)

    write_run(tmp_path, while_open=prune)
    assert "no longer in the journal (collector.journal_keep_steps)" in show(tmp_path, "--group", "0")[1]


def hostile_model(folder: Path) -> str:
    """A model folder whose tokens 3 to 22 are, one after the other, HOSTILE's characters."""
    vocabulary = {character: 3 + place for place, character in enumerate(dict.fromkeys(HOSTILE))}
    tokenizer = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "<pad>": 2} | vocabulary, unk_token="<unk>"))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {"vocab_size": 40, "eos_token_id": 0, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(facts))
    return str(folder)


def test_rollout_text_cannot_act_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hostile(group: CollectedGroup) -> CollectedGroup:
        ids = np.arange(3, 3 + len(dict.fromkeys(HOSTILE)), dtype=np.int32)
        changed = with_versions(group, [0] * len(ids))
        first = msgspec.structs.replace(changed.responses[0], token_ids=ids)
        issued = msgspec.structs.replace(
            group.issued, prompt=msgspec.structs.replace(group.issued.prompt, id=HOSTILE, source=HOSTILE)
        )
        return msgspec.structs.replace(changed, issued=issued, responses=[first, *group.responses[1:]])

    run_dir = tmp_path / "run"
    write_run(run_dir, change=hostile)
    (run_dir / "run.json").write_text(json.dumps({"model": {"hf_path": hostile_model(tmp_path / "model")}}))
    with sqlite3.connect(run_dir / "journal.sqlite") as connection:
        connection.execute("UPDATE groups SET prompt_id = ?, source = ?", (HOSTILE, HOSTILE))
        seal_groups(connection)
    table, text = show(run_dir)[1], show(run_dir, "--group", "0")[1]
    for printed in (table, text):
        assert {c for c in printed if not c.isprintable()} == {"\n"}
        assert "\\x1b[2J[bold red]x[/] :smile: \\u202e\\x07\\r\\n\\x85fake line" in printed
    assert all(spelt in text for spelt in (" \\x1b ", " \\u202e ", " \\r ", " \\n "))
    # the text's own line break begins a new line behind the bar, and nowhere else
    assert [line for line in text.splitlines() if line.startswith("fake")] == []
    assert main([str(run_dir), "--group", "0", "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert {c for c in printed if not c.isprintable()} == {"\n"}
    assert json.loads(printed)["prompt_id"] == HOSTILE


def test_what_is_printed_as_itself() -> None:
    assert visible("naïve 思考 ½ \\n 👍") == "naïve 思考 ½ \\n 👍"
    assert visible("a\u2028b\U000e0041\ud800") == "a\\u2028b\\U000e0041\\ud800"


def test_exported_groups_can_be_replayed(run: StoredRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    assert main([str(run.run_dir), "--export", str(path)]) == 0
    wrote = f"wrote {2 * NUM_PROMPTS * RESPONSES} rows of {2 * NUM_PROMPTS} groups to {path}"
    assert capsys.readouterr().out == f"{wrote}; 4 groups skipped: not scored yet, or pruned\n"
    rows = iter(read_rollouts(path, 24, needs_rollout_log_probs=True))
    for group in [group for batch in run.steps for group in batch.groups]:
        for response, scores in zip(group.responses, behavior(group), strict=True):
            row = next(rows)
            assert (row.group, row.reward) == (str(group.issued.group_id), response.reward)
            assert row.prompt_ids.tolist() == group.issued.prompt_token_ids.tolist()
            assert row.response_ids.tolist() == response.token_ids.tolist()
            np.testing.assert_array_equal(row.behavior_log_probs, scores, strict=True)
            np.testing.assert_array_equal(row.rollout_log_probs, response.rollout_log_probs, strict=True)
    assert next(rows, None) is None
    other = tmp_path / "other.jsonl"
    assert main([str(run.run_dir), "--export", str(other), "--step", "1", "--limit", "1"]) == 0
    assert {row.group for row in read_rollouts(other, 24, False)} == {"3"}


def test_pruned_kept_ids_are_not_left_out_of_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def prune_files(journal: Journal, run: StoredRun) -> None:
        await journal.prune(before_step=1, what=Pruned.FILES)

    run_dir, path = tmp_path / "run", tmp_path / "rows.jsonl"
    write_run(run_dir, change=with_kept_ids, while_open=prune_files)
    (run_dir / "run.json").write_text(json.dumps({"sampling": {"top_k": 20}}))
    assert main([str(run_dir), "--export", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"error: --export {path}: the run has sampling.top_k = 20, but the kept ids of group 0 (global step 0) are no "
        "longer in the journal, and its behavior log-probs are those among them; choose later steps with --step, or "
        "export from a run with collector.journal_keep_routes=true\n"
    )
    assert not path.exists()
    assert main([str(run_dir), "--export", str(path), "--step", "1"]) == 0
    rows = read_rollouts(path, 24, needs_rollout_log_probs=False, top_k=20)
    assert len(rows) == NUM_PROMPTS * RESPONSES


def test_a_group_as_json_has_everything(run: StoredRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.run_dir), "--group", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    group = run.steps[1].groups[0]
    assert (shown["consumed_step"], shown["staleness"], shown["prompt"]) == (1, 1, None)
    for found, response, scores in zip(shown["responses"], group.responses, behavior(group), strict=True):
        assert found["token_ids"] == response.token_ids.tolist()
        assert found["behavior_log_probs"] == scores.tolist()
        assert found["ratios"][0] is None
        assert found["ratios"][1:] == pytest.approx([np.e] * (len(scores) - 1), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--step", "x"], "argument --step: 'x' is not a range, such as 3, 3:7, 3: or :7"),
        (["--step", "5:2"], "argument --step: '5:2' is an empty range"),
        (["--reward", ""], "argument --reward: '' is an empty range"),
        (["--limit", "-1"], "argument --limit: '-1' is not a whole number from 0 on"),
        (["--state", "lost"], "argument --state: invalid choice: 'lost'"),
        (["--group", "99"], "--group 99: the journal has no such group"),
        (["--group", "0", "--response", "2"], "--response 2: group 0 has 2 responses, from 0"),
        (["--response", "2"], "--response: give the group with --group"),
        (["--export", "{run}/run.json"], "--export {run}/run.json: the file exists; give a new name"),
        (["--export", "{run}/none/x"], "No such file or directory"),
        (["--export", "{run}/x", "--state", "issued"], "--export {run}/x: none of the 1 chosen groups has behavior"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    run: StoredRun, capsys: pytest.CaptureFixture[str], options: list[str], problem: str
) -> None:
    (run.run_dir / "run.json").write_text("not JSON")
    before = sorted(run.run_dir.iterdir())
    try:
        status = main([str(run.run_dir), *(option.format(run=run.run_dir) for option in options)])
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.startswith("error: ")
    assert problem.format(run=run.run_dir) in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(run.run_dir.iterdir()) == before


def test_a_folder_without_a_journal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "there is no such file; give a run folder" in capsys.readouterr().err
