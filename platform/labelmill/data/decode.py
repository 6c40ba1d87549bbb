"""Encoded field values -> arrays. A value that can't be decoded becomes a hole that is named, not an
exception.

Shape legend: B samples, H height, W width, C channels.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image, UnidentifiedImageError

from labelmill.data.manifest import FieldSpec
from labelmill.data.records import decode_arrow, decode_npy, decode_safetensors
from labelmill.errors import DataError, did_you_mean

Bad = list[tuple[str, str]]
"""(key, reason) of each value that couldn't be decoded."""

ImageDecoder = Callable[..., tuple[np.ndarray, np.ndarray, Bad]]
"""`decode_views` or what stands in for it: the same arguments, the same result."""

IMAGE_DECODERS = "labelmill.image_decoders"
"""Entry points of further image decoders, e.g. on a GPU; `data.image_decoder` of a job names one."""

_RECORDS: dict[str, Callable[[Any], Any]] = {"safetensors": decode_safetensors, "arrow": decode_arrow}
_PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_JPEG_SPACES = {1: "GRAY", 3: "RGB"}
_MOST_PLAIN = 1 << 24  # pixels; larger ones are Pillow's business, bombs among them


def decode_images(
    column: pa.Array | pa.ChunkedArray,
    keys: Sequence[str],
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    holes: pa.ChunkedArray | None = None,
) -> tuple[np.ndarray, np.ndarray, Bad]:
    """Decodes B encoded images (JPEG, PNG, WebP and whatever else Pillow reads).

    Args:
        column: encoded bytes.
        keys: sample keys, to name what is bad.
        size: side, or (H, W), that every image is resized to (antialiased, aspect not kept); None keeps the
            size, which then must be the same for all.
        channels: 1 grey, 3 RGB, 4 RGBA. Transparent images are laid over white unless 4 is asked for.
        holes: strings, null where there is an image; the others are left out and not named again.

    Returns:
        images (B, H, W, C) uint8, zeros where bad; valid (B,) bool; the bad ones.

    Raises DataError when sizes differ and `size` is None, or no image at all can be decoded and so none has a
    size.
    """
    skip_B = None if holes is None else ~holes.is_null().to_numpy(zero_copy_only=False)
    return decode_views(binary_views(column), keys, size, channels, skip_B)


def decode_views(
    views: Sequence[memoryview | None],
    keys: Sequence[str],
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    skip_B: np.ndarray | None = None,
    memory: Callable[[tuple[int, ...]], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, Bad]:
    """`decode_images` of B encoded images in memory.

    Args:
        views, keys, size, channels: the images.
        skip_B: bool (B,), images that are known to be holes: zeros, not valid, not named again.
        memory: gives the uint8 array that images are decoded into, with any content; np.zeros by default.
    """
    if channels not in _PIL_MODES:
        raise ValueError(f"channels must be 1, 3 or 4, not {channels}")
    height_width = (size, size) if isinstance(size, int) else size
    take = memory or (lambda shape: np.zeros(shape, np.uint8))
    valid_B = np.zeros(len(views), dtype=bool)
    bad: Bad = []
    out: np.ndarray | None = None
    first = ""
    if height_width is not None:
        out = take((len(views), *height_width, channels))
    for i, raw in enumerate(views):
        if skip_B is not None and skip_B[i]:
            continue
        try:
            image = decode_image(raw, height_width, channels, None if out is None else out[i])
        except ValueError as error:
            bad.append((keys[i], str(error)))
            continue
        if out is None:
            out, first = take((len(views), *image.shape)), keys[i]
        if image.shape != out.shape[1:]:
            raise DataError(
                f"images differ in size: sample {keys[i]!r} is {_show(image.shape)}, {first!r} is "
                f"{_show(out.shape[1:])}. Give a size that every image is resized to (image_size)."
            )
        if image.base is None or not np.may_share_memory(image, out):
            out[i] = image
        valid_B[i] = True
    if out is None:
        if bad and len(bad) == len(views):
            key, reason = bad[0]
            raise DataError(
                f"none of {len(bad)} images can be decoded, the first is {key!r}: {reason}. Is this field an "
                "image? `labelmill data verify` lists what is bad."
            )
        return np.zeros((len(views), 0, 0, channels), dtype=np.uint8), valid_B, bad
    if not valid_B.all():
        out[~valid_B] = 0  # recycled memory, or an image that was decoded in part
    return out, valid_B, bad


def image_decoder(name: str) -> ImageDecoder:
    """The installed image decoder of that name, ours for "". Raises DataError that lists what is installed."""
    if not name:
        return decode_views
    found = {entry.name: entry for entry in entry_points(group=IMAGE_DECODERS)}
    if name not in found:
        raise DataError(f"data.image_decoder {name!r} isn't installed.{did_you_mean(name, found)} Empty takes ours.")
    return found[name].load()


def _show(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]}"


