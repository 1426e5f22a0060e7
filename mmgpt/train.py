"""`python -m mmgpt.train [--config FILE] [--key value ...]`: one run, from configuration to exported model.

Without --config it trains configs/quickstart.yaml. Exit codes: 0 done, 1 failure, 2 wrong usage, 130 stopped by Ctrl-C
(the run has saved its state: add --resume true to go on).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from mmgpt.config import RunConfig, SourceConfig, TrainerConfig, check_values
from mmgpt.errors import UsageError, run_cli

if TYPE_CHECKING:
    from mmgpt.run import Run


def find_config(name: str) -> Path:
    """A configuration file: the path itself, or one of the project's own by name (`quickstart`)."""
    packaged = [Path(__file__).parent.parent / "configs", Path(__file__).parent / "configs"]
    for path in (Path(name), *(folder / f"{name.removesuffix('.yaml')}.yaml" for folder in packaged)):
        if path.is_file():
            return path
    known = sorted({str(path.relative_to(folder)) for folder in packaged for path in folder.rglob("*.yaml")})
    raise UsageError(f"there is no configuration file {name}; the project's own are {', '.join(known)}")


def parse(arguments: list[str] | None = None) -> RunConfig:
    """Read the command line into a `RunConfig`.

    Raises:
        UsageError: unknown key (the nearest known one is named), wrong type, number out of range, missing file.
    """
    from jsonargparse import ArgumentParser

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not any(argument == "--config" or argument.startswith("--config=") for argument in arguments):
        arguments = ["--config", "quickstart", *arguments]
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            arguments[position + 1] = str(find_config(arguments[position + 1]))
            check_file(Path(arguments[position + 1]))
        elif argument.startswith("--config="):
            arguments[position] = f"--config={find_config(argument.removeprefix('--config='))}"
            check_file(Path(arguments[position].removeprefix("--config=")))
    arguments = whole_sources(arguments)
    parser = ArgumentParser(prog="python -m mmgpt.train", exit_on_error=False, allow_abbrev=False, description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file; later arguments override it")
    parser.add_class_arguments(RunConfig)
    try:
        settings = parser.parse_args(arguments)
        settings.pop("config", None)
        config = RunConfig(**parser.instantiate(settings).as_dict())
    except Exception as error:
        raise UsageError(explain(str(error), known_keys(RunConfig))) from error
    check_values(config)
    return config


def whole_sources(arguments: list[str]) -> list[str]:
    """Write the defaults into sources given on the command line, as in `--data.train '[{path: photos}]'`.

    jsonargparse fills what an element of a list leaves out from the element that it replaces: photos would inherit the split
    and the limit of the configuration's own data set.
    """
    import yaml

    result = list(arguments)
    for position, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if name not in ("--data.train", "--data.validation") or not (equals or position + 1 < len(arguments)):
            continue
        try:
            given = yaml.safe_load(text if equals else arguments[position + 1])
        except yaml.YAMLError:
            continue  # the parser says what is wrong with it
        if isinstance(given, list) and all(isinstance(source, dict) for source in given):
            filled = json.dumps([{**dataclasses.asdict(SourceConfig()), **source} for source in given], default=str)
            result[position if equals else position + 1] = f"{name}={filled}" if equals else filled
    return result


def check_file(path: Path) -> None:
    """Find what is wrong with the shape of a configuration file, where the parser would only say that something is.

    Raises:
        UsageError: not YAML (with the line), not a mapping, or a key that does not exist, at any depth.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    _check_shape(settings, RunConfig, "", path)


def _check_shape(settings: Any, config: type, prefix: str, path: Path) -> None:
    if not isinstance(settings, dict):
        found = f"{prefix.rstrip('.') or 'the file'} is {'empty' if settings is None else str(settings)[:60]}"
        keys = ", ".join(get_type_hints(config))
        raise UsageError(f"{path}: {found}, but must be a mapping with keys of {keys}")
    hints = get_type_hints(config)
    for key, value in settings.items():
        if key not in hints:
            raise UsageError(f"{path}: {explain(f'key {prefix}{key} is not expected', known_keys(RunConfig))}")
        for inner in (hints[key], *get_args(hints[key])):
            if not dataclasses.is_dataclass(inner):
                continue
            if get_origin(hints[key]) is list:
                for element in value if isinstance(value, list) else []:
                    _check_shape(element, inner, f"{prefix}{key}.", path)  # type: ignore[arg-type]
            elif value is not None:
                _check_shape(value, inner, f"{prefix}{key}.", path)  # type: ignore[arg-type]


def known_keys(config: type, prefix: str = "") -> list[str]:
    """Every key of a configuration, dotted."""
    keys = []
    for name, hint in get_type_hints(config).items():
        keys.append(f"{prefix}{name}")
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner):
                keys += known_keys(inner, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def explain(message: str, keys: list[str]) -> str:
    """Say what is wrong with a configuration in few words, with the nearest known key where one is unknown."""
    unknown = re.search(
        r"[Kk]ey '?([\w.]+)'? is not expected|Option '([\w.]+)' is not accepted|nrecognized arguments: --([\w.]+)", message
    )
    within = re.search(r"[Pp]arser key \"([\w.]+)\"", message)
    if unknown:
        name = next(group for group in unknown.groups() if group)
        if within and not name.startswith(within[1]):
            name = f"{within[1]}.{name}"
        # Of several keys with one last word, the first: trainer.epochs rather than ppo.epochs.
        leaves = {key.split(".")[-1]: key for key in reversed(keys)}
        last = name.split(".")[-1]
        near = [leaves[name]] if name in leaves else difflib.get_close_matches(name, keys, 1)
        near = near or [leaves[leaf] for leaf in difflib.get_close_matches(last, list(leaves), 1)]
        return f"unknown key {name}" + (f": did you mean {near[0]}?" if near else "") + " (--print_config shows every key)"
    # jsonargparse indents its explanation; the first lines say what and where, the rest repeats the type. In a choice of
    # types, what is wrong comes after a list of them.
    message = re.sub(r"Does not validate against any of the Union subtypes\s+Subtypes: .*\s+Errors:\s+-?", "", message)
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    text = re.sub(r'[Pp]arser key "([\w.]+)":', r"\1:", " ".join(lines[:4]))
    text = re.sub(r"Problem with given class_path '[\w.]+': ", "", text)
    text = re.sub(r"[Ee]xpected an? <class '(\w+)'>", r"expected \1", text)
    text = re.sub(r"[Ee]xpected an? typing\.Literal\[(.*?)\]", r"expected one of \1", text)
    return text.replace(". Got value:", ", got")


def _quiet() -> None:
    """Keep the libraries' advertisements, and warnings that no user can act on, out of the log."""
    import lightning.pytorch  # noqa: F401  (sets its own log level when imported)

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (".*isinstance.treespec, LeafSpec.*", ".*module.s. in eval mode.*", ".*does not have many workers.*"):
        warnings.filterwarnings("ignore", message=pattern)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def main(arguments: list[str] | None = None) -> int:
    config = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet()
    for before in runs_before(config):
        print(f"first: {before.run_dir} ({before.stage})", file=sys.stderr, flush=True)
        make_run(before).execute()
    return make_run(config).execute()


def runs_before(config: RunConfig, seen: tuple[str, ...] = ()) -> list[RunConfig]:
    """The runs that a run stands on (`first`) and whose model is not there yet, in the order to take them in.

    One that was stopped goes on from its checkpoint.

    Raises:
        UsageError: a configuration that does not exist, or that stands on itself.
    """
    needed: list[RunConfig] = []
    if config.show_batch or config.resume:
        return needed
    for name in config.first:
        if name in seen:
            raise UsageError(f"first: {' -> '.join((*seen, name))} goes in a circle")
        before = parse(["--config", name])
        folder = Path(before.run_dir)
        if (folder / "model" / "config.json").is_file() or any(other.run_dir == before.run_dir for other in needed):
            continue
        before.resume = (folder / "checkpoints" / "last.ckpt").is_file()
        # The machine is the same one: what was said of it on the command line holds for all runs.
        for key in ("threads", "accelerator", "devices", "progress"):
            value = getattr(config.trainer, key)
            if value != getattr(TrainerConfig(), key):
                setattr(before.trainer, key, value)
        needed += runs_before(dataclasses.replace(before, resume=False), (*seen, name))
        needed.append(before)
    return needed


def make_run(config: RunConfig) -> Run:
    """The run of a configuration's stage."""
    if config.stage in ("reward", "preference"):
        from mmgpt.run_reward import PreferenceRun, RewardRun

        return (RewardRun if config.stage == "reward" else PreferenceRun)(config)
    if config.stage == "ppo":
        from mmgpt.run_ppo import PpoRun

        return PpoRun(config)
    from mmgpt.run import Run

    return Run(config)


if __name__ == "__main__":
    sys.exit(run_cli(main))
