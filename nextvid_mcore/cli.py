"""The command line: `RECIPE [settings]` to a `RunConfig` and the options of one start.

    python -m nextvid_mcore.pretrain RECIPE --out DIR [--train.steps 100 --stages.0.lr-end 1e-3 ...]

Every field of `RunConfig` is a flag with the recipe's value as its default: `--train.global-batch 8`. The
stages are numbered (`--stages.0.steps 5`), data sets are given as `--data.sets k400=0.4 own=0.6`, a switch
takes any of `--wandb.enabled`, `--wandb.enabled False`, `--no-wandb.enabled`, and `--no-wandb` turns wandb
off. `--init-from` and `--start-stage` are short for `--train.init-from` and `--train.start-stage`.

Every mistake is a `ConfigError` with one message; `fail` prints it once and ends the process with code 2.
Imports neither torch nor megatron, so that a mistake costs no start-up.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import os
import re
import stat
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

import nextvid_mcore
from nextvid_mcore import recipes
from nextvid_mcore.config import MOVING_DIGITS, ConfigError, RunConfig, SetConfig, is_made, require

EXIT_CONFIG = 2
PATIENCE = 5.0  # seconds that other ranks give rank 0 to speak
DEMO_MANIFEST = "data/demo/manifest"  # written by examples/quickstart.sh, read when no manifest is named
DEMO_EVAL_MANIFEST = "data/demo/manifest_val"
PROGRAM = "python -m nextvid_mcore.pretrain"
SHORT = {"--init-from": "--train.init-from", "--start-stage": "--train.start-stage"}


@dataclass(frozen=True)
class Options:
    """What belongs to one start of a run, and not to the run."""

    out: Path | None  # None only with dry_run
    dry_run: bool
    world_size: int


class Help(Exception):
    """`--help` was asked for; the text is the message."""


def _check_folder(out: str) -> None:
    """ConfigError where a file is, or what no file system takes as a name."""
    try:
        found = os.stat(out).st_mode
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        shown = out if len(out) < 80 else f"{out[:60]}..."
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {shown}: {reason}; name another folder") from error
    require(stat.S_ISDIR(found), f"--out {out} is a file; name a folder")


def parse(argv: Sequence[str]) -> tuple[RunConfig, Options]:
    """The run that `argv` (without the program's name) describes. Raises `ConfigError`, or `Help`."""
    argv = [SHORT.get(flag, flag) + eq + value for flag, eq, value in (a.partition("=") for a in argv)]
    recipe, rest = _take_recipe(argv)
    default = recipes.get(recipe or "tiny")
    settings_type, settings = _settings(default)
    rest = _plain_switches(rest, settings_type)
    values = vars(_tyro(settings_type, settings, rest, recipe))
    out, dry_run, world_size = (values.pop(name) for name in ("out", "dry_run", "world_size"))
    config = RunConfig(recipe=default.recipe, **values)
    options = Options(Path(out) if out else None, dry_run, _world_size(world_size, dry_run))
    if not dry_run:
        require(out is not None, f"say where the run goes, for instance --out runs/{recipe}")
        _check_folder(out)
        config = with_demo_data(config)
    return config, options


def _take_recipe(argv: list[str]) -> tuple[str | None, list[str]]:
    """The positional RECIPE and what is left; None where only help was asked for."""
    if argv and not argv[0].startswith("-"):
        if argv[0] not in recipes.names():
            near = difflib.get_close_matches(argv[0], recipes.names(), n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(f"no recipe {argv[0]!r}{hint} There are {', '.join(recipes.names())}")
        return argv[0], argv[1:]
    named = [i for i, arg in enumerate(argv) if arg in recipes.names()]
    if len(named) == 1:
        return argv[named[0]], argv[: named[0]] + argv[named[0] + 1 :]
    if "-h" in argv or "--help" in argv:
        return None, argv
    raise ConfigError(f"name a recipe first ({', '.join(recipes.names())}): {PROGRAM} tiny --out runs/tiny")


def _settings(default: RunConfig) -> tuple[type, Any]:
    """A dataclass of every flag (the options, then RunConfig's fields but its name), and the recipe in it."""
    option = tyro.conf.arg
    hints = typing.get_type_hints(RunConfig)
    fields: list[tuple[str, Any]] = [
        (
            "out",
            Annotated[str | None, option(help="run directory; a run that is there goes on", metavar="DIR")],
        ),
        ("dry_run", Annotated[bool, option(help="print the plan and stop; needs no GPU, data or torchrun")]),
        (
            "world_size",
            Annotated[
                int | None, option(help="processes, for --dry-run; else torchrun says it", metavar="N")
            ],
        ),
    ]
    parts = [f.name for f in dataclasses.fields(RunConfig) if f.name != "recipe"]
    made = dataclasses.make_dataclass("Settings", fields + [(name, hints[name]) for name in parts])
    made.__doc__ = " "
    return made, made(None, False, None, **{name: getattr(default, name) for name in parts})


def _data_sets() -> tyro.constructors.ConstructorRegistry:
    """`--data.sets NAME=WEIGHT ...`: tyro's own form of a tuple of dataclasses can't lengthen it."""
    registry = tyro.constructors.ConstructorRegistry()

    def read(words: list[str]) -> tuple[SetConfig, ...]:
        pairs = [word.rpartition("=") for word in words]
        for word, (name, _, weight) in zip(words, pairs, strict=True):
            try:
                float(weight)
            except ValueError:
                name = ""
            if not name:
                raise ConfigError(f"a data set is given as NAME=WEIGHT (k400=0.4), got {word!r}")
        return tuple(SetConfig(name, float(weight)) for name, _, weight in pairs)

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type != tuple[SetConfig, ...]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="NAME=WEIGHT ...",
            instance_from_str=read,
            is_instance=lambda x: isinstance(x, tuple) and all(isinstance(s, SetConfig) for s in x),
            str_from_instance=lambda sets: [f"{s.name}={s.weight:g}" for s in sets],
        )

    return registry


def _tyro(settings_type: type, settings: Any, argv: list[str], recipe: str | None) -> Any:
    """tyro's parse with its complaints as `ConfigError` and its help as `Help`."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(
                settings_type,
                default=settings,
                args=argv,
                prog=f"{PROGRAM} {recipe or 'RECIPE'}",
                description=_description(recipe),
                registry=_data_sets(),
            )
    except SystemExit as ended:
        if ended.code in (0, None):
            raise Help(out.getvalue()) from None
        raise ConfigError(_unboxed(err.getvalue())) from None


def _description(recipe: str | None) -> str:
    lines = ["Pretrain NExT-Vid. Recipes:"]
    for name, make in recipes.RECIPES.items():
        lines.append(f"  {name}: {(make.__doc__ or '').strip().splitlines()[0]}")
    lines.append("")
    lines.append(f"The defaults below are those of {recipe or 'tiny; name another recipe to see its own'}.\n")
    lines.append(
        "Stages are numbered: --stages.0.steps 5. A switch: --wandb.enabled, --wandb.enabled False.\n"
    )
    lines.append("Short: --init-from DIR (--train.init-from), --start-stage NAME (--train.start-stage).")
    return "\n".join(lines)


def _unboxed(text: str) -> str:
    """tyro's framed complaint as one plain sentence or two."""
    lines = [
        line.strip("│╭╮╰╯─- ") if line.strip(" -│─") == "" else line.strip("│ ") for line in text.splitlines()
    ]
    lines = [line.rstrip() for line in lines[1:] if line]
    complaint = " ".join(
        itertools.takewhile(lambda x: not x.startswith(("Argument help", "For full", "Perhaps")), lines)
    )
    near = [line.split()[0] for line in lines[1:] if line.startswith("--")]
    if unknown := re.match(r"Unrecognized options: ([^,]*)", complaint):
        hint = f"; did you mean {' or '.join(near[:3])}?" if near else "."
        return f"unknown setting {unknown[1]}{hint} `{PROGRAM} --help` lists all"
    if typed := re.match(
        r"Error parsing (--\S+): no type matching (.*) could be instantiated from (\[.*?\])", complaint
    ):
        return f"{typed[1]} takes {typed[2]}, got {' '.join(ast.literal_eval(typed[3]))!r}"
    if number := re.match(
        r"Error parsing (--\S+): (?:invalid literal for (int)\(.*|could not convert .*): ('.*')", complaint
    ):
        return f"{number[1]} takes a {'whole ' * bool(number[2])}number, got {number[3]}"
    return re.sub(r"^Error parsing (?:[^-]\S*: )?", "", complaint).replace(" .", ".")


def _switches(struct: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all boolean fields: `wandb.enabled`."""
    for name, hint in typing.get_type_hints(struct).items():
        if hint is bool:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(hint):
            yield from _switches(typing.cast(type, hint), f"{prefix}{name}.")


def _plain_switches(argv: list[str], settings_type: type) -> list[str]:
    """Every sane spelling of a switch as tyro's `--a.b` or `--a.no-b`."""
    words = {
        "true": True,
        "false": False,
        "yes": True,
        "no": False,
        "1": True,
        "0": False,
        "on": True,
        "off": False,
    }
    switches = {name.replace("_", "-") for name in _switches(settings_type)}

    def flag(name: str, value: bool) -> str:
        head, dot, tail = name.rpartition(".")
        return f"--{head}{dot}{'' if value else 'no-'}{tail}"

    out: list[str] = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        name, eq, value = arg.partition("=")
        name = name.removeprefix("--").replace("_", "-") if name.startswith("--") else ""
        if name == "no-wandb":
            name = "no-wandb.enabled"
        if name.removeprefix("no-") in switches and name not in switches:
            out.append(flag(name.removeprefix("no-"), False))
        elif name in switches:
            if not eq and rest and not rest[0].startswith("-"):
                value = rest.pop(0)
            elif not eq:
                value = "true"
            require(value.lower() in words, f"--{name} is a switch: True or False, got {value!r}")
            out.append(flag(name, words[value.lower()]))
        else:
            out.append(arg)
    return out


def _world_size(asked: int | None, dry_run: bool) -> int:
    """The number of processes: torchrun's, or what a dry run is told."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    require(asked is None or asked >= 1, f"--world-size must be 1 or more, got {asked}")
    require(
        dry_run or asked in (None, started),
        f"--world-size {asked} but {started} process{'es were' if started > 1 else ' was'} started; "
        f"use torchrun --nproc-per-node, or add --dry-run",
    )
    return asked if dry_run and asked else started


def find_demo(name: str = DEMO_MANIFEST) -> Path | None:
    """The quickstart's manifest under the current directory or beside the package; None if not made yet."""
    for root in (Path.cwd(), Path(nextvid_mcore.__file__).resolve().parent.parent):
        if (root / name).exists():
            return root / name
    return None


def with_demo_data(config: RunConfig) -> RunConfig:
    """`tiny` without a manifest reads the quickstart's; any other recipe must be told."""
    data = config.data
    if data.manifest is None:
        require(
            config.recipe == "tiny",
            f"recipe {config.recipe} needs data: --data.manifest DIR, written by tools/build_manifest.py",
        )
        found = find_demo()
        if found is None:
            raise ConfigError(
                f"no data: {DEMO_MANIFEST} is not there; run `bash examples/quickstart.sh` once, "
                "or name a manifest with --data.manifest"
            )
        held_out = find_demo(DEMO_EVAL_MANIFEST)
        data = dataclasses.replace(
            data,
            manifest=str(found),
            eval_manifest=data.eval_manifest or (str(held_out) if held_out else None),
        )
    for flag, path in (("--data.manifest", data.manifest), ("--data.eval-manifest", data.eval_manifest)):
        near = difflib.get_close_matches(path or "", [MOVING_DIGITS])
        hint = f"; did you mean {near[0]}?" if near else ""
        require(
            path is None or is_made(path) or Path(path).exists(),
            f"{flag} {path}: no such file or folder{hint}",
        )
    return dataclasses.replace(config, data=data)


def fail(error: Exception | str, code: int = EXIT_CONFIG, everywhere: bool = False) -> NoReturn:
    """Print one message on rank 0 and end the process.

    A launcher ends every process as soon as one has ended, so the others wait until rank 0 has spoken.

    Args:
        everywhere: the failure may be of one rank alone: whoever is still there after the wait speaks too.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(PATIENCE)
    if rank == "0" or everywhere:
        where = f" [rank {rank}]" if rank != "0" else ""
        print(f"nextvid_mcore{where}: {error}", file=sys.stderr, flush=True)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's own last words will be these
            Path(report).write_text(json.dumps({"message": str(error), "timestamp": int(time.time())}))
    raise SystemExit(code)
