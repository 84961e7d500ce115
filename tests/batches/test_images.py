"""Images of questions: every file format, every fault, each content once, and nothing half-written."""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sqa_jax.batches.config_data import config_images, load_config_problems, training_problems
from sqa_jax.batches.dataset import build_or_reuse
from sqa_jax.batches.images import ImageBatcher
from sqa_jax.batches.loader import pack_dataset
from sqa_jax.checkpoints.load import load_student, student_config
from sqa_jax.checkpoints.tokenizer import load_tokenizer
from sqa_jax.config import default
from sqa_jax.data.image import MOST_PIXELS, ImageFile
from sqa_jax.data.images import ImageStore, load_images
from sqa_jax.data.problem import Problem
from sqa_jax.errors import UserError
from sqa_jax.evaluation.evaluate import evaluate
from sqa_jax.files import read_jsonl, write_json
from sqa_jax.models.catalogue import SHAPES
from sqa_jax.models.vision.registry import vision_family
from sqa_jax.preprocess import describe
from tests.support.vision_pair import png, problem

VISION_MODELS = ("paligemma-tiny", "smolvlm-tiny", "qwen2-vl-tiny")
VISION = SHAPES["qwen2-vl-tiny"].vision


def load(cache, problems, vision=VISION) -> ImageStore:
    return load_images(cache, vision, 1000, problems)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oversized_png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, and which holds next to nothing."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


