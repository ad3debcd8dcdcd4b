"""Small pieces of requests and answers for the tests of the server."""

import base64
import io
from typing import Any

from PIL import Image

from unimodal.serving.openai_shapes import data_uri


def picture(index: int = 0) -> Image.Image:
    image = Image.new("RGB", (24, 20), (40 * index % 255, 90, 255 - 30 * index % 255))
    image.paste((250, 250, 20), (index, index, index + 9, index + 9))
    return image


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(image)}}


def user(*parts: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def opened(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))
