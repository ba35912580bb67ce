"""Recipes from YAML: every mistake at once, with the path of the key, its line and a hint.

Imports no torch.
"""

import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from growmoe.errors import UsageError
from growmoe.recipe import REFERENCES, STAGES, Recipe

Loc = tuple[str | int, ...]


@dataclasses.dataclass
class _Document:
    value: Any
    lines: dict[Loc, int]


def _compose(text: str, file: str) -> _Document:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{file}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    lines: dict[Loc, int] = {}
    problems: list[str] = []
    value = _plain(root, (), lines, problems, file)
    if problems:
        raise UsageError("\n".join(problems))
    return _Document(value, lines)


def _plain(
    node: yaml.Node | None, at: Loc, lines: dict[Loc, int], problems: list[str], file: str
) -> Any:
    """The plain value of a YAML node; notes the line of every key, and keys given twice."""
    if node is None:
        return None
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in result:
                problems.append(f"{file}:{line}: {_path((*at, key))} is given twice")
            lines[(*at, key)] = line
            result[key] = _plain(value_node, (*at, key), lines, problems, file)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [
            _plain(item, (*at, i), lines, problems, file) for i, item in enumerate(node.value)
        ]  # fmt: skip
    loader = yaml.SafeLoader("")
    try:
        return _number(loader.construct_object(node), node)
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"{file}:{node.start_mark.line + 1}: {_path(at)}: {error}")
        return None


def _number(value: Any, node: yaml.Node) -> Any:
    """YAML 1.1 reads 3e-4 as text; people mean the number."""
    if isinstance(value, str) and isinstance(node, yaml.ScalarNode) and node.style is None:
        try:
            return float(value) if "e" in value.lower() and value[:1] in "+-.0123456789" else value
        except ValueError:
            return value
    return value


def _path(loc: Loc) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "the recipe"


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and check a recipe; `overrides` are `a.b.c=value` with stage names or numbers in the
    path. Raises UsageError with one line per problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    document = _compose(text, str(path))
    if not isinstance(document.value, dict):
        raise UsageError(f"{path}: a recipe is a mapping with 'name' and 'stages'")
    source: dict[Loc, str] = {}
    for override in overrides or []:
        apply_override(document.value, override, source)
    problems = list(_reference_problems(document, str(path), source))
    try:
        recipe = check(TypeAdapter(Recipe), document, str(path), source)
    except UsageError as error:
        raise UsageError("\n".join([str(error), *problems])) from None
    if problems:
        raise UsageError("\n".join(problems))
    for index in range(len(recipe.stages)):
        recipe._places[index] = _where(("stages", index), document, str(path), source)
    return recipe


