"""Decoding: formats, sizes, modes, and what is bad."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from labelmill.data.decode import (
    binary_views,
    decode_arrays,
    decode_column,
    decode_image,
    decode_images,
    decode_views,
    encode_png,
    image_decoder,
)
from labelmill.data.images import image_kind
from labelmill.data.manifest import FieldSpec
from labelmill.errors import DataError

rng = np.random.default_rng(0)


def encoded(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def smooth(height: int = 24, width: int = 32) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 7, y * 9, x + y], axis=2).astype(np.uint8)


def decode(*raw: bytes | None, **options):
    return decode_images(pa.array(raw, pa.binary()), [f"k{i}" for i in range(len(raw))], **options)


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("BMP", {}, 0), ("JPEG", {"quality": 95, "subsampling": 0}, 12)],
)
def test_formats(kind, options, error):
    images, valid, bad = decode(encoded(smooth(), kind, **options))
    assert images.shape == (1, 24, 32, 3)
    assert images.dtype == np.uint8
    assert valid.tolist() == [True]
    assert bad == []
    assert np.abs(images[0].astype(int) - smooth()).max() <= error


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [None, 16, (10, 40), 64])
def test_shapes(kind, channels, size):
    images, valid, _ = decode(encoded(smooth(), kind), encoded(smooth()[:, :, 0], kind), size=size, channels=channels)
    height, width = (24, 32) if size is None else (size, size) if isinstance(size, int) else size
    assert images.shape == (2, height, width, channels)
    assert valid.all()


def test_large_jpegs_are_reduced_like_pillow_does():
    raw = encoded(smooth(240, 320), "JPEG", quality=95)
    images, _, _ = decode(raw, size=32)
    wanted = np.asarray(Image.open(io.BytesIO(raw)).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(images[0].astype(int) - wanted).mean() < 3


def test_modes():
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    clear[:2] = (200, 100, 50, 255)
    images, _, _ = decode(encoded(clear, "PNG"))
    assert images[0, 0, 0].tolist() == [200, 100, 50]
    assert images[0, 3, 3].tolist() == [255, 255, 255]  # transparent lies over white
    kept, _, _ = decode(encoded(clear, "PNG"), channels=4)
    assert np.array_equal(kept[0], clear)
    palette = Image.fromarray(smooth()).quantize(8)
    assert decode(encoded(palette, "PNG"))[0].shape == (1, 24, 32, 3)
    assert decode(encoded(Image.new("CMYK", (5, 4)), "JPEG"))[0].shape == (1, 4, 5, 3)
    wide = Image.fromarray(np.array([[0, 65535], [32768, 256]], dtype=np.uint16))
    assert decode(encoded(wide, "PNG"), channels=1)[0][0, :, :, 0].tolist() == [[0, 255], [128, 1]]
    assert decode(encoded(Image.new("1", (3, 3), 1), "PNG"), channels=1)[0].max() == 255


def test_bad_images_are_named_and_leave_holes():
    good = encoded(smooth(), "PNG")
    noise = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
    jpeg = encoded(noise, "JPEG")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 255
    raw = (good, b"", None, b"not an image", good[: len(good) // 2], jpeg[: len(jpeg) // 2], bytes(flipped), good)
    images, valid, bad = decode(*raw)
    assert valid.tolist() == [True] + [False] * 6 + [True]
    assert [key for key, _ in bad] == [f"k{i}" for i in range(1, 7)]
    assert all(reason for _, reason in bad)
    assert "BytesIO" not in str(bad)
    assert not images[1:7].any()
    assert np.array_equal(images[0], images[7])


def test_sizes_that_differ_need_a_size():
    raw = encoded(smooth(), "PNG"), encoded(smooth(10, 10), "PNG")
    with pytest.raises(DataError, match=r"'k1' is 10x10, 'k0' is 24x32.*image_size"):
        decode(*raw)
    assert decode(*raw, size=8)[1].all()


def test_no_good_image_at_all():
    with pytest.raises(DataError, match=r"none of 2 images.*'k0'"):
        decode(b"x", b"y")
    images, valid, bad = decode(b"x", b"y", size=8)
    assert images.shape == (2, 8, 8, 3)
    assert not valid.any()
    assert len(bad) == 2
    assert decode()[0].shape[0] == 0


def test_png_round_trip():
    for shape in ((5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4)):
        image = rng.integers(0, 255, shape, dtype=np.uint8)
        channels = shape[2] if len(shape) == 3 else 1
        assert np.array_equal(decode(encode_png(image), channels=channels)[0][0], image.reshape(5, 6, channels))


def test_views_of_slices_chunks_and_nulls():
    array = pa.array([b"a", None, b"", b"ccc", b"dd"], pa.binary())
    wanted = [b"a", None, b"", b"ccc", b"dd"]
    assert [None if v is None else bytes(v) for v in binary_views(array)] == wanted
    chunked = pa.chunked_array([array.slice(1, 3), array.slice(4), array.slice(0, 0)])
    assert [None if v is None else bytes(v) for v in binary_views(chunked)] == wanted[1:]


def test_arrays():
    def npy(array, **options) -> bytes:
        file = io.BytesIO()
        np.save(file, array, **options)
        return file.getvalue()

    spec = FieldSpec(kind="array", ext="npy")
    good = npy(np.arange(6, dtype=np.float32).reshape(2, 3))
    pickled = npy(np.array([{}], dtype=object), allow_pickle=True)
    raw = pa.array([good, b"x", npy(np.zeros(2, dtype=np.float32)), pickled, good], pa.binary())
    arrays, valid, bad = decode_arrays(raw, spec, list("abcde"))
    assert arrays.shape == (5, 2, 3)
    assert valid.tolist() == [True, False, False, False, True]
    assert [key for key, _ in bad] == ["b", "c", "d"]
    assert arrays[4, 1, 2] == 5
    fixed = FieldSpec(kind="array", ext="npy", shape=(2, 2), dtype="int16")
    column = pa.chunked_array([pa.array([[1, 2, 3, 4], [5, 6, 7, 8]], fixed.arrow_type)]).slice(1)
    assert decode_arrays(column, fixed, ["a"])[0].tolist() == [[[5, 6], [7, 8]]]


def test_image_kinds():
    for kind, ext in {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}.items():
        assert image_kind(encoded(smooth(), kind)[:16]) == ext
    assert image_kind(b"hello") is None


def noise(mode: str, height: int, width: int) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8), mode)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize("level", [0, 6])
def test_plain_pngs_are_what_pillow_gives(mode, channels, level):
    for height, width in ((28, 28), (1, 1), (3, 70), (17, 5)):
        for picture in (noise(mode, height, width), Image.new(mode, (width, height), 77)):
            raw = encoded(picture, "PNG", compress_level=level)
            image = decode_image(memoryview(raw), None, channels)
            assert np.array_equal(image, np.asarray(picture).reshape(height, width, channels))


def test_a_png_with_any_byte_changed_is_what_pillow_says():
    """The short way gives up wherever Pillow would, and never gives other pixels than Pillow."""
    raw = encoded(noise("L", 9, 7), "PNG")
    for at in range(8, len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 0x41
        try:
            expected = np.asarray(Image.open(io.BytesIO(changed)).convert("L"))
        except Exception:
            expected = None
        try:
            found = decode_image(bytes(changed), None, 1)[:, :, 0]
        except ValueError:
            found = None
        assert (expected is None) == (found is None), at
        assert expected is None or np.array_equal(found, expected), at


def test_memory_is_used_again_and_holes_are_blank():
    raw = [encoded(smooth(), "JPEG"), b"broken", encoded(smooth(), "JPEG"), b""]
    memory = np.full((4, 24, 32, 3), 99, np.uint8)
    skip = np.array([False, False, False, True])
    images, valid, bad = decode_views(
        [memoryview(r) for r in raw], list("abcd"), 24, 3, skip, lambda shape: memory[:, :, :24]
    )
    assert np.may_share_memory(images, memory)
    assert valid.tolist() == [True, False, True, False]
    assert [key for key, _ in bad] == ["b"], "a hole that is known isn't named again"
    assert not images[[1, 3]].any()
    assert images[[0, 2]].any(axis=(1, 2, 3)).all()


def test_jpegs_take_the_fast_decoder(monkeypatch):
    raw = encoded(smooth(), "JPEG")
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("Pillow was asked"))
    images, valid, _ = decode(raw, raw)
    assert valid.all()
    assert images.shape == (2, 24, 32, 3)


def test_columns_of_every_kind():
    from safetensors.numpy import save

    def column(kind, values, **options):
        spec = FieldSpec(kind=kind, ext="x", **options)
        return decode_column(pa.array(values), spec, ["a", "b", "c"], skip_B=np.array([False, False, True]))

    def npy(array):
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    texts, valid, bad = column("text", ["x", "y", ""])
    assert (texts, valid.tolist(), bad) == (["x", "y", ""], [True, True, False], [])
    arrays, valid, bad = column("array", [npy(np.arange(3)), b"nothing", b""])
    assert arrays.tolist() == [[0, 1, 2], [0, 0, 0], [0, 0, 0]]
    assert valid.tolist() == [True, False, False]
    assert [key for key, _ in bad] == ["b"]
    values, valid, bad = column("safetensors", [save({"v": np.ones(2, np.float32)}), b"nothing", b""])
    assert values[0]["v"].tolist() == [1, 1]
    assert values[1:] == [None, None]
    assert "safetensors" in bad[0][1]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("n", pa.int64())])) as writer:
        writer.write_table(pa.table({"n": [1, 2]}))
    values, valid, bad = column("arrow", [sink.getvalue().to_pybytes(), b"nothing", b""])
    assert values[0].column("n").to_pylist() == [1, 2]
    assert [key for key, _ in bad] == ["b"]


def test_image_decoders_are_installed_by_name():
    assert image_decoder("") is decode_views
    with pytest.raises(DataError, match=r"data\.image_decoder 'gpu' isn't installed"):
        image_decoder("gpu")
