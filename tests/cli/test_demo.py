"""tokensieve demo: the whole way from a photo to a table and a picture, and every way to stop it early."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import tokensieve
import torch

pytest.importorskip("typer")
pytest.importorskip("PIL")
pytest.importorskip("transformers")
from PIL import Image
from tokensieve.cli import app
from tokensieve.demo import eager, model, photo
from typer.testing import CliRunner, Result

SMALL = ["--layers", "25", "--hidden", "64"]  # PyramidDrop's defaults need 25 layers; the rest of the demo is as always


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def demo(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["demo", *arguments], env={"COLUMNS": "160"})


def fails(*arguments: str) -> str:
    """The one line that a bad option gives; nothing else may be left behind."""
    before = sorted(Path.cwd().iterdir())
    result = demo(*SMALL, *arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("... ")]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("tokensieve: ")
    assert sorted(Path.cwd().iterdir()) == before
    return lines[0]


def test_demo_prints_its_tables_and_writes_the_picture_twice(folder: Path) -> None:
    pytest.importorskip("sklearn")
    for _ in range(2):  # the second run overwrites
        result = demo(*SMALL)
        assert result.exit_code == 0, result.output
        assert [path.name for path in folder.iterdir()] == ["demo.png"]
    out = result.stdout
    assert "PyramidDrop (arXiv 2410.17247) on china.jpg of scikit-learn" in out
    assert "Random weights: timings and mechanics are real, the choice of tokens is not." in out
    assert "Prompt: 640 tokens, 576 of them image." in out
    for row in ("0-7 640 640 576", "8-15 352 640 288", "16-23 208 640 144", "24 136 640 72"):
        assert any(line.split()[:4] == row.split() for line in out.splitlines()), row
    assert "eager code" in out
    with Image.open("demo.png") as picture:
        assert picture.size == (24 + 4 * 408, 1120)


@pytest.mark.parametrize(("name", "panels"), [("fastv", 2), ("FasterVLM", 2)])
def test_demo_runs_every_method(folder: Path, name: str, panels: int) -> None:
    own, output = "[red] own.png", "[b]/x[/b] ü.png"  # brackets are markup to rich
    (folder / "[b]" / "x[").mkdir(parents=True)
    Image.effect_mandelbrot((400, 300), (-2, -1.5, 1, 1.5), 60).convert("RGB").save(own)
    result = demo("--layers", "3", "--hidden", "64", "--method", name, "--image", own, "--output", output, "--seed", "3")
    assert result.exit_code == 0, result.output
    assert f"on {own}" in result.stdout
    assert f"wrote {output} (" in result.stdout
    with Image.open(output) as picture:
        assert picture.width == 24 + panels * 408


def test_demo_prunes_a_local_checkpoint_and_shows_both_answers(folder: Path) -> None:
    processor = small_processor()
    Image.effect_mandelbrot((500, 340), (-2, -1.5, 1, 1.5), 60).convert("RGB").save("own.jpg")
    subject = model.random_llava(Image.open("own.jpg"), 0, 3, 64)
    subject.model.save_pretrained("checkpoint")
    processor.save_pretrained("checkpoint")
    own = ("--model", "checkpoint", "--image", "own.jpg", "--method", "FastV")
    result = demo(*own)
    assert result.exit_code == 0, result.output
    assert "checkpoint (LlavaForConditionalGeneration)" in result.stdout
    assert "Random weights" not in result.stdout
    assert "dense: " in result.stdout
    assert "pruned: " in result.stdout
    assert "576 of them image" in result.stdout
    assert Path("demo.png").exists()
    assert "--prompt 'two <image>': the processor of checkpoint refuses it" in fails(*own, "--prompt", "two <image>")
    config = Path("checkpoint/config.json")
    config.write_text(config.read_text().replace(str(model.IMAGE_TOKEN), "31999"))
    assert "its processor puts no image token (id 31999) into the prompt" in fails(*own)
    weights = dict(subject.model.state_dict())
    name, _ = weights.popitem()
    subject.model.save_pretrained("checkpoint", state_dict=weights)
    assert f"the checkpoint lacks 1 of the model's weights, {name} for one" in fails(*own)
    file = Path("checkpoint/model.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert "transformers can't load it (Error while deserializing header" in fails(*own)


def test_demo_draws_the_mosaic_of_an_any_resolution_checkpoint(folder: Path) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next import LlavaNextImageProcessor

    vision = CLIPVisionConfig(
        image_size=56, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=1, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=model.VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=1, num_key_value_heads=1
    )
    pinpoints = [[56, 112], [112, 56], [112, 112]]
    config = LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=model.IMAGE_TOKEN, image_grid_pinpoints=pinpoints)
    images = LlavaNextImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=pinpoints)
    tokens = small_processor().tokenizer
    processor = LlavaNextProcessor(images, tokens, 14, "default", num_additional_image_tokens=1)
    LlavaNextForConditionalGeneration(config).save_pretrained("next")
    processor.save_pretrained("next")
    Image.effect_mandelbrot((500, 240), (-2, -1.5, 1, 1.5), 60).convert("RGB").save("own.png")
    # FasterVLM's default of 144 does not fit into 16 patches, and says so
    assert fails("--model", "next", "--image", "own.png", "--method", "FasterVLM") == (
        "tokensieve: FasterVLM: tokens must be at most N=16 patches, got 144"
    )
    result = CliRunner().invoke(app, ["demo", "--model", "next", "--image", "own.png", "--method", "FastV"], env={"COLUMNS": "20"})
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.stdout, "a number is cut in a narrow terminal"
    assert result.exit_code == 0, result.output
    with Image.open("demo.png") as picture:
        assert picture.width == 24 + 2 * 408


def small_processor() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<unk>", "<pad>", "USER:", "ASSISTANT:", "What", "is", "shown", "in", "this", "photo?"])}
    tokenizer = Tokenizer(models.WordLevel(words | {"<image>": model.IMAGE_TOKEN}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return LlavaProcessor(images, fast, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)


def test_demo_missing_image(folder: Path) -> None:
    assert fails("--image", "nowhere.jpg") == "tokensieve: --image nowhere.jpg: no such file"


def test_demo_folder_as_image(folder: Path) -> None:
    (folder / "pictures").mkdir()
    assert "is a folder" in fails("--image", "pictures")


@pytest.mark.parametrize("kind", ["text", "empty", "cut off", "bomb of a header"])
def test_demo_corrupt_image(folder: Path, kind: str) -> None:
    good = folder / "good.png"
    Image.effect_noise((200, 200), 50).save(good)
    data = {"text": b"hello", "empty": b"", "cut off": good.read_bytes()[:3000], "bomb of a header": good.read_bytes()[:40]}[kind]
    (folder / "bad.png").write_bytes(data)
    message = fails("--image", "bad.png")
    assert "--image bad.png" in message
    assert "image" in message.removeprefix("tokensieve: --image bad.png")


@pytest.mark.parametrize("option", ["--image", "--output"])
def test_demo_name_too_long_for_a_file_is_one_line(folder: Path, option: str) -> None:
    Image.new("RGB", (9, 9)).save("good.png")
    message = fails("--image", "good.png", option, 300 * "a" + ".png")
    assert message.startswith(f"tokensieve: {option} aaa")
    assert "File name too long" in message


def test_demo_does_not_overwrite_its_photo(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save("good.png")
    assert "is the photo itself" in fails("--image", "good.png", "--output", "../" + folder.name + "/good.png")


def test_demo_without_the_package_of_the_default_photo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "give --image PATH, or pip install 'tokensieve[cli]'" in fails()


def test_photo_is_turned_as_its_tag_says(tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6  # the camera was held upright: the viewer turns it by 90 degrees
    half = Image.new("RGB", (40, 20), "white")
    half.paste("black", (0, 0, 20, 20))
    half.save(tmp_path / "phone.png", exif=tag)
    turned, _ = photo.load_photo(tmp_path / "phone.png")
    assert turned.size == (20, 40)
    assert (turned.getpixel((10, 5)), turned.getpixel((10, 35))) == ((0, 0, 0), (255, 255, 255))


def test_photo_of_16_bits_is_scaled_and_of_floats_refused(folder: Path) -> None:
    grey = Image.new("I;16", (3, 1))
    for i, value in enumerate((0, 32896, 65535)):
        grey.putpixel((i, 0), value)
    grey.save("deep.png")
    read, _ = photo.load_photo(folder / "deep.png")
    assert [read.getpixel((i, 0)) for i in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]
    Image.new("F", (3, 1)).save("float.tiff")
    assert "mode F have no known range" in fails("--image", "float.tiff")


@pytest.mark.parametrize(("name", "near"), [("PyramidDorp", "PyramidDrop"), ("fastvlm", "FasterVLM"), ("fast-v", "FastV")])
def test_demo_unknown_method_names_the_nearest(folder: Path, name: str, near: str) -> None:
    message = fails("--method", name)
    assert f"unknown method '{name}'; did you mean '{near}'?" in message


@pytest.mark.parametrize(
    ("output", "reason"),
    [("nowhere/demo.png", "there is no folder nowhere"), ("taken.png", "is a folder"), ("demo.jpg", "must end in .png")],
)
def test_demo_output_that_cannot_be_written_fails_before_the_work(folder: Path, output: str, reason: str) -> None:
    (folder / "taken.png").mkdir()
    start = time.monotonic()
    assert reason in fails("--output", output)
    assert time.monotonic() - start < 5


def test_demo_without_write_permission(folder: Path) -> None:
    readonly = Path("/proc") if os.geteuid() == 0 else folder / "readonly"  # root may write anywhere but into /proc
    if not readonly.exists():
        readonly.mkdir(mode=0o500)
    message = fails("--output", str(readonly / "demo.png"))
    assert f"can't write to {readonly}" in message


@pytest.mark.parametrize("broken", ["missing", "empty", "no config"])
def test_demo_model_folder_that_is_no_checkpoint(folder: Path, broken: str) -> None:
    pytest.importorskip("sklearn")
    if broken != "missing":
        (folder / "weights").mkdir()
    if broken == "no config":
        (folder / "weights" / "config.json").write_text("{")
    assert "--model weights: " in fails("--model", "weights")


def test_demo_method_that_does_not_fit_the_model(folder: Path) -> None:
    pytest.importorskip("sklearn")
    message = fails("--layers", "10")
    assert "PyramidDrop" in message
    assert "16, 24" in message


def test_demo_seed_beyond_its_range_is_refused(folder: Path) -> None:
    result = demo("--seed", str(2**64))
    assert result.exit_code == 2
    assert "Invalid value for '--seed'" in result.stderr


def test_demo_seed_decides(folder: Path) -> None:
    picture = Image.effect_noise((336, 336), 50).convert("RGB")
    state = torch.random.get_rng_state()
    a, b, c = (model.random_llava(picture, seed, 2, 64) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state must not change"
    same = [torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters())]
    assert all(same)
    assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])
    assert not torch.equal(a.inputs["input_ids"], c.inputs["input_ids"])


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(tokensieve.__file__).parent.parent)}
    command = [sys.executable, "-m", "tokensieve", "demo", *SMALL, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["loading transformers", "building the model", "dense prefill 1"])
def test_demo_interrupt_leaves_the_folder_as_it_was_and_says_so_in_one_line(folder: Path, moment: str) -> None:
    pytest.importorskip("sklearn")
    old = {folder / "demo.png": b"of the run before"} if moment == "dense prefill 1" else {}
    for path, content in old.items():
        path.write_bytes(content)
    process = start(folder)
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith(f"... {moment}"):
        assert line, f"ended before {moment!r}: {process.communicate()}"
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    said = [line for line in rest.splitlines() if not line.startswith("... ")]
    assert process.returncode == 130, rest
    assert said == ["tokensieve: stopped; demo.png was not written"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == old


def test_demo_in_a_terminal_shows_progress_and_cleans_it_up_on_interrupt(folder: Path) -> None:
    pytest.importorskip("sklearn")
    master, slave = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(tokensieve.__file__).parent.parent), "TERM": "xterm-256color"}
    process = subprocess.Popen([sys.executable, "-m", "tokensieve", "demo", *SMALL], cwd=folder, env=environment, stderr=slave)
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):  # the end of a pseudo terminal
        while part := os.read(master, 4096):
            if b"warming up" in seen + part and b"warming up" not in seen:
                process.send_signal(signal.SIGINT)
            seen += part
    os.close(master)
    assert process.wait(60) == 130
    assert b"building the model" in seen
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}".encode() in seen, "no bar was drawn"
    assert seen.rstrip().endswith(b"tokensieve: stopped; demo.png was not written")
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l"), "the cursor stayed hidden"
    assert list(folder.iterdir()) == []


def test_demo_interrupted_while_it_writes_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Image.Image, file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        assert len(list(folder.iterdir())) == 2
        os.kill(os.getpid(), signal.SIGINT)

    (folder / "own.png").write_bytes(png())
    monkeypatch.setattr(Image.Image, "save", half)
    result = demo("--layers", "3", "--hidden", "64", "--method", "FastV", "--image", "own.png")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "tokensieve: stopped; demo.png was not written"
    assert [path.name for path in folder.iterdir()] == ["own.png"]


def test_demo_full_disk_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (folder / "own.png").write_bytes(png())
    monkeypatch.setattr(Image.Image, "save", full)
    result = demo("--layers", "3", "--hidden", "64", "--method", "FastV", "--image", "own.png")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "tokensieve: --output demo.png: can't write it (No space left on device)"
    assert [path.name for path in folder.iterdir()] == ["own.png"]


def png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((100, 80), 50).save(file, format="PNG")
    return file.getvalue()


def test_farthest_points_equals_the_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 4, (60, 3), generator=generator).float()  # many equal rows and ties
    taken = [int((x - x.mean(0)).square().sum(1).argmax())]
    while len(taken) < 60:
        best = max((i for i in range(60) if i not in taken), key=lambda i: (min(float((x[i] - x[j]).square().sum()) for j in taken), -i))
        taken.append(best)
    assert photo.farthest_points(x, 60).tolist() == taken
    assert photo.farthest_points(x, 7).tolist() == taken[:7]


@pytest.mark.parametrize("k", [-1, 4])
def test_farthest_points_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in \[0, N=3\], got {k}"):
        photo.farthest_points(torch.zeros(3, 1), k)


def test_patch_descriptors_tell_texture_from_flat_colour() -> None:
    image = Image.new("RGB", (48, 48), "grey")
    image.paste(Image.effect_noise((12, 12), 90).convert("RGB"), (24, 12))
    x = photo.patch_descriptors(image, (4, 4))
    assert x.shape == (16, 8)
    assert photo.farthest_points(x, 1).tolist() == [6]


def test_step_times_both_sides_choose_the_same_tokens() -> None:
    """The eager code that the demo compares with is the same step: same shape, same kept rows."""
    subject = model.random_llava(Image.effect_noise((336, 336), 50).convert("RGB"), 0, 3, 128)
    decoder = subject.model.model.language_model
    hidden = torch.randn(1, 100, 128)
    with torch.inference_mode():
        fused, plain = eager._projected_step(decoder, decoder.layers[1], hidden, (10, 90), 20)
        assert torch.equal(fused().tensors[0], plain())
        fused, plain = eager._map_step(decoder, hidden, (10, 90), 20)
        assert torch.equal(fused().tensors[0], plain()[0])
        times = eager.step_times(subject.model, tokensieve.methods.FasterVLM(), 35, 576, 640, repeats=1)
    assert len(times) == 1
    assert times[0].fused > 0
    assert times[0].eager > 0
