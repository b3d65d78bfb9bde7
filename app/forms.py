"""An uploaded image with text fields beside it: what /noise and /denoise read."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile

from app import errors
from app.access import flow_of
from app.http import read_form
from app.schemas import Body, parse_fields


async def read_upload(request: Request, schema: type[Body], held: ExitStack) -> tuple[bytes, Body]:
    """The file `image` of a multipart form, and its other fields. They count as held until `held` is closed.

    Raises:
        UnsupportedMedia, TooLarge, TooSlow, UploadsFull, Invalid.
    """
    hold = request.app.state.uploads.bytes.share(held, flow_of(request.state))
    form = await read_form(request, request.app.state.settings.max_body_bytes, hold)
    try:
        upload = _image(form)
        return await upload.read(), parse_fields({k: v for k, v in form.items() if k != "image"}, schema)
    finally:
        await form.close()


def _image(form: FormData) -> UploadFile:
    """The upload, once it is clear that every part is there once and in its kind."""
    for name in form:
        if len(form.getlist(name)) > 1:
            raise errors.Invalid.field(name, "given more than once")
    upload = form.get("image")
    if not isinstance(upload, UploadFile):
        raise errors.Invalid.field("image", "a file is required: -F image=@digit.png")
    for name, value in form.items():
        if name != "image" and isinstance(value, UploadFile):
            raise errors.Invalid.field(name, "must be a text field, not a file")
    return upload


LABEL = {"type": "string", "pattern": r"^(\d{1,4}|null)(,(\d{1,4}|null))*$", "examples": ["7", "4,null,2"]}


def _without_null(field: dict[str, Any]) -> dict[str, Any]:
    given = [kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {name: value for name, value in field.items() if name not in ("anyOf", "default")}
    return {**rest, **given[0]} if len(given) == 1 else field


def form_schema(schema: type[BaseModel], formats: str = "PNG, JPEG, WebP, GIF or BMP") -> dict[str, Any]:
    """The request body of such a form, for OpenAPI. It is text: a field is left out where JSON has null."""
    form = schema.model_json_schema()
    image = {"type": "string", "format": "binary", "description": f"{formats}."}
    fields = {name: _without_null(field) for name, field in form["properties"].items()}
    if "label" in fields:
        fields["label"] = {**LABEL, "description": fields["label"]["description"]}
    form["properties"] = {"image": image, **fields}
    form["required"] = ["image", *form.get("required", [])]
    return {"required": True, "content": {"multipart/form-data": {"schema": form}}}
