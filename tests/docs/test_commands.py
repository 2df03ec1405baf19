"""Every ``hasten`` command of the documents is one that the command line takes: its command, options and values exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from hasten.cli import main
from hasten.cli.config import recipe_from
from hasten.settings import method_from

from .pages import PAGES, ROOT, blocks, name, photos

STAND_INS = {"NAME": "mixed_precision", "RUN": "runs/photos", "FOLDER": "photos", "DATA": "photos", "IMAGE...": "photos/val/cat/0.png"}  # fmt: skip
ClickException: type[Exception] = next(
    cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException"
)


@pytest.fixture(scope="module")
def command_line() -> Any:
    """The command that ``hasten`` runs, taken from where it is about to run; its subcommands only return what they read."""
    found: list[typer.Typer] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.Typer, "__call__", lambda self, *args, **kwargs: found.append(self))
        main([])
    command: Any = typer.main.get_command(found[0])
    silence(command)
    return command


def silence(group: Any) -> None:
    """Have every command below ``group`` return its arguments once it has read them."""
    for command in group.commands.values():
        if hasattr(command, "commands"):
            silence(command)
        else:
            command.callback = lambda **given: given


def commands(page: Path) -> list[str]:
    """Return every command line of ``hasten`` on a page, in blocks and in the text."""
    lines = [
        line for language in ("sh", "") for _, code, _ in blocks(page, language) for line in code.splitlines()
    ]
    lines += re.findall(r"`((?:python -m )?hasten [a-z-][^`\n]*)`", page.read_text(encoding="utf-8"))
    return [line for line in lines if re.match(r"(?:python -m )?hasten (?!COMMAND)", line)]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_are_understood(
    page: Path, command_line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    (tmp_path / "runs/photos").mkdir(parents=True)
    for line in commands(page):
        words = shlex.split(line.removeprefix("python -m "), comments=True)[1:]
        words = [STAND_INS.get(word, word) for word in words]
        try:
            given = command_line.main(words, prog_name="hasten", standalone_mode=False)
        except ClickException as error:
            pytest.fail(f"{line}: {error}")
        if isinstance(given, dict) and words[0] in ("train", "compare"):
            for method in given["method"] or []:
                method_from(method)
            recipe_from("strong", [text for text in given["set_"] or [] if text != "help"])


def test_the_documents_show_commands_and_a_wrong_one_is_found(command_line: Any) -> None:
    assert len({line.split()[1] for page in PAGES for line in commands(page)}) >= 6
    with pytest.raises(ClickException):
        command_line.main(["train", "--no-such-flag", "1"], prog_name="hasten", standalone_mode=False)
    assert (ROOT / "docs/command-line.md") in PAGES


def test_what_to_try_can_be_given_to_method() -> None:
    words = tomllib.loads((ROOT / "scripts/cards.toml").read_text(encoding="utf-8"))
    for row in words["which"]:
        assert str(method_from(row["try"])).startswith(row["try"].partition(":")[0])
