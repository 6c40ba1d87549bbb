"""What a client sends and gets: the protocol of `mlflow models serve`, checked field by field.

    {"inputs": [...], "params": {"k": 5}}              a list of inputs, or {FIELD: [...]}; also as "instances"
    {"dataframe_split": {"columns": [FIELD], "data": [[...]]}}
    {"dataframe_records": [{FIELD: ...}]}
    -> {"predictions": [{"input": 0, "rank": 1, "class_id": 7, "class": "...", "score": 0.9}, ...]}

A text is a string, an image a string of base64, an array nested lists of numbers, whole or not.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from labelmill.errors import UserError
from labelmill.tracking.model import ModelSpec

MOST_ANSWERS = 1000
_FORMATS = ("inputs", "instances", "dataframe_split", "dataframe_records")


class RequestError(UserError):
    """A request that can't be answered; the message begins with the field that is wrong."""


@dataclass(frozen=True)
class Query:
    """A request that was understood.

    Attributes:
        inputs: texts, bytes of images, or nested lists of numbers.
        k: answers an input.
    """

    inputs: list[Any]
    k: int


def read_request(body: bytes, spec: ModelSpec, most: int) -> Query:
    """The request in a body. Raises RequestError that names the field; at most `most` inputs are taken."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"body: not JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise RequestError(f"body: an object is needed, not a {type(content).__name__}")
    unknown = sorted(set(content) - {*_FORMATS, "params"})
    given = [name for name in _FORMATS if name in content]
    if unknown or len(given) != 1:
        what = (
            f"{unknown[0]}: unknown field"
            if unknown
            else "inputs: missing"
            if not given
            else f"{given[1]}: one too many"
        )
        raise RequestError(f"{what}; send one of {', '.join(_FORMATS)}, and params if you like")
    values, path = _values(given[0], content[given[0]], spec.field)
    if len(values) > most:
        raise RequestError(f"{path}: {len(values)} inputs, at most {most} are taken at once")
    return Query([_input(value, f"{path}[{i}]", spec) for i, value in enumerate(values)], _k(content.get("params")))


def _values(form: str, value: Any, field: str) -> tuple[list[Any], str]:
    """The inputs, and the path that leads to them."""
    match form:
        case "dataframe_split":
            return _split(value, field)
        case "dataframe_records":
            rows = _list(value, form)
            for i, row in enumerate(rows):
                if not isinstance(row, dict) or field not in row:
                    raise RequestError(f"{form}[{i}].{field}: missing; the model takes the field {field!r}")
            return [row[field] for row in rows], f"{form}.{field}"
    if isinstance(value, dict):
        if set(value) != {field}:
            wrong = next((name for name in value if name != field), field)
            raise RequestError(f"{form}.{wrong}: the model takes the field {field!r} alone")
        return _list(value[field], f"{form}.{field}"), f"{form}.{field}"
    return _list(value, form), form


def _split(value: Any, field: str) -> tuple[list[Any], str]:
    form = "dataframe_split"
    if not isinstance(value, dict) or "columns" not in value or "data" not in value:
        raise RequestError(f"{form}: an object with columns and data is needed")
    columns, rows = _list(value["columns"], f"{form}.columns"), _list(value["data"], f"{form}.data")
    if field not in columns:
        raise RequestError(f"{form}.columns: {field!r} is missing; the model takes the field {field!r}")
    at = columns.index(field)
    for i, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != len(columns):
            raise RequestError(f"{form}.data[{i}]: a list of {len(columns)} values is needed")
    return [row[at] for row in rows], f"{form}.{field}"


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise RequestError(f"{path}: a list is needed, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _input(value: Any, path: str, spec: ModelSpec) -> Any:
    if spec.input == "array":
        shape = _shape(value, path)
        if spec.shape is not None and shape != tuple(spec.shape):
            raise RequestError(f"{path}: shape {shape}, the model takes {tuple(spec.shape)}")
        return value
    if not isinstance(value, str):
        raise RequestError(
            f"{path}: a {'text' if spec.input == 'text' else 'base64 text'} is needed, not {_kind(value)}"
        )
    if spec.input == "text":
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise RequestError(f"{path}: half of a surrogate pair is no text")
        return value
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        raise RequestError(f"{path}: not base64") from None


def _shape(value: Any, path: str, depth: int = 0) -> tuple[int, ...]:
    """Shape of nested lists of finite numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value - value != 0:
            raise RequestError(f"{path}: {value} is no number to reckon with")
        return ()
    if not isinstance(value, list) or depth > 8:
        raise RequestError(f"{path}: a number is needed, not {_kind(value)}")
    shapes = [_shape(part, f"{path}[{i}]", depth + 1) for i, part in enumerate(value)]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise RequestError(f"{path}[{i}]: shape {shape}, but {path}[0] has {shapes[0]}")
    return (len(value), *(shapes[0] if shapes else ()))


def _k(params: Any) -> int:
    if params is None:
        return 5
    if not isinstance(params, dict):
        raise RequestError(f"params: an object is needed, not {_kind(params)}")
    if unknown := sorted(set(params) - {"k"}):
        raise RequestError(f"params.{unknown[0]}: unknown; there is params.k")
    k = params.get("k", 5)
    if isinstance(k, float) and k.is_integer():
        k = int(k)
    if not isinstance(k, int) or isinstance(k, bool):
        raise RequestError(f"params.k: a whole number is needed, not {_kind(k)}")
    if not 1 <= k <= MOST_ANSWERS:
        raise RequestError(f"params.k: {k} isn't between 1 and {MOST_ANSWERS}")
    return k


def write_answer(records: Sequence[dict[str, Any]]) -> bytes:
    """The body of an answer."""
    return json.dumps({"predictions": list(records)}, ensure_ascii=False).encode()


def write_error(code: str, message: str) -> bytes:
    """The body of a refusal, in MLflow's form."""
    return json.dumps({"error_code": code, "message": message}, ensure_ascii=False).encode()
