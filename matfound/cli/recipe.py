"""Checks the names in a recipe before anything is built, so that a typing error costs one line and no time."""

import importlib
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from matfound.errors import InputError, nearest


def read_recipe(file: Path) -> dict[str, Any]:
    """The content of a YAML recipe.

    Raises:
        InputError: not YAML, or not a mapping; names the line.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InputError(f"not valid YAML: {problem}", file=file) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", file=file) from error
    if not isinstance(content, dict):
        raise InputError("expected a mapping with the keys model, data, trainer, …", file=file)
    return content


def check_recipe(content: Mapping[str, Any], sections: Mapping[str, Any], file: object) -> None:
    """Refuse keys that nothing takes.

    Args:
        content: of the recipe.
        sections: top-level keys, with the class whose arguments they hold, or None for plain values.
        file: for the message.

    Raises:
        InputError: an unknown key or class; the nearest name is suggested.
    """
    for key, value in content.items():
        if key not in sections:
            raise InputError(f"unknown key '{key}'", remedy=nearest(str(key), sections), file=file)
        if sections[key] is not None:
            _check_arguments(value, sections[key], str(key), file)


def _check_arguments(value: Any, cls: Any, place: str, file: object) -> None:
    if not isinstance(value, Mapping):
        return
    if "class_path" in value:
        _check_class(value, place, file)
        return
    parameters = inspect.signature(cls).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key, item in value.items():
        if key not in parameters:
            if open_ended:
                continue
            raise InputError(f"{place}: unknown key '{key}'", remedy=nearest(str(key), [p for p in parameters if p != "self"]), file=file)
        _check_value(item, parameters[key].annotation, f"{place}.{key}", file)


def _check_class(value: Mapping[str, Any], place: str, file: object) -> None:
    for key in value:
        if key not in ("class_path", "init_args", "dict_kwargs"):
            raise InputError(f"{place}: unknown key '{key}'", remedy="arguments of a class go under init_args", file=file)
    module, _, name = str(value["class_path"]).rpartition(".")
    try:
        home = importlib.import_module(module) if module else None
    except ImportError as error:
        raise InputError(f"{place}: cannot import '{module}': {error}", remedy="check class_path", file=file) from None
    if home is None:
        return  # A bare name: jsonargparse looks it up among the imported subclasses.
    cls = getattr(home, name, None)
    if cls is None:
        known = [n for n in dir(home) if isinstance(getattr(home, n), type)]
        raise InputError(f"{place}: there is no class '{name}' in {module}", remedy=nearest(name, known), file=file)
    _check_arguments(value.get("init_args", {}), cls, f"{place}.init_args", file)


def _check_value(value: Any, annotation: Any, place: str, file: object) -> None:
    origin = typing.get_origin(annotation)
    if isinstance(value, Mapping):
        if "class_path" in value:
            _check_class(value, place, file)
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            items = typing.get_args(annotation)
            for key, item in value.items():
                _check_value(item, items[1] if len(items) == 2 else Any, f"{place}.{key}", file)
        elif (cls := _class_of(annotation)) is not None:
            _check_arguments(value, cls, place, file)
    elif isinstance(value, list):
        items = typing.get_args(annotation) if isinstance(origin, type) and issubclass(origin, Sequence) else ()
        for n, item in enumerate(value):
            _check_value(item, items[0] if items else Any, f"{place}[{n}]", file)


def _class_of(annotation: Any) -> type | None:
    """The one class of a plain or optional annotation whose arguments a mapping can hold."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        arms = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
        return _class_of(arms[0]) if len(arms) == 1 else None
    plain = isinstance(annotation, type) and typing.get_origin(annotation) is None
    return annotation if plain and annotation.__module__ not in ("builtins", "typing", "collections.abc") else None