def apply_override(value: dict[str, Any], override: str, source: dict[Loc, str]) -> None:
    """Set one `a.b.c=value` in a parsed recipe; `source` remembers where a value came from."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"override '{override}' is not of the form key.path=value")
    try:
        parsed = _compose(text, f"override '{key}'").value
    except UsageError as error:
        raise UsageError(str(error).splitlines()[0]) from None
    at: list[str | int] = []
    place: Any = value
    parts = key.split(".")
    if parts[0] not in Recipe.model_fields:
        parts = ["stages", *parts]
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(place, list):
            index = _list_index(place, part, override)
            at.append(index)
            if last:
                place[index] = parsed
            place = place[index]
            continue
        if not isinstance(place, dict):
            raise UsageError(f"override '{override}': {_path(tuple(at))} holds no keys")
        at.append(part)
        if last:
            place[part] = parsed
        else:
            place = place.setdefault(part, {})
    source[tuple(at)] = f"override '{override}'"


def _list_index(items: list[Any], part: str, override: str) -> int:
    names = [item.get("name", item.get("stage")) if isinstance(item, dict) else None for item in items]  # fmt: skip  # noqa: E501
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    known = [str(name) for name in names if name]
    hint = did_you_mean(part, known) or f"; there are {', '.join(known)}"
    raise UsageError(f"override '{override}': nothing is called '{part}'{hint}")


def check(
    adapter: TypeAdapter[Any], document: _Document, file: str, source: dict[Loc, str]
) -> Any:  # fmt: skip
    """Validate with pydantic; raises UsageError with one line per problem."""
    try:
        return adapter.validate_python(document.value)
    except ValidationError as error:
        lines = [
            f"{_where(_clean_loc(e['loc']), document, file, source)}: {_message(e)}"
            for e in error.errors()
        ]
        raise UsageError("\n".join(lines)) from None


def _clean_loc(loc: Loc) -> Loc:
    """pydantic puts the discriminator's value and the members of unions into the path; the file has
    no such keys."""
    loc = tuple(part for part in loc if not (isinstance(part, str) and "[" in part))
    if len(loc) > 2 and loc[0] == "stages" and loc[2] in STAGES:
        return (*loc[:2], *loc[3:])
    return loc


def _where(loc: Loc, document: _Document, file: str, source: dict[Loc, str]) -> str:
    for size in range(len(loc), -1, -1):
        if loc[:size] in source:
            return f"{source[loc[:size]]}: {_path(loc)}"
    for size in range(len(loc), -1, -1):
        if loc[:size] in document.lines:
            return f"{file}:{document.lines[loc[:size]]}: {_path(loc)}"
    return f"{file}: {_path(loc)}"


def _message(error: Any) -> str:
    kind, loc = error["type"], error["loc"]
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(str(loc[-1]), _known_keys(loc))}"
    if kind == "missing":
        return "this key is required"
    if kind == "union_tag_invalid":
        tag = error["ctx"]["tag"]
        return f"unknown stage '{tag}'{did_you_mean(tag, list(STAGES))}"
    if kind == "union_tag_not_found":
        return f"the key 'stage' is required; it is one of {', '.join(STAGES)}"
    text = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f", not {given!r}" if not isinstance(given, dict | list | BaseModel) else ""
    return text[0].lower() + text[1:] + (shown if kind != "value_error" else "")


def _known_keys(loc: Loc) -> list[str]:
    """The keys that are allowed where `loc` has an unknown one."""
    model: Any = Recipe
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        if part in STAGES and model is Recipe:
            model = STAGES[str(part)]
        elif isinstance(part, str) and hasattr(model, "model_fields"):
            field = model.model_fields.get(part)
            model = _model_inside(field.annotation, model) if field else model
    return list(getattr(model, "model_fields", {}))


def _model_inside(annotation: Any, default: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_model_inside(inner, None) for inner in getattr(annotation, "__args__", ())]
    models = [model for model in found if model is not None]
    return models[0] if len(models) == 1 else default


def did_you_mean(word: str, known: list[str]) -> str:
    """ "; did you mean 'x'?" for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _reference_problems(
    document: _Document, file: str, source: dict[Loc, str]
) -> Iterator[str]:  # fmt: skip
    """Stages that refer to what does not come before them, or to the wrong kind of stage.

    Works on the parsed YAML, so that these problems are reported beside all others."""
    stages = document.value.get("stages")
    named = [
        (index, stage, str(stage.get("name", STAGES[stage["stage"]].model_fields["name"].default)))
        for index, stage in enumerate(stages if isinstance(stages, list) else [])
        if isinstance(stage, dict) and str(stage.get("stage")) in STAGES
    ]
    before: dict[str, str] = {}
    for index, stage, name in named:
        at: Loc = ("stages", index)
        if name in before:
            where = _where((*at, "name"), document, file, source)
            yield f"{where}: two stages are called '{name}'"
        for key, kinds in REFERENCES.items():
            value = stage.get(key)
            if not isinstance(value, str):
                continue
            where = _where((*at, key), document, file, source)
            if value in before:
                if before[value] not in kinds:
                    yield f"{where}: '{value}' is a {before[value]} stage, not {' or '.join(kinds)}"
            elif not Path(value).exists():
                later = value in [other for i, _, other in named if i >= index]
                hint = "; it comes later" if later else did_you_mean(value, list(before))
                yield f"{where}: '{value}' is neither an earlier stage nor an existing path{hint}"
        before[name] = stage["stage"]


def stage_from_options(kind: str, options: dict[str, Any], overrides: list[str]) -> Any:
    """One stage from command-line options plus `key.path=value` pairs, checked like a recipe."""
    value: dict[str, Any] = {"stage": kind}
    value |= {key: given for key, given in options.items() if given is not None}
    source: dict[Loc, str] = {}
    wrapped = {"stages": [value]}
    for override in overrides:
        apply_override(wrapped, f"stages.0.{override}", source)
    adapter: TypeAdapter[Any] = TypeAdapter(STAGES[kind])
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        lines = []
        for e in error.errors():
            e["loc"] = ("stages", 0, kind, *e["loc"])
            loc = _clean_loc(e["loc"])[2:]
            lines.append(f"{_path(loc) if loc else kind}: {_message(e)}")
        raise UsageError("\n".join(lines)) from None
