"The example in the help of a command is one that its parser takes."
import shlex

import pytest
from fastcore.script import anno_parser

from mix_geneformer import cli

COMMANDS = [name for name in cli.__all__ if name.startswith("mgf_")]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_one(name):
    command = getattr(cli, name)
    what, _, line = command.__doc__.partition(" Example: ")
    said, *arguments = shlex.split(line)
    assert said == name and what.endswith(".")
    anno_parser(command.__wrapped__).parse_args(arguments)
    with pytest.raises(SystemExit): anno_parser(command.__wrapped__).parse_args([*arguments, "--no_such_option", "1"])
