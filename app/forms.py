"""An uploaded image with text fields beside it: what /noise and /denoise read."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile

from app import errors
from app.http import read_form
from app.schemas import Body, parse_fields


async def read_upload(request: Request, schema: type[Body]) -> tuple[bytes, Body]:
    """The file `image` of a multipart form, and its other fields.

    Raises:
        UnsupportedMedia, TooLarge, Invalid.
    """
    form = await read_form(request, request.app.state.settings.max_body_bytes)
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


def form_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The request body of such a form, for OpenAPI."""
    form = schema.model_json_schema()
    image = {"type": "string", "format": "binary", "description": "PNG, JPEG, WebP, GIF or BMP."}
    form["properties"] = {"image": image, **form["properties"]}
    form["required"] = ["image", *form.get("required", [])]
    return {"required": True, "content": {"multipart/form-data": {"schema": form}}}
