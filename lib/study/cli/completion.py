"""Completion in bash and zsh, written out from the argparse parser; zsh reads bash's script (bashcompinit)."""

import argparse

from study.preset import preset_names

ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"

# Array slices count from 0 in both shells, subscripts do not. Where nothing fits, the shell offers files.
SCRIPT = """\
_{prog}_runs() {{
  find -L "${{THREEFOLD_RUNS:-runs}}" -mindepth 2 -maxdepth 2 -name config.toml 2>/dev/null |
    sed 's|/config.toml$||; s|.*/||'
}}
_{prog}() {{
  local word="${{COMP_WORDS[@]:$COMP_CWORD:1}}" before="${{COMP_WORDS[@]:$((COMP_CWORD - 1)):1}}"
  local command="${{COMP_WORDS[@]:1:1}}" words=""
  [ "$COMP_CWORD" -gt 1 ] || command=""
  case "$command $before" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _{prog} {prog}"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What the shell ("bash" or "zsh") evaluates to complete commands, options, choices, presets, runs and files."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    cases = [_case('" "*', [*commands.choices, *_options(parser)])]
    for name, command in commands.choices.items():
        takes = [action for action in command._actions if action.option_strings and action.nargs != 0]
        cases += [_case("|".join(f'"{name} {flag}"' for flag in one.option_strings), _values(one)) for one in takes]
        places = [word for action in command._actions if not action.option_strings for word in _values(action)]
        cases.append(_case(f'"{name} "*', [*places, *_options(command)]))
    made = SCRIPT.format(prog=parser.prog, cases="\n".join(cases))
    return ZSH + made if shell == "zsh" else made


def _case(pattern: str, words: list[str]) -> str:
    return f'    {pattern}) words="{" ".join(words)}" ;;'


def _options(command: argparse.ArgumentParser) -> list[str]:
    return [flag for action in command._actions for flag in action.option_strings]


def _values(action: argparse.Action) -> list[str]:
    """The words that an option or a place takes; none where it takes a file, a number or a text."""
    if action.choices:
        return [str(choice) for choice in action.choices]
    if action.dest in ("run", "runs"):
        return ["$(_threefold_runs)"]
    return preset_names() if action.dest == "preset" else []
