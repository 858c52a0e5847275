"""Tasks of a newcomer: each a script of few lines that does with the library what it says."""

import pathlib
import runpy

import pytest

TASKS = sorted(pathlib.Path(__file__).with_name("tasks").glob("*.py"))


def lines(script):
    """The lines of a script, imports included, beside the first, which says what it does."""
    return [x for x in script.read_text().splitlines()[1:] if x.strip()]


def test_there_is_a_task_for_every_letter():
    assert [task.name[:2] for task in TASKS] == [f"{letter}_" for letter in "abcdefghijklmno"]


@pytest.mark.float32(reason="models are in float32")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.stem)
def test_a_task_is_done_in_few_lines(task):
    assert len(lines(task)) < 15
    runpy.run_path(str(task))
