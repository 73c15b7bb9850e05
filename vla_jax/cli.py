"""The command `vla`: every program of `launch/`, from any folder.

    vla train --config=quickstart --workdir=runs/quickstart
    vla serve --checkpoint=runs/quickstart
    vla evaluate tabletop --checkpoint=runs/quickstart --out=runs/eval
    vla data inspect DIR

`vla NAME ...` is `python launch/NAME.py ...` of a checkout, flag for flag.
"""

import importlib.metadata
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NoReturn

from vla_jax import __version__, refusal
from vla_jax.commands import COMMANDS, as_typed, program
from vla_jax.shipped import config_names, with_config_path

_HELP = ("-h", "--help", "help")


def main() -> None:
    """Find the program, hand it the rest of the command line."""
    refusal.quiet_interrupt()
    words = sys.argv[1:]
    if words == ["--version"]:
        print(f"vla_jax {__version__}, jax {importlib.metadata.version('jax')}")
        return
    for command, (module, _) in COMMANDS.items():
        if tuple(words[: len(command)]) == command:
            name = " ".join(("vla", *command))
            # Usage texts and error messages of the program begin with what was typed.
            sys.argv = [name, *words[len(command) :]]
            _run_as_main(f"vla_jax.launch.{module}")
            return
    wants_help = not words or words[-1] in _HELP
    group = () if words and words[0] in _HELP else tuple(words[:1])
    # `vla data` stands for several programs.
    rows = {key: text for key, (_, text) in COMMANDS.items() if key[: len(group)] == group}
    print(_usage(rows or {key: text for key, (_, text) in COMMANDS.items()}))
    if not rows or not (wants_help or tuple(words) == group):
        sys.exit(f"vla: no command {' '.join(words[:2])!r}")


def run_with_flags(main: Callable[[Sequence[str]], Any]) -> None:
    """Run a launcher whose flags are absl's: `--config` takes names of shipped configs.

    absl's own --help ends with status 1, as if something were wrong.
    """
    from absl import app  # not for the launchers that read their flags otherwise

    refusal.quiet_interrupt()

    argv = with_config_path(sys.argv)
    if any(word in ("-h", "-help", "--help") for word in argv[1:]):
        # absl shows the docstring of the program.
        story = sys.modules["__main__"]
        story.__doc__ = as_typed(story.__doc__ or "")
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    app.run(main, argv=argv, flags_parser=_parse_flags)


def required(config: Any) -> Any:
    """The raw config that --config names.

    Raises:
        ConfigError: the flag is missing; with the names of the shipped ones.
    """
    from vla_jax.config import ConfigError  # not for the launchers that read their flags otherwise

    if config is None:
        names = ", ".join(config_names())
        raise ConfigError(f"--config: name a config file of yours, or one of {names}")
    return config


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Reads absl's flags, and with them the file that --config names, which may do anything."""
    # Not for the launchers that read their flags otherwise.
    from absl import flags

    from vla_jax.config import ConfigError, load_config_file, unknown_keys

    configs = [word.partition("=")[2] for word in argv if re.match("--?config=", word)]
    file = configs[-1].partition(":")[0] if configs else "--config"
    if configs and not Path(file).is_file():
        names = ", ".join(config_names())
        _end(f"--config={configs[-1]}: no such file, and none is shipped: {names}")
    try:
        words = flags.FLAGS(list(argv))
    except flags.Error as error:
        # What the file itself has refused; absl puts its own words and a stack around it.
        causes = [each for each in _chain(error) if isinstance(each, ConfigError)]
        if causes:
            _end(str(causes[-1]))
        raised = next((each for each in _chain(error) if refusal.raised_in(each, file)), None)
        reason = refusal.in_file(raised, file) if raised else str(error)
        _end(f"{reason}; --{'debug shows more' if raised else 'help says more'}")
    except Exception as error:
        if "--debug" in argv:
            raise
        matches = [re.match(r"--?config\.([^=]+)", word) for word in argv]
        keys = [match[1] for match in matches if match]
        # With a key that the config lacks the file itself was read without an error.
        unknown = isinstance(error, AttributeError | KeyError) and bool(keys and configs)
        problems = unknown_keys(load_config_file(configs[-1]), keys) if unknown else []
        if problems:
            _end("\n".join(problems))
        _end(f"{refusal.in_file(error, file)}; --debug shows more")
    # absl hands them to the program, which has no use for any: a flag that lost its dashes.
    if len(words) > 1:
        hint = f"; did you mean --config={words[1]}?" if words[1] in config_names() else ""
        _end(f"{' '.join(words[1:])}: only flags are read here{hint}")
    return words


def _end(problem: str) -> NoReturn:
    sys.exit(f"{program()}: {as_typed(problem)}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what was being handled when it was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _run_as_main(name: str) -> None:
    """Run a module as `python -m` does, under the command line that is set.

    It has to be the process's `__main__`: worker processes import that again to find the functions
    they are sent, and help texts are its docstring. `runpy` would put a file into `sys.argv[0]`.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert isinstance(spec.loader, SourceFileLoader)
    module = types.ModuleType("__main__")
    module.__spec__, module.__file__, module.__package__ = spec, spec.origin, spec.parent
    code = spec.loader.get_code(name)
    assert code is not None
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def _usage(programs: dict[tuple[str, ...], str]) -> str:
    rows = [f"  {' '.join(command):<14}{text}" for command, text in programs.items()]
    return "\n".join(
        ["usage: vla COMMAND [FLAGS]; vla COMMAND --help says more; vla --version", "", *rows]
    )


if __name__ == "__main__":
    main()
