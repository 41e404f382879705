"""Checks a recipe before anything is built, so that a typing error costs one line and no time.

The arguments of a class are those of its `__init__`, with their annotations. What is not understood here is left to jsonargparse.
"""

import collections.abc
import enum
import importlib
import inspect
import os
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from matfound.errors import InputError, nearest

#: Keys of an object whose class is named.
OBJECT_KEYS = ("class_path", "init_args", "dict_kwargs")
#: Options of the command that belong to no section.
OWN_OPTIONS = ("config", "help", "print_config")
_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_EMPTY = inspect.Parameter.empty


@dataclass(frozen=True)
class _At:
    """A place in a recipe: keys and indices joined, and whether everything required must be there."""

    file: object
    path: str = ""
    complete: bool = False

    def key(self, name: object) -> "_At":
        return _At(self.file, f"{self.path}.{name}" if self.path else str(name), self.complete)

    def item(self, index: int) -> "_At":
        return _At(self.file, f"{self.path}[{index}]", self.complete)

    def error(self, problem: str, remedy: str = "") -> InputError:
        return InputError(f"{self.path}: {problem}" if self.path else problem, remedy=remedy, file=self.file)


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands here a second time", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def read_recipe(file: Path) -> dict[str, Any]:
    """The content of a YAML recipe.

    Raises:
        InputError: not YAML, or not a mapping; names the line.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)  # noqa: S506 (a safe loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"not valid YAML{line}: {error.problem}", remedy="check the indentation and the brackets", file=file) from error
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {' '.join(str(error).split())}", file=file) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=file) from error
    except UnicodeDecodeError as error:
        raise InputError("not a text file", remedy="give a recipe in YAML", file=file) from error
    if not isinstance(content, dict):
        raise InputError("expected a mapping with the keys model, data, trainer, …", file=file)
    return content


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings joined at every level, the later one's values winning; arguments of another class are not kept."""
    if "class_path" in above and above["class_path"] != below.get("class_path", above["class_path"]):
        return above
    both = {
        key: merge(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return below | above | both


def check_recipe(content: Mapping[str, Any], sections: Mapping[str, Any], file: object, *, complete: bool = False) -> None:
    """Refuse keys that nothing takes, values of the wrong type, and classes that are not there.

    Args:
        content: of the recipe.
        sections: top-level keys, with the class whose arguments they hold, or None for plain values.
        file: for the message.
        complete: also refuse a recipe that lacks something; off where another recipe or the command line may add it.

    Raises:
        InputError: names file, place and, of an unknown key, the nearest known one.
    """
    at = _At(file, complete=complete)
    for key in content:
        if key not in sections:
            raise at.error(f"unknown key '{key}'", nearest(str(key), sections))
    for key, cls in sections.items():
        if cls is not None and (key in content or complete):
            _check_arguments(content.get(key) or {}, cls, at.key(key))


def check_option(name: str, value: str | None, content: Mapping[str, Any], sections: Mapping[str, Any]) -> None:
    """Refuse an option of the command line that overrides nothing, e.g. `--trainer.max_epoch 3`.

    Args:
        name: without dashes.
        value: as text; None if it was not given.
        content: of the recipe that it overrides, which says what class an object has.
        sections: as for `check_recipe`.

    Raises:
        InputError: an unknown name (the nearest is suggested), or a value of the wrong type.
    """
    parts = name.removesuffix("+").split(".")
    if parts[0] not in sections:
        raise InputError(f"unknown option '--{name}'", remedy=nearest(f"--{parts[0]}", [f"--{key}" for key in (*sections, *OWN_OPTIONS)]))
    kind, node, at = sections[parts[0]], content.get(parts[0]), _At("command line", f"--{parts[0]}")
    if kind is None or len(parts) == 1:
        return
    for i, part in enumerate(parts[1:], start=1):
        if isinstance(node, list):  # jsonargparse changes the last of a list
            node = node[-1] if node else None
        if part in OBJECT_KEYS and inspect.isclass(kind):
            if part != "init_args":
                return
        elif inspect.isclass(kind):
            known = _parameters(kind)
            if part not in known:
                before = ".".join(parts[:i])
                raise InputError(
                    f"unknown option '--{name}'", remedy=nearest(f"--{before}.{part}", [f"--{before}.{other}" for other in known])
                )
            kind = known[part].annotation
        elif typing.get_origin(kind) in (dict, collections.abc.Mapping):
            kind = typing.get_args(kind)[1]
        else:
            return
        at = at.key(part)
        if isinstance(node, Mapping) and part not in OBJECT_KEYS and isinstance(node.get("init_args"), Mapping):
            node = node["init_args"]  # which the command line may leave out
        node = node.get(part) if isinstance(node, Mapping) else None
        if i + 1 < len(parts):
            kind = _class_at(kind, node)
    if value is not None and kind is not None and not name.endswith("+"):
        _check(_plain(value), kind, at)


def _plain(value: str) -> Any:
    """What jsonargparse makes of a value on the command line."""
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _class_at(kind: Any, node: Any) -> Any:
    """The class whose arguments an option goes on with, or a mapping's type; None where that is not known."""
    if isinstance(node, list):
        node = node[-1] if node else None
    if isinstance(node, Mapping) and isinstance(node.get("class_path"), str):
        module, _, name = node["class_path"].rpartition(".")
        try:
            return getattr(importlib.import_module(module), name) if module else None
        except (ImportError, AttributeError):
            return None
    for arm in _arms(kind):
        if typing.get_origin(arm) in (dict, collections.abc.Mapping) and typing.get_args(arm):
            return arm
        if _is_object(arm) and not inspect.isabstract(arm) and (node is not None or len(list(_subclasses(arm))) == 1):
            return arm
    return None


def _check(value: Any, kind: Any, at: _At) -> None:
    """Refuse a value that none of a type's alternatives takes."""
    arms = _arms(kind)
    fitting = [arm for arm in arms if _fits(value, arm)]
    if not fitting:
        options = [str(option) for arm in arms if typing.get_origin(arm) is Literal for option in typing.get_args(arm)]
        guess = nearest(value, options) if options and isinstance(value, str) else ""
        words = [_words(arm) for arm in arms if typing.get_origin(arm) is not Literal and not _is_tensor(arm)]
        wanted = " or ".join(dict.fromkeys([", ".join(dict.fromkeys(options)), *words] if options else words))
        raise at.error(f"expected {wanted}, received {_shown(value)}", guess if guess.startswith("did you") else "")
    named = [arm for arm in fitting if _is_object(arm) and isinstance(value, Mapping) and value and value.keys() <= _parameters(arm).keys()]
    errors = []
    for arm in named or fitting:  # whoever writes a class's own arguments means that class
        try:
            _check_inside(value, arm, at)
        except InputError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def _arms(kind: Any) -> list[Any]:
    """The alternatives of a type."""
    if kind is _EMPTY or isinstance(kind, (str, typing.TypeVar)):
        return [Any]
    if typing.get_origin(kind) is typing.Annotated:
        return _arms(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [arm for option in typing.get_args(kind) for arm in _arms(option)]
    return [kind]


def _fits(value: Any, arm: Any) -> bool:
    """Whether the value has the outer shape of a type; True where in doubt."""
    origin = typing.get_origin(arm) or arm
    if arm is types.NoneType:
        return value is None
    if origin is Literal:
        return str(value) in map(str, typing.get_args(arm))
    if arm is bool:
        return isinstance(value, bool) or str(value).lower() in ("true", "false")
    if arm in (int, float):
        return not isinstance(value, (bool, list, Mapping)) and value is not None and _is_number(value, arm)
    if arm is str:
        return value is not None and not isinstance(value, (list, Mapping))
    if origin in _SEQUENCES:
        return isinstance(value, list)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, Mapping)
    if inspect.isclass(arm) and issubclass(arm, enum.Enum):
        return isinstance(value, str) and value in arm.__members__
    if _is_tensor(arm):
        return False
    if origin is collections.abc.Callable or _is_object(arm):
        return isinstance(value, (Mapping, str))
    return True


def _is_number(value: Any, kind: type) -> bool:
    try:
        return kind(str(value)) is not None
    except ValueError:
        return False


def _is_object(arm: Any) -> bool:
    """Whether a type is a class that a recipe makes objects of, and not a plain value's."""
    if not inspect.isclass(arm) or arm in (object, Any) or issubclass(arm, enum.Enum):
        return False
    return arm.__module__ not in ("builtins", "datetime", "pathlib", "os", "torch")


def _is_tensor(arm: Any) -> bool:
    return inspect.isclass(arm) and (arm.__module__, arm.__name__) == ("torch", "Tensor")


def _words(arm: Any) -> str:
    origin = typing.get_origin(arm) or arm
    plain = {types.NoneType: "nothing", bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if origin in plain:
        return plain[origin]
    if origin in _SEQUENCES:
        return "a list"
    if origin in (dict, collections.abc.Mapping):
        return "a mapping"
    if inspect.isclass(arm) and issubclass(arm, enum.Enum):
        return ", ".join(arm.__members__)
    return f"a class_path with init_args ({getattr(_base(arm)[0], '__name__', arm)})"


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) < 80 else text[:77] + "…"


def _check_inside(value: Any, arm: Any, at: _At) -> None:
    """Check what a value holds, which has the outer shape of a type."""
    origin, items = typing.get_origin(arm) or arm, typing.get_args(arm)
    if origin is collections.abc.Callable or _is_object(arm):
        _check_object(value, arm, at)
    elif isinstance(value, Mapping) and "class_path" in value:
        _check_object(value, Any, at)
    elif isinstance(value, Mapping) and arm is not Any:
        for key, item in value.items():
            _check(item, items[1] if len(items) == 2 else Any, at.key(key))
    elif isinstance(value, list):
        alike = origin is not tuple or (len(items) == 2 and items[1] is Ellipsis)
        for n, item in enumerate(value):
            _check(item, items[0] if items and alike else Any, at.item(n))


def _base(arm: Any) -> tuple[Any, int]:
    """The class of the object that a type stands for, and how many arguments it gets from the caller."""
    if typing.get_origin(arm) is collections.abc.Callable:
        arguments, result = typing.get_args(arm) or ([], Any)
        return _arms(result)[0], len(arguments) if isinstance(arguments, list) else 0
    return arm, 0


def _check_object(value: Mapping[str, Any] | str, arm: Any, at: _At) -> None:
    base, given = _base(arm)
    if isinstance(value, str):
        if value.endswith((".yaml", ".yml", ".json")) or Path(value).exists() or (inspect.isclass(base) and issubclass(base, os.PathLike)):
            return
        value = {"class_path": value}
    if "class_path" not in value:
        if value.keys() <= {"init_args", "dict_kwargs"} and not at.complete:
            return  # the class is named elsewhere
        known = _parameters(base, given) if inspect.isclass(base) else {}
        if inspect.isabstract(base) or (any(key not in known for key in value) and len(list(_subclasses(base))) > 1):
            classes = [cls for cls in _subclasses(base) if not cls.__name__.startswith("_")]
            examples = sorted(_path(cls) for cls in classes if not cls.__subclasses__())
            usual = [name for name in map(_path, classes) if name.endswith(USUAL)] or examples
            raise at.error("class_path is missing", "name the class" + (f", e.g. class_path: {usual[0]}" if usual else ""))
        _check_arguments(value, base, at, given)
        return
    cls = _find_class(value["class_path"], base, at)
    for key in value:
        if key not in OBJECT_KEYS:
            remedy = "arguments of a class go under init_args"
            raise at.error(f"unknown key '{key}'", remedy if key in _parameters(cls, given) else nearest(str(key), OBJECT_KEYS))
    if inspect.isclass(cls) and inspect.isclass(base) and base is not Any and not issubclass(cls, base):
        raise at.error(f"{_path(cls)} is no {base.__name__}", "check class_path")
    _check_arguments(value.get("init_args") or {}, cls, at.key("init_args"), given)


def _find_class(name: Any, base: Any, at: _At) -> Any:
    """The class of a class_path: a dotted path, or the bare name of a known class."""
    if not isinstance(name, str) or not name:
        raise at.error(f"class_path must be the dotted path of a class, received {_shown(name)}")
    module, _, last = name.rpartition(".")
    if not module:
        known = {cls.__name__: cls for cls in _subclasses(base)}
        if last not in known:
            raise at.error(f"there is no class '{name}'", nearest(name, known) if known else "write its dotted path")
        return known[last]
    try:
        home = importlib.import_module(module)
    except ImportError as error:
        raise at.error(f"cannot import '{module}': {error}", "check class_path") from None
    if not callable(getattr(home, last, None)):
        classes = [other for other in dir(home) if inspect.isclass(getattr(home, other))]
        raise at.error(f"there is no class '{last}' in {module}", nearest(last, classes))
    return getattr(home, last)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def _subclasses(base: Any) -> Iterator[type]:
    """Every class below one that has been imported, itself included."""
    if inspect.isclass(base) and base not in (Any, object, type):
        yield base
        for cls in base.__subclasses__():
            yield from _subclasses(cls)


def _check_arguments(value: Any, cls: Any, at: _At, given: int = 0) -> None:
    if not isinstance(value, Mapping):
        raise at.error(f"expected a mapping of arguments, received {_shown(value)}")
    parameters = _parameters(cls, given)
    for key, item in value.items():
        if key not in parameters:
            raise at.error(f"unknown key '{key}'", nearest(str(key), parameters))
        if item is not None or parameters[key].default is not None:
            _check(item, parameters[key].annotation, at.key(key))
    if at.complete:
        for key, parameter in parameters.items():
            if parameter.default is _EMPTY and key not in value:
                raise at.error(f"the key '{key}' is missing")


#: Classes to name as an example where others would be as good.
USUAL = (".FileDataset", ".NequIP")


def _parameters(cls: Any, given: int = 0) -> dict[str, inspect.Parameter]:
    """What a recipe may give to a class or function; `given` arguments come from the caller."""
    try:
        signature = inspect.signature(cls, eval_str=True)
    except (NameError, TypeError, SyntaxError):  # annotations for type checkers only
        signature = inspect.signature(cls)
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found = {parameter.name: parameter for parameter in named[given:]}
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        from jsonargparse import ArgumentParser

        # jsonargparse follows **kwargs to the function that takes them; anything else it refuses.
        names = ArgumentParser().add_class_arguments(cls, "object", fail_untyped=False) if inspect.isclass(cls) else []
        for name in (name.removeprefix("object.") for name in names):
            found.setdefault(name, inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None))
    return found