def decode_image(
    raw: bytes | memoryview | None, size: tuple[int, int] | None, channels: int, row: np.ndarray | None = None
) -> np.ndarray:
    """One image as uint8 (H, W, C), in the memory of `row` where that fits and saves a copy.

    Raises ValueError with the reason when it can't be decoded.
    """
    if not raw:
        raise ValueError("no content")
    if raw[0] == 0xFF and bytes(raw[:3]) == b"\xff\xd8\xff" and channels in _JPEG_SPACES:
        image = _decode_jpeg(raw, size, channels, row)
        if image is not None:
            return image if size is None or image.shape[:2] == size else _resize(image, size)
    if raw[0] == 0x89 and channels in _PIL_MODES and (plain := _decode_plain_png(raw, size, channels)) is not None:
        return plain
    try:
        with Image.open(io.BytesIO(raw)) as picture:
            picture.load()
            flat = _to_mode(picture, channels)
            if size is not None and flat.size != size[::-1]:
                flat = flat.resize(size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(flat).reshape(flat.height, flat.width, channels)
    except UnidentifiedImageError:
        raise ValueError(f"not an image (it begins with {bytes(raw[:8])!r})") from None
    except (OSError, SyntaxError, Image.DecompressionBombError, ValueError, EOFError) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _decode_jpeg(
    raw: bytes | memoryview, size: tuple[int, int] | None, channels: int, row: np.ndarray | None
) -> np.ndarray | None:
    """A JPEG through libjpeg-turbo, already scaled down where possible; None leaves it to Pillow."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(raw)
    except ValueError:
        return None  # unusual sampling or broken: Pillow tells them apart
    if space in ("CMYK", "YCCK") or height * width > (Image.MAX_IMAGE_PIXELS or 2**62):
        return None  # Pillow has the colours, and guards against decompression bombs
    options: dict[str, Any] = {}
    if row is not None and row.shape[:2] == (height, width):
        options = {"buffer": row}
    elif size is not None:
        options = {"min_height": size[0], "min_width": size[1]}
    try:
        return simplejpeg.decode_jpeg(raw, _JPEG_SPACES[channels], **options)
    except ValueError as error:
        raise ValueError(f"JPEG: {error}") from None


_PNG_HEAD = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_COLOURS = {1: 0, 3: 2, 4: 6}


def _decode_plain_png(raw: bytes | memoryview, size: tuple[int, int] | None, channels: int) -> np.ndarray | None:
    """A PNG of 8 bits with just the channels and the size wanted, in half the time of opening it; None leaves it to Pillow.

    The pixels still go through Pillow's decoder; chunk checksums are compared as Pillow does.
    """
    raw = bytes(raw)
    if len(raw) < 45 or not raw.startswith(_PNG_HEAD):
        return None
    width, height, depth, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", raw, 16)
    if depth != 8 or colour != _PNG_COLOURS[channels] or interlace or not 0 < width * height <= _MOST_PLAIN:
        return None
    if size is not None and (height, width) != size:
        return None
    if zlib.crc32(raw[12:29]) != int.from_bytes(raw[29:33], "big"):
        return None
    at, content = 33, []
    while at + 12 <= len(raw):
        length, kind = int.from_bytes(raw[at : at + 4], "big"), raw[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(raw) or kind == b"tRNS":
            return None
        if kind == b"IDAT":
            if zlib.crc32(raw[at + 4 : end - 4]) != int.from_bytes(raw[end - 4 : end], "big"):
                return None
            content.append(raw[at + 8 : end - 4])
        elif kind == b"IEND":
            break
        at = end
    mode = _PIL_MODES[channels]
    try:
        picture = Image.frombytes(mode, (width, height), b"".join(content), "zip", mode, 0)
    except (OSError, ValueError, SyntaxError):
        return None
    return np.frombuffer(picture.tobytes(), np.uint8).reshape(height, width, channels)


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    scaled = np.asarray(picture.resize(size[::-1], Image.Resampling.BILINEAR))
    return scaled.reshape(*size, image.shape[2])


def _to_mode(picture: Image.Image, channels: int) -> Image.Image:
    mode = _PIL_MODES[channels]
    if picture.mode == mode:
        return picture
    if picture.mode.startswith("I"):  # 16 bits; convert() would clip them
        wide = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((wide >> 8 if wide.max(initial=0) > 255 else wide).astype(np.uint8))
    if channels != 4 and (picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info):
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, layer)
    return picture.convert(mode)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) as PNG."""
    file = io.BytesIO()
    flat = image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image
    Image.fromarray(np.ascontiguousarray(flat)).save(file, "PNG", compress_level=4)
    return file.getvalue()


def decode_column(
    column: pa.Array | pa.ChunkedArray,
    spec: FieldSpec,
    keys: Sequence[str],
    size: int | tuple[int, int] | None = None,
    channels: int = 3,
    skip_B: np.ndarray | None = None,
) -> tuple[Any, np.ndarray, Bad]:
    """The values of any field: images and arrays as one numpy array (B, ...), the others as a list of B.

    Text is str, bytes are bytes, safetensors a dict of numpy arrays, arrow a table.

    Args:
        column, spec, keys: the field.
        size, channels: of images.
        skip_B: bool (B,), samples that are known to be holes: not valid, not named again.

    Returns the values (zeros or None where bad), valid (B,) bool, the bad ones. Raises DataError as `decode_images`.
    """
    if spec.kind == "image":
        return decode_views(binary_views(column), keys, size, channels, skip_B)
    if spec.kind == "array":
        return decode_arrays(column, spec, keys, skip_B)
    valid_B = np.ones(len(column), dtype=bool) if skip_B is None else ~skip_B
    if spec.kind not in _RECORDS:
        return column.to_pylist(), valid_B, []
    values: list[Any] = [None] * len(column)
    bad: Bad = []
    for i, raw in enumerate(binary_views(column)):
        if valid_B[i]:
            try:
                values[i] = _RECORDS[spec.kind](raw or b"")
            except ValueError as error:
                bad.append((keys[i], str(error)))
                valid_B[i] = False
    return values, valid_B, bad


def decode_arrays(
    column: pa.Array | pa.ChunkedArray, spec: FieldSpec, keys: Sequence[str], skip_B: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, Bad]:
    """Arrays of B samples as (B, *shape); valid (B,) bool; the bad ones. `skip_B` as of `decode_column`.

    NPY bytes are read without pickles; an array of another shape than the first good one is bad.
    """
    chunk = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    valid_B = np.ones(len(chunk), dtype=bool) if skip_B is None else ~skip_B
    if pa.types.is_fixed_size_list(chunk.type):
        flat = chunk.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(chunk), *(spec.shape or (-1,))), valid_B, []
    bad: Bad = []
    out: np.ndarray | None = None
    for i, raw in enumerate(binary_views(chunk)):
        if not valid_B[i]:
            continue
        try:
            array = decode_npy(raw or b"")
            if out is None:
                shape = array.shape if spec.shape is None else spec.shape
                out = np.zeros((len(chunk), *shape), dtype=array.dtype)
            if array.shape != out.shape[1:] or array.dtype != out.dtype:
                found, wanted = f"{array.dtype}{list(array.shape)}", f"{out.dtype}{list(out.shape[1:])}"
                raise ValueError(f"array is {found}, the others are {wanted}")
            out[i] = array
        except ValueError as error:
            bad.append((keys[i], str(error)))
            valid_B[i] = False
    if out is None:
        out = np.zeros((len(chunk), *(spec.shape or ())), dtype=spec.dtype or np.float32)
    return out, valid_B, bad


def binary_views(column: pa.Array | pa.ChunkedArray) -> list[memoryview | None]:
    """Views of the values of a binary column; None for null. Nothing is copied."""
    out: list[memoryview | None] = []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        if not len(chunk):
            continue
        if chunk.type != pa.binary():
            chunk = chunk.cast(pa.binary())
        _, offsets, content = chunk.buffers()
        starts = np.frombuffer(offsets, dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        # as unsigned bytes: simplejpeg takes no others
        view = memoryview(content).cast("B") if content is not None else memoryview(b"")
        if chunk.null_count:
            nulls = chunk.is_null().to_pylist()
            out += [None if n else view[a:z] for n, a, z in zip(nulls, starts[:-1], starts[1:], strict=True)]
        else:
            out += [view[a:z] for a, z in pairwise(starts)]
    return out