NOISE = png(0, (60, 40))
PHOTO = encoded(Image.open(io.BytesIO(NOISE)), "jpeg")
TOO_LARGE, UNREADABLE = f"image of more than {MOST_PIXELS:,} pixels", "not a readable image"
FAULTS = {
    "empty": (b"", "image file is empty"),
    "text": (b"<html>404</html>", UNREADABLE),
    "noise": (np.random.default_rng(0).bytes(500), UNREADABLE),
    "cut-off png": (NOISE[: len(NOISE) // 2], UNREADABLE),
    "cut-off jpeg": (PHOTO[: len(PHOTO) // 2], UNREADABLE),
    "damaged": (NOISE[:100] + bytes(50) + NOISE[150:], UNREADABLE),
    "no pixels": (oversized_png(0, 0), UNREADABLE),
    # Twice PIL's limit is an error of its own; between the two it only warns.
    "bomb": (oversized_png(30_000, 30_000), TOO_LARGE),
    "small bomb": (oversized_png(10_000, 9_000), TOO_LARGE),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", VISION_MODELS)
def test_what_cannot_be_used_is_left_out_and_says_why(name, tmp_path):
    """Beside good images, which are not affected; a decompression bomb is refused by its header, without being decoded."""
    directory = tmp_path / "a directory"
    directory.mkdir()
    problems = [problem(pid, content) for pid, (content, _) in FAULTS.items()]
    for pid, path in (("missing", tmp_path / "no.png"), ("directory", directory)):
        problems.append(Problem(pid, "?", ("a", "b"), 0, image=ImageFile(str(path), path.read_bytes)))
    good = [problem("good", NOISE), problem("other", PHOTO), problem("none", None)]
    vision = SHAPES[name].vision
    found = load(tmp_path, [*problems, *good], vision)
    reasons = {pid: reason for pid, (_, reason) in FAULTS.items()}
    assert found.failed == reasons | {"missing": "image not found", "directory": "image cannot be read"}
    assert found.failures == collections.Counter(found.failed.values())
    assert found.failure_summary() == (
        f"11 of 13 questions' images cannot be used ({UNREADABLE}: 6, {TOO_LARGE}: 2, image file is empty: 1, image "
        "not found: 1, image cannot be read: 1); the first is image empty"
    )
    alone = load(tmp_path / "alone", good, vision)
    assert alone.image_index.keys() == found.image_index.keys() == {"good", "other"} and not alone.failure_summary()
    np.testing.assert_array_equal(alone.pieces, found.pieces)
    for pid, (content, reason) in FAULTS.items():
        with pytest.raises(UserError, match=f"image {pid}: {reason}.*; .+"):
            problem(pid, content).image.open()


@pytest.mark.parametrize("name", VISION_MODELS)
def test_every_file_format_gives_the_same_image(name, tmp_path):
    """Palette, animation, transparency, 16 bits and one pixel, against the same colours in a plain file."""
    colours = Image.open(io.BytesIO(NOISE)).quantize(16)
    plain, grey = colours.convert("RGB"), Image.open(io.BytesIO(NOISE)).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    transparent = colours.convert("RGBA")
    transparent.putalpha(Image.fromarray(np.where(np.arange(60) < 30, 255, np.zeros((40, 1))).astype(np.uint8)))
    white = plain.copy()
    white.paste("white", (30, 0, 60, 40))
    pairs = {
        "palette": (encoded(colours, "png"), plain),
        "animated": (encoded(colours, "gif", save_all=True, append_images=[Image.new("P", (60, 40), 3)]), plain),
        "transparent": (encoded(transparent, "png"), white),
        "16 bits": (encoded(deep, "png"), grey.convert("RGB")),
        "one pixel": (encoded(Image.new("1", (1, 1), 1), "png"), Image.new("RGB", (1, 1), "white")),
        "CMYK": ((cmyk := encoded(plain.convert("CMYK"), "jpeg")), Image.open(io.BytesIO(cmyk)).convert("RGB")),
    }
    vision = SHAPES[name].vision
    found = load(tmp_path, [problem(pid, content) for pid, (content, _) in pairs.items()], vision)
    assert not found.failed
    for pid, (_, expected) in pairs.items():
        made = vision_family(vision).preprocess_image(vision, expected)
        number = found.image_index[pid]
        np.testing.assert_array_equal(found.pieces_of(number), made.pieces, err_msg=pid)
        assert found.sizes[number].tolist() == [len(made.pieces), made.rows, made.columns]


def test_each_content_is_decoded_once(tmp_path, monkeypatch):
    """In one store and in later runs; another store that shares images with it has the same pieces."""
    module, count = vision_family(VISION), collections.Counter()

    def preprocess(vision, image, original=module.preprocess_image):
        count[image.size] += 1
        return original(vision, image)

    monkeypatch.setattr(module, "preprocess_image", preprocess)
    sizes = [(60, 40), (30, 90), (80, 80)]
    problems = [problem(f"{copy}{k}", png(k, size)) for copy in "ab" for k, size in enumerate(sizes)]
    first, again = load(tmp_path, problems), load(tmp_path, problems[::-1])
    assert count == dict.fromkeys(sizes, 1)
    assert first.fingerprint == again.fingerprint and first.image_index == again.image_index
    assert all(first.image_index[f"a{k}"] == first.image_index[f"b{k}"] for k in range(3))
    other = load(tmp_path, [problems[1], problem("new", png(9, (50, 50)))])
    np.testing.assert_array_equal(other.pieces_of(other.image_index["a1"]), first.pieces_of(first.image_index["a1"]))
    assert len(list(tmp_path.glob("pictures-*"))) == 2


def test_fingerprint_depends_on_the_image_of_each_question(tmp_path):
    """The same images assigned to other questions share a folder, but make other rows."""
    one, other = png(1, (60, 40)), png(2, (60, 40))
    stores = [load(tmp_path, [problem("1", a), problem("2", b)]) for a, b in ((one, other), (other, one), (one, None))]
    assert stores[0].pieces_fingerprint == stores[1].pieces_fingerprint != stores[2].pieces_fingerprint
    assert len({store.fingerprint for store in stores}) == 3
    smaller = dataclasses.replace(VISION, max_pixels=28 * 28)
    assert load(tmp_path, [problem("1", one)], smaller).pieces_fingerprint != stores[2].pieces_fingerprint


def test_interrupted_nothing_is_left(tmp_path, monkeypatch):
    problems, module = [problem(str(k), png(k, (40, 40))) for k in range(20)], vision_family(VISION)

    def preprocess(vision, image, original=module.preprocess_image, left=iter(range(7))):  # noqa: B008
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(vision, image)

    with monkeypatch.context() as patched:
        patched.setattr(module, "preprocess_image", preprocess)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path, problems)
    assert not list(tmp_path.iterdir())
    assert len(load(tmp_path, problems).sizes) == 20


KILLED = """
import itertools, os, signal, sys
from tests.batches.test_images import load, vision_family, png, problem, VISION
from pathlib import Path
module, calls = vision_family(VISION), itertools.count()
def preprocess(vision, image, original=module.preprocess_image):
    if next(calls) == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(vision, image)
module.preprocess_image = preprocess
load(Path(sys.argv[1]), [problem(str(k), png(k, (40, 40))) for k in range(20)])
"""


def test_killed_what_is_there_is_whole(tmp_path):
    root = str(Path(__file__).parent.parent.parent)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": root})
    assert killed.returncode == -signal.SIGKILL
    assert not list(tmp_path.glob("pictures-*"))
    assert len(load(tmp_path, [problem(str(k), png(k, (40, 40))) for k in range(20)]).sizes) == 20


@pytest.mark.parametrize(("file", "words"), [("pieces.bin", "damaged"), ("index.json", "not valid JSON")])
def test_a_damaged_folder_is_named(tmp_path, file, words):
    problems = [problem("1", NOISE)]
    load(tmp_path, problems)
    (path,) = tmp_path.glob("pictures-*")
    (path / file).write_bytes((path / file).read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{path}.*{words}.*remove this folder"):
        load(tmp_path, problems)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["smolvlm-tiny", "smolvlm-256m", "qwen2-vl-tiny", "qwen2-vl-2b"]),
    most=st.integers(1, 1300),
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
)
@example(name="qwen2-vl-2b", most=20, width=1, height=199)  # fmt: skip
def test_no_image_takes_more_tokens_than_allowed(name, most, width, height):
    from sqa_jax.models.vision import smolvlm
    from sqa_jax.models.vision.qwen2_vl import preprocess as qwen2_vl

    published = SHAPES[name].vision
    try:
        vision = student_config(f"random:{name}", max_image_tokens=most).vision
    except UserError as error:
        assert "config.student.max_image_tokens" in str(error) and most < published.features_per_piece
        return

    def features(vision):
        if "qwen" in name:
            return np.prod(qwen2_vl._grid(vision, width, height)) // vision.merge**2
        rows, columns = smolvlm._grid(vision, *smolvlm._resized_size(vision, width, height))
        return (rows * columns + (rows * columns > 1)) * vision.features_per_piece

    try:
        made = features(vision)
    except UserError as error:
        assert "elongated" in str(error) or "times as long" in str(error)
        return
    assert made <= most
    if "qwen" in name:  # one that need be neither shrunk nor enlarged is not
        side = vision.patch_size * vision.merge
        if published.min_pixels <= round(width / side) * round(height / side) * side**2 <= vision.max_pixels:
            assert made == features(published)


def test_paligemma_has_one_number_of_tokens():
    assert student_config("random:paligemma-3b", max_image_tokens=256) == SHAPES["paligemma-3b"]
    with pytest.raises(
        UserError, match="max_image_tokens is 64; this student encodes every image as 256: leave it at 0"
    ):
        student_config("random:paligemma-3b", max_image_tokens=64)
    assert student_config("random:tiny", max_image_tokens=64) == SHAPES["tiny"]


def test_elongated_images(tmp_path):
    """Qwen2-VL refuses them; the others resize them to squares."""
    lines = [problem(str(k), png(k, size)) for k, size in enumerate([(402, 2), (2, 500), (1, 199), (4000, 40)])]
    found = load(tmp_path, lines, dataclasses.replace(VISION, max_pixels=28 * 28 * 4))
    elongated = (
        "one side of the image is more than 200 times as long as the other",
        "the image is too elongated for 3136 pixels",
    )
    assert found.failed == {"0": elongated[0], "1": elongated[0], "2": elongated[1], "3": elongated[1]}
    assert not load(tmp_path, lines, SHAPES["smolvlm-tiny"].vision).failed


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Questions in ScienceQA's layout: of eight in each split four have an image, of which one is missing and one cut off."""
    root = tmp_path_factory.mktemp("questions")
    rows, splits = {}, {}
    for split in ("train", "val", "test"):
        splits[split] = [f"{split}{k}" for k in range(8)]
        for k, pid in enumerate(splits[split]):
            rows[pid] = {
                "question": "Which is it?", "choices": ["this", "that"], "answer": k % 2, "split": split,
                "image": "image.png" if k < 4 else None,
            }  # fmt: skip
            if k in (1, 2, 3):
                file = root / "images" / split / pid / "image.png"
                file.parent.mkdir(parents=True)
                file.write_bytes(NOISE[:900] if k == 3 else png(k, (60, 40)))
    write_json(root / "problems.json", rows)
    write_json(root / "pid_splits.json", splits)
    return root


def config_of(name, directory, cache, **change):
    config = default()
    config.update_from_flattened_dict(
        {
            "student.path": f"random:{name}", "data.source": "dir", "data.path": str(directory), "data.cache": str(cache),
            "eval.checkpoint": "none", "eval.batch_rows": 1,
        } | change
    )  # fmt: skip
    return config


def built(config):
    problems, student = load_config_problems(config), student_config(config.student.path)
    images = config_images(config, student, training_problems(config, problems))
    tokenizer = load_tokenizer(config.student.path)
    return build_or_reuse(config, tokenizer, problems, images)[0], tokenizer, student, images


def test_training_drops_and_counts_them(directory, tmp_path):
    config = config_of("smolvlm-tiny", directory, tmp_path)
    dataset, tokenizer, student, images = built(config)
    manifest = dataset.manifest
    assert manifest["dropped"] == {
        "image not found": {"rows": 1, "pids": ["train0"]}, UNREADABLE: {"rows": 1, "pids": ["train3"]},
    }  # fmt: skip
    assert manifest["rows"] == 6
    stats = manifest["pictures"]
    assert (stats["questions"], stats["distinct"], stats["unusable"]) == (2, 2, {"image not found": 1, UNREADABLE: 1})
    assert stats["features"]["max"] == 20 and stats["bytes"] == 2 * 5 * 64 * 64 * 3
    assert str(directory / "images" / "train" / "train0" / "image.png") in images.failure_summary()
    said = describe(dataset, False, tokenizer, student.vocab_size)
    assert "images:          2 distinct of 2 questions, 0.1 MB" in said
    # The first row as the model gets it: four tiles of 4 features, row by row, and the global image.
    assert "<row_1_col_2><image 4>" in said and "<global-img><image 4><fake_token_around_image>" in said
    rows = pack_dataset(dataset, config, 0, images=ImageBatcher(images))
    assert rows.rows_of_epoch(0) > 0
    config.train.row_length = 128
    with pytest.raises(
        UserError, match="question train1 takes .* 2 questions do not fit .* config.student.max_image_tokens"
    ):
        pack_dataset(dataset, config, 0, images=ImageBatcher(images))
    # Fetched since, they make other rows.
    file = directory / "images" / "train" / "train0" / "image.png"
    file.parent.mkdir()
    file.write_bytes(NOISE)
    again, *_ = built(config)
    file.unlink(), file.parent.rmdir()
    assert again.path != dataset.path and again.manifest["rows"] == 7


def test_evaluation_asks_without_them_and_says_so(directory, tmp_path, capsys):
    config = config_of("paligemma-tiny", directory, tmp_path)
    metrics = evaluate(config, str(tmp_path / "run"))
    assert metrics["without_image"] == {"n": 2, "image not found": 1, UNREADABLE: 1} and metrics["missing"] == 0
    assert f"the first is {directory}/images/test/test0/image.png" in capsys.readouterr().err
    rows = read_jsonl(tmp_path / "run" / "eval" / "test" / "predictions.jsonl", "predictions")
    assert [row.get("status") for row in rows] == [
        "without its image: image not found", None, None, f"without its image: {UNREADABLE}", *[None] * 4,
    ]  # fmt: skip
    # Its image's 16 tokens, and nothing else, are what such a question lacks.
    assert rows[1]["read"] - rows[0]["read"] == 16
    assert evaluate(config, str(tmp_path / "run")) == metrics


def test_a_checkpoint_of_an_unsupported_vision_encoder_is_refused(tmp_path):
    for kind, change, words in (
        ("llava", {}, "architecture 'llava' is not supported; supported: .*paligemma"),
        ("paligemma", {"vision_config": {"model_type": "dinov2"}}, "vision encoder 'dinov2' is not supported"),
    ):
        write_json(tmp_path / "config.json", {"model_type": kind, **change})
        with pytest.raises(UserError, match=f"{tmp_path}/config.json: {words}"):
            load_student(str(tmp_path))
